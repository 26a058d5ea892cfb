"""Text without audio, for extraction and as context.

A file has lines of UTT<TAB>TEXT or UTT TEXT, or one sentence a line. A blank line then ends a session (a paragraph, a
document).

Guarantees: utterances keep the order of the lines inside their session, unless the session pattern gives another.
Try: `stillhouse corpus import text stories.txt corpus.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..files.lines import headed_by_ids, read_lines
from .columns.names import AudioNames
from .common import Imported
from .table import USUAL

SECONDS = r"\d+(?:\.\d+)?"
# Forms that are no plain text: what each is, the lines of which all are so, and where else to read it.
FORMS = (
    ("JSON lines", re.compile(r"\s*\{.*\}\s*"), "read them with `corpus import nemo` or `corpus import csv`"),
    (
        "stm",
        re.compile(rf"\s*(?:;;.*|\S+\s+\S+\s+\S+\s+{SECONDS}\s+{SECONDS}(?:\s.*)?)"),
        "write a table with columns audio, start, end and text, and read it with `corpus import csv`",
    ),
    (
        "ctm, whose lines are words",
        re.compile(rf"\s*(?:;;.*|\S+\s+\S+\s+{SECONDS}\s+{SECONDS}\s+\S+(?:\s+\S+)?)"),
        "bring the transcripts to lines of UTT<TAB>TEXT",
    ),
    ("trn", re.compile(r"(?:;;.*|.*\((?=[^()\s]*[\d_/])[^()\s]+\)\s*)"), "bring the lines to UTT<TAB>TEXT"),
    ("UTT: TEXT or the like", re.compile(r"\(?(?=[^\s|:]*[\d_/])[^\s|:()]+[):|].*"), "bring the lines to UTT<TAB>TEXT"),
    ("subtitles", re.compile(r"(?:WEBVTT.*|\d+|.*-->.*)\s*"), "bring the texts to one line each"),
)


def import_text(
    files: Sequence[Path], *, ids: bool | None = None, session_pattern: str | None = None, split: str | None = None
) -> Imported:
    """Read text files. `ids` says whether lines start with ids. None: yes, if every line of a file has a tab.

    A space ends the id in a file without tabs. If `ids` is None and lines without tabs look like that, UsageError is
    raised. It is also raised for the lines of other formats, such as JSON, stm and trn, and for a table with a header.

    Other ids and sessions are made of the file's name and the line number, or of its path if two files have that name.
    A file of UTT<TAB>TEXT has no sessions without `session_pattern`.
    """
    result = Imported(Path(), session_pattern=session_pattern)
    names = AudioNames()
    for file in files:
        names.see(Path.cwd(), str(file))
    for file in files:
        name = names.name(Path.cwd(), str(file))
        lines = read_lines(file)
        content = [line for _, line in lines if line.strip()]
        tabbed = ids if ids is not None else all("\t" in line for line in content)
        if ids is None and content and (form := _other_form(content)) is not None:
            what, remedy = f"this is no plain text: its lines look like {form[0]}", f"{form[1]}, or say --no-ids"
            raise UsageError(what, where=file, remedy=remedy)
        if ids is None and not tabbed and len(content) > 1 and headed_by_ids(content):
            what = f"every line seems to start with an id, as {content[0].split()[0]!r}"
            raise UsageError(what, where=file, remedy="say whether they do: --ids or --no-ids")
        between = "\t" if any("\t" in line for line in content) else None  # None: white space, as in Kaldi's text
        width = len(str(len(lines)))
        block = 1
        for number, line in lines:
            where = f"{file}:{number}"
            if not line.strip():
                block = number + 1
                continue
            session = None
            if not tabbed:
                id, text = f"{name}-{number:0{width}d}", line.strip()
                session = f"{name}-{block:0{width}d}"
            elif between is None or "\t" in line:
                id, text = (part.strip() for part in [*line.split(between, 1), ""][:2])
            else:
                result.finding("line", where, "no tab between id and text")
                continue
            with result.line(where, id):
                session, order = result.session(id, session)
                result.add(where, order, id=id, text=text, session=session, split=split)
    return result.in_session_order()


def _other_form(lines: Sequence[str]) -> tuple[str, str] | None:
    """Return what lines are that are no plain text, and what to do, or None."""
    head = [cell.strip().strip('"').casefold() for cell in re.split(r"[\t,;|]", lines[0])]
    if len(head) > 1 and len(lines) > 1 and {*head} & {*USUAL["text"]} and {*head} & {*USUAL["id"], *USUAL["audio"]}:
        return "a table, and its first names the columns", "read it with `corpus import csv`"
    for name, pattern, remedy in FORMS:
        if name == "subtitles":
            if any("-->" in line for line in lines) and pattern.fullmatch(lines[0].strip()):
                return name, remedy
        elif all(pattern.fullmatch(line) for line in lines) and (len(lines) > 1 or name == "JSON lines"):
            return name, remedy
    return None

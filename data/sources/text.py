"""Text without audio, for extraction and as context.

A file has lines of UTT<TAB>TEXT or UTT TEXT, or one sentence a line. A blank line then ends a session (a paragraph, a
document).

Guarantees: utterances keep the order of the lines inside their session, unless the session pattern gives another.
Try: `stillhouse corpus import text stories.txt corpus.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..files.lines import headed_by_ids, read_lines
from .columns.names import AudioNames
from .common import Imported


def import_text(
    files: Sequence[Path], *, ids: bool | None = None, session_pattern: str | None = None, split: str | None = None
) -> Imported:
    """Read text files. `ids` says whether lines start with ids. None: yes, if every line of a file has a tab.

    A space ends the id in a file without tabs. If `ids` is None and lines without tabs look like that, UsageError is
    raised.

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

"""Text without audio, for extraction and as context.

A file has lines of UTT<TAB>TEXT, or one sentence a line. A blank line then ends a session (a paragraph, a document).

Guarantees: utterances keep the order of the lines inside their session, unless the session pattern gives another.
Try: `stillhouse corpus import text stories.txt corpus.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files.lines import read_lines
from .columns.names import AudioNames
from .common import Imported


def import_text(
    files: Sequence[Path], *, ids: bool | None = None, session_pattern: str | None = None, split: str | None = None
) -> Imported:
    """Read text files. `ids` says whether lines are UTT<TAB>TEXT. None: yes, if every line of a file has a tab.

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
        tabbed = ids if ids is not None else all("\t" in line for _, line in lines if line.strip())
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
            elif "\t" in line:
                id, text = (part.strip() for part in line.split("\t", 1))
            else:
                result.finding("line", where, "no tab between id and text")
                continue
            with result.line(where, id):
                session, order = result.session(id, session)
                result.add(where, order, id=id, text=text, session=session, split=split)
    return result.in_session_order()

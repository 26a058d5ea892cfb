"""Text without audio into a manifest: for extraction, and as context.

Two forms: UTT<TAB>TEXT, or one sentence a line, where a blank line ends a session (a paragraph, a document).

Invariant: the order of the lines is the order of the utterances inside their sessions, unless the session pattern
says another. Exercised by `stillhouse corpus import text FILE CORPUS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CorpusError
from ..files.lines import read_lines
from .common import Imported, SessionPattern, in_session_order


def import_text(
    files: Sequence[Path],
    *,
    ids: bool | None = None,
    session_pattern: str | None = None,
    split: str | None = None,
) -> Imported:
    """Read text files.

    ids: whether lines are UTT<TAB>TEXT; None: yes where every line of a file has a tab. Without ids they are made
    of the file's name and the number of the line, and so are the sessions. session_pattern: on the id, with named
    groups `session` and, if wanted, `order`; without it a file of UTT<TAB>TEXT has no sessions.
    """
    pattern = SessionPattern(session_pattern) if session_pattern else None
    result = Imported()
    for file in files:
        lines = read_lines(file)
        tabbed = ids if ids is not None else all("\t" in line for _, line in lines if line.strip())
        width = len(str(len(lines)))
        block = 1
        for number, line in lines:
            where = f"{file}:{number}"
            if not line.strip():
                block = number + 1
                continue
            if tabbed and "\t" not in line:
                result.finding("line", where, "no tab between id and text")
                continue
            if tabbed:
                id, text = (part.strip() for part in line.split("\t", 1))
                session = None
            else:
                id, text = f"{file.stem}-{number:0{width}d}", line.strip()
                session = f"{file.stem}-{block:0{width}d}"
            order = ""
            try:
                if pattern is not None:
                    session, order = pattern.read(id, session)
            except CorpusError as e:
                result.error("line", where, e, id)
            else:
                result.make(where, order, id=id, text=text, session=session, split=split)
    result.utterances = in_session_order(result)
    return result

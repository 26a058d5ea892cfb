"""Text files in: UTF-8 with or without BOM, any line ends.

Invariant: text that is not UTF-8 is a CorpusError that names file and line; nothing is replaced silently.
Exercised by every `stillhouse corpus import`.
"""

from __future__ import annotations

from pathlib import Path

from .errors import CorpusError


def read_text(path: Path) -> str:
    """The whole file as text with "\\n" line ends."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CorpusError(f"cannot read: {e.strerror}", where=path) from e
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError("the file is UTF-16", where=path, remedy="save it as UTF-8")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as e:
        line = 1 + data.count(b"\n", 0, e.start)
        raise CorpusError(
            f"byte 0x{data[e.start]:02x} is not UTF-8",
            where=f"{path}:{line}",
            remedy="save the file as UTF-8",
        ) from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number from 1, line) of the file; blank lines too. Only "\\n" and "\\r" end a line."""
    return list(enumerate(read_text(path).removesuffix("\n").split("\n"), start=1))

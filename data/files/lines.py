"""Text files in: UTF-8 with or without BOM, any line ends, gzip where a list may be long.

Invariant: text that is not UTF-8 is a CorpusError that names file and line; nothing is replaced silently.
Exercised by every `stillhouse corpus import`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CorpusError

LONGEST_LINE = 1 << 26  # bytes; no transcript is that long, and a file without line ends must not fill the memory


def read_text(path: Path) -> str:
    """The whole file as text with "\\n" line ends."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CorpusError(f"cannot read: {e.strerror}", where=path) from e
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _utf16(path)
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


def scan_lines(path: Path) -> Iterator[tuple[int, str | CorpusError]]:
    """(line number, line without its end, or why it is none) of every line that is not blank, one at a time.

    Reads gzip too, by its first bytes. Raises CorpusError for a file that cannot be read on.
    """
    for number, line in scan_bytes(path):
        if isinstance(line, CorpusError):
            yield number, line
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as e:
            yield (
                number,
                CorpusError(
                    f"bytes {e.start}–{e.end} of the line are not UTF-8",
                    where=f"{path}:{number}",
                    remedy="save the file as UTF-8",
                ),
            )
        else:
            yield number, text.rstrip("\r\n")


def scan_bytes(path: Path) -> Iterator[tuple[int, bytes | CorpusError]]:
    """As scan_lines, before decoding and with the line ends."""
    number = 0
    try:
        with path.open("rb") as plain:
            head = plain.peek(2)[:2]
            if head in (b"\xff\xfe", b"\xfe\xff"):
                raise _utf16(path)
            file: Any = gzip.GzipFile(fileobj=plain) if head == b"\x1f\x8b" else plain
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) > LONGEST_LINE:
                    raise CorpusError(
                        "the line has no end",
                        where=f"{path}:{number}",
                        expected=f"lines of at most {LONGEST_LINE >> 20} MB",
                    )
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        where = f"{path}:{number + 1}" if number else path
        raise CorpusError(f"cannot read: {why}", where=where, remedy="fetch or make the file again") from e


def parse_object(line: str | bytes, where: str) -> dict[str, Any] | CorpusError:
    """The JSON object of a line, or why it is none."""
    try:
        found = json.loads(line)
        if (b"\\ud" if isinstance(line, bytes) else "\\ud") in line.lower():  # type: ignore[operator]
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except RecursionError:
        return CorpusError("JSON nested too deeply", where=where, expected="one JSON object a line")
    except ValueError as e:
        return CorpusError(f"not JSON: {e}", where=where, expected="one JSON object a line")
    if not isinstance(found, dict):
        return CorpusError(f"JSON, but a {type(found).__name__}", where=where, expected="one JSON object a line")
    return found


def scan_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | CorpusError]]:
    """(line number, JSON object or why it is none) of every line that is not blank."""
    for number, line in scan_lines(path):
        yield number, line if isinstance(line, CorpusError) else parse_object(line, f"{path}:{number}")


def _utf16(path: Path) -> CorpusError:
    return CorpusError("the file is UTF-16", where=path, remedy="save it as UTF-8")

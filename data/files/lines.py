"""Text files: UTF-8 with or without BOM, any line ends, and gzip for lists.

Guarantees: text that is not UTF-8 is a CorpusError that names file and line. No character is replaced.
Try: `stillhouse corpus import text stories.txt corpus.jsonl`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import CorpusError

ID = re.compile(r"(?=.*[0-9_/]).*\w", re.DOTALL)  # no word of a text is like that, except for a number
LONGEST_LINE = 1 << 26  # bytes. No transcript is that long, and a file without line ends must not fill the memory.


def read_text(path: Path) -> str:
    """Return the whole file, plain or gzip, as text with "\\n" line ends. Raises CorpusError if it cannot be read."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as e:
        raise CorpusError(f"cannot read: {getattr(e, 'strerror', None) or e}", where=path) from e
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _utf16(path)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as e:
        line = 1 + data.count(b"\n", 0, e.start)
        what = f"byte 0x{data[e.start]:02x} is not UTF-8"
        raise CorpusError(what, where=f"{path}:{line}", remedy="save the file as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (line number from 1, line) of all lines, blank ones too. Only "\\n" and "\\r" end a line."""
    return list(enumerate(read_text(path).removesuffix("\n").split("\n"), start=1))


def scan_lines(path: Path) -> Iterator[tuple[int, str | CorpusError]]:
    """Yield (line number, line without its end, or its error) of every line that is not blank.

    Gzip is recognised by its first bytes. Raises CorpusError if the file cannot be read to its end.
    """
    for number, line in scan_bytes(path):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as e:
            what = f"bytes {e.start}–{e.end} of the line are not UTF-8"
            yield number, CorpusError(what, where=f"{path}:{number}", remedy="save the file as UTF-8")
        else:
            yield number, text.rstrip("\r\n")


def scan_bytes(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield what `scan_lines` does, before decoding and with the line ends."""
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
                    expected = f"lines of at most {LONGEST_LINE >> 20} MB"
                    raise CorpusError("the line has no end", where=f"{path}:{number}", expected=expected)
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        where = f"{path}:{number + 1}" if number else path
        raise CorpusError(f"cannot read: {why}", where=where, remedy="restore the file") from e


def parse_object(line: str, where: str) -> dict[str, Any] | CorpusError:
    """Return the JSON object of a line, or its error."""
    try:
        value = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()  # Half of a surrogate pair is no character.
        if isinstance(value, dict):
            return value
        what = f"JSON, but a {type(value).__name__}"
    except RecursionError:
        what = "JSON nested too deeply"
    except ValueError as e:
        what = f"not JSON: {e}"
    return CorpusError(what, where=where, expected="one JSON object a line")


def scan_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | CorpusError]]:
    """Yield (line number, JSON object or its error) of every line that is not blank, or of the items of one array."""
    return objects_in(path, scan_lines(path))


def objects_in(
    path: Path, lines: Iterable[tuple[int, str | CorpusError]]
) -> Iterator[tuple[int, dict[str, Any] | CorpusError]]:
    """Yield what `scan_objects` does, of lines that were read from `path`."""
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        return
    lines = chain([first], lines)
    if isinstance(first[1], str) and opens_array(first[1]):
        yield from _array_items(path, lines)
        return
    for number, line in lines:
        yield number, line if isinstance(line, CorpusError) else parse_object(line, f"{path}:{number}")


def opens_array(first: str) -> bool:
    """Return whether the first line of a file opens one JSON array of objects, instead of JSON lines."""
    return re.match(r"\s*\[\s*(\{|$)", first) is not None


def _array_items(
    path: Path, lines: Iterable[tuple[int, str | CorpusError]]
) -> Iterator[tuple[int, dict[str, Any] | CorpusError]]:
    whole: list[str] = []
    for number, line in lines:
        if isinstance(line, CorpusError):
            yield number, line
            return
        whole += [""] * (number - 1 - len(whole)) + [line]
    text = "\n".join(whole)
    at, number, decode, space = text.index("[") + 1, 1, json.JSONDecoder().raw_decode, re.compile(r"\s*,?\s*")
    counted = 0  # the line ends up to here are in `number`
    while True:
        match = space.match(text, at)
        at = match.end() if match else at
        number, counted = number + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        try:
            end = decode(text, at)[1]
        except (ValueError, RecursionError) as e:
            where = f"{path}:{number + text.count(chr(10), at, getattr(e, 'pos', at))}"
            what = f"not JSON: {getattr(e, 'msg', e)}"
            yield number, CorpusError(what, where=where, expected="one array of JSON objects, or one object a line")
            return
        yield number, parse_object(text[at:end], f"{path}:{number}")
        at = end
    if text[at + 1 :].strip():
        number += text.count("\n", at, len(text) - len(text[at + 1 :].lstrip()))
        yield number, CorpusError("text behind the end of the array", where=f"{path}:{number}", remedy="delete it")


def headed_by_ids(lines: Iterable[str]) -> bool:
    """Return whether each line seems to start with an id, as in Kaldi's text: no two with the same, all like utt_1."""
    heads = [line.split(None, 1)[0] for line in lines if line.strip()]
    return len(set(heads)) == len(heads) > 0 and all(ID.fullmatch(head) for head in heads)


def _utf16(path: Path) -> CorpusError:
    return CorpusError("the file is UTF-16", where=path, remedy="save it as UTF-8")

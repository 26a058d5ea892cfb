"""Standard streams that show the control characters of ids, texts and file names, and never send them to a terminal.

Guarantees: what is written has no control characters but tabs and line ends, and nothing that reorders text. JSON means
the same after it. A stream that is no terminal still gets `exact` data as it is.
Try: `pytest tests/data/files/test_streams.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .atomic import named
from .trouble import OUTPUT

# Control characters, line separators, what embeds, overrides or isolates a direction, and halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What progress bars begin with: return, delete the line, hide and show the cursor, go up
_CURSOR = re.compile("(?:[\r\n]|\x1b\\[(?:K|\\?25[lh]|\\d*A))*")


def escaped(text: str) -> str:
    r"""Return a text with unsafe characters as escapes: "\x1b" below U+0080, and "\u202e", as JSON writes it, above."""
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}"


class EscapedStream:
    """A text stream that writes `escaped` text. All else is the stream's own.

    Arguments:
        cursor: let a text begin with the cursor movements of a progress bar. Messages must begin with fixed words.
    """

    def __init__(self, stream: Any, cursor: bool = False) -> None:
        self.stream, self.cursor = stream, cursor
        if getattr(stream, "encoding", None) in ("ascii", "US-ASCII", "ANSI_X3.4-1968") and hasattr(
            stream, "reconfigure"
        ):
            stream.reconfigure(encoding="utf-8")  # click would open such a stream again and pass this one by.

    def write(self, text: str) -> int:
        """Write a text. Raises TypeError for bytes."""
        begin = _CURSOR.match(text).end() if self.cursor else 0  # type: ignore[union-attr]
        with self._named():
            self.stream.write(text[:begin] + escaped(text[begin:]))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered. An OSError names the stream, because the system does not."""
        with self._named():
            self.stream.flush()

    def _named(self) -> AbstractContextManager[None]:
        return named(Path(OUTPUT)) if not self.cursor else nullcontext()

    def writelines(self, lines: Iterator[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def exact(stream: Any) -> Any:
    """Return the stream for data that a program reads, as hypotheses in trn: only a terminal gets escapes."""
    return stream.stream if isinstance(stream, EscapedStream) and not stream.isatty() else stream


@contextmanager
def escaped_output() -> Iterator[None]:
    """Make the standard streams of this process `EscapedStream`s for a while."""
    before = sys.stdout, sys.stderr
    if not isinstance(sys.stdout, EscapedStream):
        sys.stdout = EscapedStream(sys.stdout)  # type: ignore[assignment]
    if not isinstance(sys.stderr, EscapedStream):
        sys.stderr = EscapedStream(sys.stderr, cursor=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

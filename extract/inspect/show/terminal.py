"""Text for a terminal: aligned columns, wrapped lines, sizes and shares.

Guarantees: columns are counted as a terminal counts them, Chinese and emoji as two. Text is wrapped to the terminal, or
to 80 columns in a pipe.
Try: `pytest tests/extract/inspect/test_first_look.py -k "columns or wrap"`.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence

COLUMNS = 80  # of a pipe
PROSE = 100  # longer lines are hard to read
LONG = 48  # a wider cell does not widen its column


def columns() -> int:
    """Return $COLUMNS, or the columns of the terminal, or 80 in a pipe."""
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size((COLUMNS, 24)).columns)
    return COLUMNS


def width(text: str) -> int:
    """Return the terminal columns of a text."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def pad(text: str, columns: int, right: bool = False) -> str:
    """Pad a text with spaces; `right` aligns it to the right."""
    space = " " * max(0, columns - width(text))
    return space + text if right else text + space


def table(rows: Sequence[Sequence[object]], *, right: str = "", header: Sequence[str] = ()) -> str:
    """Return aligned columns, those with "r" in `right` to the right. None is shown as "-".

    A cell of more than 48 columns shifts the rest of its own row only.
    """
    cells = _cells(rows, header)
    if not cells:
        return ""
    widths = [_width_of(row[i] for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    sides = right.ljust(len(widths), "l")
    lines = ["  ".join(pad(c, w, s == "r") for c, w, s in zip(row, widths, sides)).rstrip() for row in cells]
    return "\n".join(lines)


def _cells(rows: Sequence[Sequence[object]], header: Sequence[str]) -> list[list[str]]:
    return [["-" if c is None else printable(str(c)) for c in row] for row in ([header] if header else []) + [*rows]]


def _width_of(cells: Iterable[str]) -> int:
    return max((w for w in map(width, cells) if w <= LONG), default=0)


def tables(rows: Sequence[Sequence[object]], *, right: str, header: Sequence[str], keep: int, most: int) -> list[str]:
    """Return a table in several parts of at most `most` terminal columns, each with the first `keep` columns."""
    cells = _cells(rows, header)
    widths = [_width_of(row[i] for row in cells) + 2 for i in range(len(header))]
    parts = [[*range(keep)]]
    for i in range(keep, len(header)):
        if len(parts[-1]) > keep and sum(widths[k] for k in (*parts[-1], i)) > most + 2:
            parts.append([*range(keep)])
        parts[-1].append(i)
    return [
        table([[row[i] for i in p] for row in rows], right="".join(right[i] for i in p), header=[header[i] for i in p])
        for p in parts
    ]


def fitted(rows: Sequence[Sequence[object]], *, right: str, header: Sequence[str]) -> str:
    """Return a table that fits the terminal. If it is too wide, the first column has lines of its own above the others.

    Only a first cell that is wider than the terminal itself makes a longer line: names and ids are not broken.
    """
    whole, most = table(rows, right=right, header=header), columns()
    if all(width(line) <= most for line in whole.splitlines()):
        return whole
    names = [row[0] for row in _cells(rows, header)]
    rest = [row[1:] for row in rows]
    parts = tables(rest, right=right[1:].ljust(len(header) - 1, "l"), header=header[1:], keep=0, most=most - 2)
    stacked = (zip(names, part.split("\n"), strict=True) for part in parts)
    return "\n\n".join("\n".join(f"{name}\n  {line}".rstrip() for name, line in part) for part in stacked)


def wrap(text: str, most: int | None = None, indent: int = 0) -> str:
    """Break a text into lines of at most `most` columns (None: the terminal's, at most 100), and indent later lines."""
    most = min(columns(), PROSE) if most is None else most
    lines: list[str] = []
    for word in printable(text).split(" "):
        begun = bool(lines) and width(lines[-1]) > indent - 1
        if lines and (not begun or width(lines[-1]) + 1 + width(word) <= most):
            lines[-1] += f" {word}"
        else:
            lines.append(" " * indent + word if lines else word)
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Return names and values in two columns."""
    left = max(width(name) for name, _ in rows) + 2
    return "\n".join(wrap(pad(name, left) + value, indent=left) for name, value in rows)


def printable(text: str) -> str:
    """Escape control characters, because a transcript must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: int) -> str:
    """Return a number of bytes in powers of 1000, as in "1.5 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def share(part: int, whole: int) -> str:
    """Return a percentage that is 100 % only if nothing is missing, and 0 % only if everything is."""
    if whole == 0 or part == whole:
        return "100 %"
    if part == 0:
        return "0 %"
    return f"{min(99.9, max(0.1, 100 * part / whole)):.1f} %"

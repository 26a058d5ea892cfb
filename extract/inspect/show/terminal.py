"""How facts look in a terminal: plain aligned columns, sizes, shares; the same on a terminal and in a pipe.

Invariant: columns are counted as a terminal does, Chinese and emoji as two; what can be broken is broken to fit the
terminal, or 80 columns in a pipe. Exercised by: pytest tests/extract/inspect/test_first_look.py -k "columns or wrap".
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence

COLUMNS = 80  # where nobody says how many there are
PROSE = 100  # longer lines are hard to read
LONG = 48  # a cell that is wider does not widen its column for the others


def columns() -> int:
    """Of $COLUMNS or of the terminal; in a pipe 80."""
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size((COLUMNS, 24)).columns)
    return COLUMNS


def width(text: str) -> int:
    """Terminal columns that a text takes."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def pad(text: str, room: int, right: bool = False) -> str:
    space = " " * max(0, room - width(text))
    return space + text if right else text + space


def table(rows: Sequence[Sequence[object]], *, right: str = "", header: Sequence[str] = ()) -> str:
    """Aligned columns, two spaces between them. `right` has one letter a column: "r" aligns it to the right.

    None is shown as "-". A cell of more than 48 columns pushes the rest of its own row aside and no other row's.
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


def tables(rows: Sequence[Sequence[object]], *, right: str, header: Sequence[str], keep: int, room: int) -> list[str]:
    """The same as several tables of at most `room` terminal columns, each with the first `keep` columns."""
    cells = _cells(rows, header)
    widths = [_width_of(row[i] for row in cells) + 2 for i in range(len(header))]
    groups: list[list[int]] = []
    for i in range(keep, len(header)):
        if not groups or sum(widths[k] for k in (*range(keep), *groups[-1], i)) > room + 2:
            groups.append([])
        groups[-1].append(i)
    found = []
    for group in groups or [[]]:
        which = [*range(keep), *group]
        sides, names = "".join(right[i] for i in which), [header[i] for i in which]
        found.append(table([[row[i] for i in which] for row in rows], right=sides, header=names))
    return found


def wrap(text: str, room: int | None = None, indent: int = 0) -> str:
    """Lines of at most `room` terminal columns (None: the terminal's, at most 100), those after the first indented; a
    word that is longer stays whole.
    """
    room = min(columns(), PROSE) if room is None else room
    lines: list[str] = []
    for word in printable(text).split(" "):
        begun = bool(lines) and width(lines[-1]) > indent - 1
        if lines and (not begun or width(lines[-1]) + 1 + width(word) <= room):
            lines[-1] += f" {word}"
        else:
            lines.append(" " * indent + word if lines else word)
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of each, beside each other."""
    room = max(width(name) for name, _ in rows) + 2
    return "\n".join(wrap(pad(name, room) + value, indent=room) for name, value in rows)


def printable(text: str) -> str:
    """Control characters as escapes: a transcript must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def share(part: int, whole: int) -> str:
    """A percentage that says 100 % only when all is there, and 0 % only when nothing is."""
    if whole == 0 or part == whole:
        return "100 %"
    if part == 0:
        return "0 %"
    return f"{min(99.9, max(0.1, 100 * part / whole)):.1f} %"

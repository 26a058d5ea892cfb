"""How facts look in a terminal: plain aligned columns, sizes, shares; the same on a terminal and in a pipe.

Invariant: a column is as wide as its widest cell in terminal columns, Chinese and emoji counted as two.
Exercised by: pytest tests/inspect/test_text.py.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

COLUMNS = 80


def width(text: str) -> int:
    """Terminal columns that a text takes."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def pad(text: str, columns: int, right: bool = False) -> str:
    space = " " * max(0, columns - width(text))
    return space + text if right else text + space


def table(rows: Sequence[Sequence[object]], *, right: str = "", header: Sequence[str] = ()) -> str:
    """Aligned columns, two spaces between them. `right` has one letter a column: "r" aligns it to the right.

    None is shown as "-".
    """
    cells = [["-" if c is None else printable(str(c)) for c in row] for row in ([header] if header else []) + [*rows]]
    if not cells:
        return ""
    widths = [max(width(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    sides = right.ljust(len(widths), "l")
    lines = ["  ".join(pad(c, w, s == "r") for c, w, s in zip(row, widths, sides)).rstrip() for row in cells]
    return "\n".join(lines)


def wrap(text: str, columns: int = COLUMNS, indent: int = 0) -> str:
    """Lines of at most so many terminal columns, those after the first indented; a word that is longer stays whole."""
    lines: list[str] = []
    for word in printable(text).split(" "):
        begun = bool(lines) and width(lines[-1]) > indent - 1
        if lines and (not begun or width(lines[-1]) + 1 + width(word) <= columns):
            lines[-1] += f" {word}"
        else:
            lines.append(" " * indent + word if lines else word)
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of each, beside each other, in lines of 80 columns."""
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

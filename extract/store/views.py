"""Views: the representations that a store has of each transcript, and the patterns that name them.

Guarantees: an address, TEACHER/CONTEXT/LAYER, means one view. A pattern keeps the order of the views that it selects.
Try: `pytest tests/extract/store/test_reader.py -k view`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ...data.errors import UsageError
from .format.plan import Plan


@dataclass(frozen=True, order=True)
class View:
    """One representation of every transcript: (teacher, context, layer)."""

    teacher: str
    context: str
    layer: int

    @property
    def address(self) -> str:
        """TEACHER/CONTEXT/LAYER."""
        return f"{self.teacher}/{self.context}/{self.layer}"

    def __str__(self) -> str:
        return self.address

    def _repr_html_(self) -> str:
        return f"<code>{escape(self.address)}</code>"


@dataclass(frozen=True)
class Context:
    """A parsed context name. Each side asks for `left` or `right` tokens and gets fewer only where the session ends."""

    name: str
    left: int
    right: int
    block: bool

    @property
    def size(self) -> int:
        return self.left + self.right


def parse_context(name: str) -> Context:
    """Parse `alone`, `past:N`, `past:N+block`, `future:N` or `both:N`.

    Raises:
        UsageError: the name is none of the five.
    """
    if name == "alone":
        return Context(name, 0, 0, False)
    match = re.fullmatch(r"(past|future|both):([1-9]\d{0,5})(\+block)?", name)
    if match is None or (match[3] and match[1] != "past"):
        raise UsageError(f"unknown context {name!r}", expected="alone, past:N, past:N+block, future:N or both:N")
    n = int(match[2])
    return Context(name, n if match[1] != "future" else 0, n if match[1] != "past" else 0, bool(match[3]))


def matching(pattern: str, views: Sequence[View], plan: Plan) -> list[View]:
    """Return those of `views` that an address with globs means (see Store.resolve)."""
    parts = [*pattern.split("/"), "*", "*"][:3] if pattern.count("/") < 3 else []
    return [v for v in views if parts and _matches(v, plan.teachers[v.teacher].depth, *parts)]


def _matches(view: View, depth: int, teacher: str, context: str, layers: str) -> bool:
    if not (fnmatch.fnmatchcase(view.teacher, teacher) and fnmatch.fnmatchcase(view.context, context)):
        return False
    for word in layers.split(","):
        if word == "last" and view.layer == depth:
            return True
        if word.lstrip("-").isdigit():
            number = int(word)
            if view.layer == (number if number >= 0 else depth + 1 + number):
                return True
        elif fnmatch.fnmatchcase(str(view.layer), word):
            return True
    return False

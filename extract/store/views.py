"""Views: what a store has of a transcript, and the patterns that name them.

Invariant: an address, TEACHER/CONTEXT/LAYER, means one view; a pattern gives views in the order in which they were
given. Run: `pytest tests/extract/store/test_reader.py -k view`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from . import display as notebook
from .format.plan import Plan


@dataclass(frozen=True, order=True)
class View:
    """One representation of every transcript: (teacher, context, layer)."""

    teacher: str
    context: str
    layer: int

    @property
    def address(self) -> str:
        return f"{self.teacher}/{self.context}/{self.layer}"

    def __str__(self) -> str:
        return self.address

    def _repr_html_(self) -> str:
        return notebook.view_html(self)


def matching(pattern: str, views: Sequence[View], plan: Plan) -> list[View]:
    """Those of `views` that an address with globs means; see Store.resolve."""
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

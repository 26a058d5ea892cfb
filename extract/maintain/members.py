"""Who and what of stores goes into a new one, and whether two of them go together.

Invariant: whatever a context saw comes along, if only as text; two stores go together when nothing that decides a
number differs, and what both have is the same in both. Run: `stillhouse store merge A B OUT`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...data.errors import NoStoreError, StaleError
from ..pipeline.request import differences
from ..store.disk.layout import dtype_of
from ..store.reader import Store
from ..store.views import View


@dataclass(frozen=True)
class Included:
    """An utterance of the new store: which source has it, under which id, in which session; served or context alone."""

    source: int
    id: str
    session: int
    served: bool


def complete_views(store: Store, patterns: Sequence[str]) -> list[View]:
    """Errors: NoStoreError naming views that are not complete."""
    asked = store.resolve(patterns, store.planned_views) if patterns else store.planned_views
    missing = [v.address for v in asked if v not in store.views]
    if missing:
        raise NoStoreError(
            f"not complete: {', '.join(missing)}",
            where=store.address,
            remedy="finish their extraction, or name others with --views",
        )
    return asked


def choose_utterances(store: Store, wanted: Callable[[str], bool]) -> list[Included]:
    """The wanted utterances, in the order of the store, and whoever else is of their sessions, as context.

    Errors: StaleError where the store's teachers are at different states of the corpus.
    """
    tables = [_table(store, name) for name in store.plan.teachers]
    if any(t != tables[0] for t in tables[1:]):
        raise StaleError(
            f"its teachers {', '.join(store.plan.teachers)} are at different states of the corpus",
            where=store.address,
            remedy="extract the others with --refresh first",
        )
    found: list[Included] = []
    session: list[tuple[str, bool]] = []
    number, last = 0, None
    for id_, _, group, served in [*tables[0], ("", 0, -1, False)]:
        if group != last:
            if any(s for _, s in session):
                found += [Included(0, i, number, s) for i, s in session]
                number += 1
            session, last = [], group
        session.append((id_, served and wanted(id_)))
    return found


def _table(store: Store, name: str) -> list[tuple[str, int, int, bool]]:
    """(id, hash of the text, session, served) of a teacher's corpus, in its order."""
    index = store.index_of(name)
    order, live = index.order.tolist(), index.live[index.order].tolist()
    texts = index.text_hash[index.order].tolist()
    return [(index.id(r), h, s, v) for r, h, s, v in zip(order, texts, index.session_of.tolist(), live)]


def check_settings(stores: list[Store], views: list[list[View]]) -> None:
    """Errors: StaleError naming in words what differs."""
    a, b = stores
    only = [[v.address for v in x if v not in y] for x, y in (views, views[::-1])]
    if only[0] or only[1]:
        words = [f"only {s.path} has {', '.join(names)}" for s, names in zip(stores, only) if names]
        raise StaleError("; ".join(words), remedy="extract what is missing, or name views that both have with --views")
    for name in dict.fromkeys(v.teacher for v in views[0]):
        differ = differences(a.plan.teachers[name], b.plan.teachers[name])
        if differ:
            raise StaleError(f"teacher {name!r} of the two differs: {'; '.join(differ)}", where=f"{a.path}, {b.path}")
        if dtype_of(a.plan.teachers[name].dtype).scaled:
            mine = [v for v in views[0] if v.teacher == name]
            for v in mine:
                if not all(np.array_equal(x, y) for x, y in zip(a.norm(v), b.norm(v))):
                    raise StaleError(
                        f"int8 states of {v} stand on other norms in each",
                        where=f"{a.path}, {b.path}",
                        remedy="extract one of the corpora into the other's store",
                    )


def only_in_second(stores: list[Store], mine: list[Included], views: list[View]) -> list[Included]:
    """Sessions of the second store that the first does not have. Errors: StaleError where they have some, but not all,
    of a session in common, or the same one otherwise.
    """
    a, b = stores
    have = {m.id for m in mine if m.served}
    theirs = choose_utterances(b, lambda _: True)
    sessions: dict[int, list[Included]] = {}
    for m in theirs:
        sessions.setdefault(m.session, []).append(m)
    found: list[Included] = []
    number = 1 + max((m.session for m in mine), default=-1)
    for members in sessions.values():
        ids = [m.id for m in members if m.served]
        common = [i for i in ids if i in have]
        if not common:
            found += [replace(m, source=1, session=number) for m in members]
            number += 1
            continue
        if len(common) < len(ids):
            new = next(i for i in ids if i not in have)
            raise StaleError(
                f"{common[0]} is in both, and {new} of the same session only in one",
                where=f"{a.path}, {b.path}",
                remedy="extract the whole corpus into one of them, with --refresh",
            )
        _check_same(a, b, ids, views)
    return found


def _check_same(a: Store, b: Store, ids: list[str], views: list[View]) -> None:
    for name in dict.fromkeys(v.teacher for v in views):
        unlike = a.text_hash(ids, name) != b.text_hash(ids, name)
        if unlike.any():
            raise StaleError(f"{ids[int(unlike.argmax())]} has another text in each", where=f"{a.path}, {b.path}")
    for view in views:
        unlike = a.input_hash(ids, view) != b.input_hash(ids, view)
        if unlike.any():
            i = ids[int(unlike.argmax())]
            raise StaleError(f"{i} saw another context in each", where=f"{view}: {a.path}, {b.path}")

"""Choose the utterances and views of a combined store, and check that two stores are compatible.

Guarantees: every utterance that a context saw is included, if only as text. Two stores are compatible if no setting
that decides a number differs, and if utterances that both have are the same in both.
Try: `stillhouse store merge A B OUT`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from ...data.errors import NoStoreError, StaleError
from ..pipeline.request import differences
from ..store.disk.layout import dtype_of
from ..store.reader import Store
from ..store.views import View


@dataclass(frozen=True)
class Included:
    """An utterance of the new store."""

    source: int  # index of the store that it comes from
    id: str
    session: int  # number of its session in the new store
    served: bool  # whether it can be read; otherwise it is context alone


def complete_views(store: Store, patterns: Sequence[str]) -> list[View]:
    """Return the views that match the patterns, or all views. Raises NoStoreError if one of them is not complete."""
    views = store.resolve(patterns, store.planned_views) if patterns else store.planned_views
    missing = [v.address for v in views if v not in store.views]
    if missing:
        remedy = "finish their extraction, or name others with --views"
        raise NoStoreError(f"not complete: {', '.join(missing)}", where=store.address, remedy=remedy)
    return views


def choose_utterances(store: Store, chosen: Callable[[str], bool]) -> list[Included]:
    """Return the chosen utterances in the order of the store, with the others of their sessions as context.

    Raises StaleError if the store's teachers have different tables of utterances.
    """
    # A speech teacher stays as it is where only texts or sessions change, so its table counts without them.
    names = sorted(store.plan.teachers, key=lambda name: store.plan.teachers[name].is_speech)
    tables = [_table(store, name) for name in names]
    speech = [store.plan.teachers[name].is_speech for name in names]
    if any((_ids(t) != _ids(tables[0])) if s else t != tables[0] for t, s in zip(tables, speech)):
        what = f"its teachers {', '.join(store.plan.teachers)} are at different states of the corpus"
        raise StaleError(what, where=store.address, remedy="extract the others with --refresh first")
    included: list[Included] = []
    number = 0
    for _, session in groupby(tables[0], key=lambda row: row[2]):
        members = [Included(0, id_, number, served and chosen(id_)) for id_, _, _, served in session]
        if any(m.served for m in members):
            included += members
            number += 1
    return included


def _table(store: Store, name: str) -> list[tuple[str, int, int, bool]]:
    """(id, hash of the text, session, whether it can be read) of a teacher's utterances, in the order of the corpus."""
    index = store.index_of(name)
    order, live = index.order.tolist(), index.live[index.order].tolist()
    texts = index.text_hash[index.order].tolist()
    return [(index.id(r), h, s, v) for r, h, s, v in zip(order, texts, index.session_of.tolist(), live)]


def _ids(table: list[tuple[str, int, int, bool]]) -> set[tuple[str, bool]]:
    return {(id_, served) for id_, _, _, served in table}


def check_compatible(stores: list[Store], views: list[list[View]]) -> None:
    """Raise StaleError, with what differs, unless two stores have the same views with the same settings."""
    a, b = stores
    where = f"{a.path}, {b.path}"
    only = [[v.address for v in x if v not in y] for x, y in (views, views[::-1])]
    if only[0] or only[1]:
        words = [f"only {s.path} has {', '.join(names)}" for s, names in zip(stores, only) if names]
        raise StaleError("; ".join(words), remedy="extract what is missing, or name views that both have with --views")
    for name in dict.fromkeys(v.teacher for v in views[0]):
        differ = differences(a.plan.teachers[name], b.plan.teachers[name])
        if differ:
            raise StaleError(f"teacher {name!r} of the two differs: {'; '.join(differ)}", where=where)
    for v in views[0]:
        dtype = a.plan.teachers[v.teacher].dtype
        same = all(np.array_equal(*pair) for pair in zip(a.norms_stored(v), b.norms_stored(v)))
        if dtype_of(dtype).quantised and not same:
            by = "codebooks or norms" if dtype_of(dtype).codes else "norms"
            raise StaleError(
                f"{dtype} states of {v} are standardised by other {by} in each",
                where=where,
                remedy="extract one of the corpora into the other's store",
            )


def only_in_second(stores: list[Store], first: list[Included], views: list[View]) -> list[Included]:
    """Return the sessions of the second store that the first one does not have.

    Raises StaleError if the stores share a part of a session, or a session that differs.
    """
    a, b = stores
    readable = {m.id for m in first if m.served}
    included: list[Included] = []
    number = 1 + max((m.session for m in first), default=-1)
    for _, session in groupby(choose_utterances(b, lambda _: True), key=lambda m: m.session):
        members = list(session)
        ids = [m.id for m in members if m.served]
        common = [i for i in ids if i in readable]
        if not common:
            included += [replace(m, source=1, session=number) for m in members]
            number += 1
            continue
        if len(common) < len(ids):
            new = next(i for i in ids if i not in readable)
            raise StaleError(
                f"{common[0]} is in both, and {new} of the same session only in one",
                where=f"{a.path}, {b.path}",
                remedy="extract the whole corpus into one of them, with --refresh",
            )
        _check_same(a, b, ids, views)
    return included


def _check_same(a: Store, b: Store, ids: list[str], views: list[View]) -> None:
    for name in dict.fromkeys(v.teacher for v in views if not a.plan.teachers[v.teacher].is_speech):
        unlike = a.text_hash(ids, name) != b.text_hash(ids, name)
        if unlike.any():
            raise StaleError(f"{ids[int(unlike.argmax())]} has another text in each", where=f"{a.path}, {b.path}")
    for view in views:
        unlike = a.input_hash(ids, view) != b.input_hash(ids, view)
        if unlike.any():
            i = ids[int(unlike.argmax())]
            other = "has other audio" if a.plan.teachers[view.teacher].is_speech else "saw another context"
            raise StaleError(f"{i} {other} in each", where=f"{view}: {a.path}, {b.path}")

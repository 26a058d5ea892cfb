"""Read a whole store in batches of bounded size.

Guarantees: every utterance that all views hold, from one text, comes once, in the order of the store, in which reading
is sequential. One batch is in memory.
Try: `pytest tests/extract/adapters/test_adapters.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from ...data.errors import StaleError, first_few
from .gather import Gathered
from .reader import Store
from .views import View


def batches(
    store: Store,
    views: Sequence[View],
    ids: Sequence[str] | None = None,
    tokens: int = 16_384,
    dtype: str | None = None,
) -> Iterator[tuple[list[str], Gathered]]:
    """Yield (ids, batch), each of about `tokens` rows of the first view's teacher, and at least one utterance.

    Arguments:
        ids: these utterances, in this order; None: all that have states in every view.
        dtype: as in `Store.gather`, whose errors may be raised.

    Raises:
        StaleError: teachers have other texts of an utterance.
    """
    ids = available_ids(store, views) if ids is None else require_one_text(store, ids, views)
    teacher = views[0].teacher
    lengths = store.row_lengths(teacher, store.rows(ids, teacher)) if len(ids) else np.zeros(0, np.int32)
    number = (np.cumsum(lengths, dtype=np.int64) - lengths) // max(1, tokens)
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(ids)]
    for first, last in pairwise(edges):
        if last > first:
            part = list(ids[first:last])
            yield part, store.gather(part, views, dtype)


def require_one_text(store: Store, ids: Sequence[str], views: Sequence[View]) -> Sequence[str]:
    """Return `ids`. Raises StaleError, with their names, if the views' teachers have other texts of some."""
    teachers = list(dict.fromkeys(view.teacher for view in views))
    other = [i for i, same in zip(ids, store.same_text(ids, teachers)) if not same] if len(teachers) > 1 else []
    if other:
        for teacher in teachers:
            store.rows(other, teacher)  # An utterance that a teacher lacks is another error.
        what = f"{' and '.join(teachers)} have other texts of {first_few(other)}"
        remedy = "stillhouse extract CORPUS STORE --refresh, with the teacher that is behind"
        raise StaleError(what, where=store.address, remedy=remedy)
    return ids


def available_ids(store: Store, views: Sequence[View]) -> list[str]:
    """Return the utterances that have states in every view, in the order of the store."""
    ids = store.utterance_ids
    held = [store.has(ids, view) for view in views]
    held.append(store.same_text(ids, list(dict.fromkeys(view.teacher for view in views))))
    return [ids[i] for i in np.flatnonzero(np.logical_and.reduce(held))]

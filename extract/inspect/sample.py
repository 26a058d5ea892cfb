"""Samples of utterances, and their states in blocks of bounded size.

Guarantees: one block of states is in memory at a time, whatever the store's size. A sample depends only on the store,
the seed and its size.
Try: `stillhouse inspect stats STORE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from ...data.errors import NoStoreError, StoreError, first_few
from ..store import Gathered, Store, View
from ..store.disk.layout import dtype_of
from ..store.verify.verify import damaged_items

BLOCK_TOKENS = 16_384
BLOCK_NUMBERS = 1 << 23  # most numbers of a block
SAMPLE_NUMBERS = 1 << 28  # numbers of all views together, which are read in seconds
LEAST_TOKENS = 1000  # of a view, however many views there are
OnProgress = Callable[[View], None]


def ignore(_: object) -> None:
    """The callback of a caller that wants no progress."""


def undamaged(store: Store, views: Sequence[View]) -> tuple[list[View], list[str]]:
    """Return the views without a damaged file, and the damage of the others. No states are read."""
    damage: dict[View, str] = {}
    for item, findings in damaged_items(store, data=False):
        for finding in findings:
            for layer in item.layers:
                view = View(item.teacher, item.context, layer)
                if finding.where.startswith(f"{view.address} "):
                    damage.setdefault(view, f"{view.address}: {finding.what}")
    for view in views:
        if view not in damage and dtype_of(store.plan.teachers[view.teacher].dtype).quantised:
            try:
                store.norms_stored(view)
            except StoreError as e:
                damage[view] = f"{view.address}: {e.what}"
    return [v for v in views if v not in damage], [text for v, text in damage.items() if v in views]


def quantisation_errors(store: Store, view: View) -> dict[str, Any]:
    """Return the errors of an int8 or pq view, under the names that they have in JSON."""
    loss = store.loss(view)
    stored = "pq" if dtype_of(store.plan.teachers[view.teacher].dtype).codes else "int8"
    errors: dict[str, Any] = {}
    for kind in ("int8", "pq"):
        relative, standardised = (None, None) if loss is None or kind != stored else astuple(loss)
        errors |= {f"{kind}_error": relative, f"{kind}_error_standardised": standardised}
    return errors


def available_rows(store: Store, views: Sequence[View]) -> np.ndarray:
    """Return the utterances that have tokens and are committed in every view, from one text: int64 [≤ U], ascending.

    They are rows of the first view's teacher. Another teacher may have the same text in another row, so go by `ids_of`.
    """
    teachers = list(dict.fromkeys(v.teacher for v in views))
    rows = np.arange(len(store.index)) if not teachers else np.flatnonzero(store.lengths(teachers[0]) > 0)
    for view in views:
        if view.teacher == teachers[0]:
            rows = rows[store.available(view)[rows]]
    if len(teachers) > 1:
        ids = ids_of(store, rows)
        held = store.same_text(ids, teachers)
        for view in views:
            if view.teacher != teachers[0]:
                held &= store.has(ids, view)
        rows = rows[held]
        for teacher in teachers[1:]:
            own = store.index_of(teacher).rows(ids_of(store, rows))
            rows = rows[store.lengths(teacher)[own] > 0]
    return rows


def ids_of(store: Store, rows: Iterable[int]) -> list[str]:
    """Return the utterance id of each row."""
    return [store.index.id(int(r)) for r in rows]


def sample_rows(store: Store, views: Sequence[View], tokens: int | None, seed: int = 0) -> np.ndarray:
    """Draw utterances until they have `tokens` tokens of the first view's teacher (None: all). Rows are ascending."""
    rows = available_rows(store, views)
    if not len(rows):
        in_all, remedy = ("all of ", "name fewer views with --view, or ") if len(views) > 1 else ("", "")
        what = f"no utterance has states in {in_all}{first_few([v.address for v in views])}"
        raise NoStoreError(what, where=store.address, remedy=f"{remedy}finish the extraction")
    return rows if tokens is None else draw(store, views[0].teacher, rows, tokens, seed)


def draw(store: Store, teacher: str, rows: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Draw from `rows` until they have `tokens` tokens, or all are drawn. Returns rows, ascending."""
    order = np.random.default_rng(seed).permutation(rows)
    length = store.lengths(teacher)[order]
    return np.sort(order[: int(np.searchsorted(np.cumsum(length), tokens)) + 1])


def sample_size(store: Store, views: Sequence[View], most: int) -> int:
    """Return the tokens of each view that are read in seconds: `most`, or fewer if the views are wide or many."""
    numbers = sum(store.plan.teachers[v.teacher].width for v in views)
    return min(most, max(LEAST_TOKENS, SAMPLE_NUMBERS // max(1, numbers)))


def representative(views: Sequence[View], most: int) -> list[View]:
    """Choose at most `most` views, evenly apart among the layers of each teacher and context, or among all of them."""
    groups: dict[tuple[str, str], list[View]] = {}
    for view in views:
        groups.setdefault((view.teacher, view.context), []).append(view)
    if len(views) <= most:
        return list(views)
    if 2 * len(groups) > most:
        return _evenly(list(views), most)
    return [view for group in groups.values() for view in _evenly(group, most // len(groups))]


def _evenly(views: list[View], most: int) -> list[View]:
    return [views[i] for i in np.unique(np.linspace(0, len(views) - 1, min(most, len(views))).round().astype(int))]


def blocks(store: Store, teacher: str, rows: np.ndarray, tokens: int | None = None) -> list[np.ndarray]:
    """Cut rows into runs of about `tokens` tokens. None: as many as a block of states may have."""
    if tokens is None:
        tokens = max(1, min(BLOCK_TOKENS, BLOCK_NUMBERS // store.plan.teachers[teacher].width))
    number = np.cumsum(store.lengths(teacher)[rows], dtype=np.int64) // tokens
    return np.split(rows, np.flatnonzero(np.diff(number)) + 1) if len(rows) else []


def read_states(store: Store, view: View, ids: Sequence[str]) -> Gathered:
    """Read the states of utterances, and unmap their files."""
    gathered = store.gather(ids, [view])
    store.unmap()
    return gathered


def first_tokens(lengths: np.ndarray) -> np.ndarray:
    """Return which packed tokens are the first of their utterance, bool [N]."""
    first = np.zeros(int(lengths.sum()), bool)
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return first


def counted(store: Store, teacher: str, lengths: np.ndarray) -> np.ndarray:
    """Return which of a teacher's packed tokens count in comparisons, bool [N]: a decoder's first tokens do not.

    A causal model gives the first token that it sees a state of its own, whose norm can be 160 times that of others.
    That state is almost the same in each text, so it would decide every cosine and CKA. Only an utterance's own first
    token can be the first of a pass: later windows of a long text keep none of their first tokens. In an encoder, a
    special token has that part.
    """
    first = first_tokens(lengths)
    return ~first if is_decoder(store, teacher) else np.ones(len(first), bool)


def is_decoder(store: Store, teacher: str) -> bool:
    """Return whether a teacher is causal, so that the state of a first token is not comparable."""
    return store.plan.teachers[teacher].kind == "decoder"


def locate(rows: np.ndarray, lengths: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the token number of places `at` in packed tokens of utterances with these rows and lengths."""
    ends = np.cumsum(lengths, dtype=np.int64)
    of = np.searchsorted(ends, at, side="right")
    return rows[of], at - (ends - lengths)[of]

"""Reading states for people: samples of utterances, float32 blocks of bounded size.

Invariant: no more than a block of states is in memory, whatever the store's size, and a sample depends on the store,
the seed and its size alone. Exercised by: `stillhouse inspect stats STORE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...data.errors import NoStoreError
from ..store import Store, View, to_float32
from ..store.verify import damaged_units

BLOCK_TOKENS = 16_384


def whole(store: Store, views: Sequence[View]) -> tuple[list[View], list[str]]:
    """Views of which no committed file is damaged as far as can be told without reading states; the others' damage."""
    damage: dict[View, str] = {}
    for unit, found in damaged_units(store, data=False):
        for finding in found:
            for layer in unit.layers:
                view = View(unit.teacher, unit.context, layer)
                if finding.where.startswith(f"{view.address} "):
                    damage.setdefault(view, f"{view.address}: {finding.what}")
    return [v for v in views if v not in damage], [text for v, text in damage.items() if v in views]


def held_rows(store: Store, views: Sequence[View]) -> np.ndarray:
    """Rows of the utterances that have tokens and are committed in every view: int64 [≤ U], ascending."""
    held = np.ones(len(store.index), bool)
    for teacher in dict.fromkeys(v.teacher for v in views):
        held &= store.lengths(teacher) > 0
    for view in views:
        held &= store.held(view)
    return np.flatnonzero(held)


def sample_rows(store: Store, views: Sequence[View], tokens: int | None, seed: int = 0) -> np.ndarray:
    """Rows of utterances drawn until they have `tokens` tokens of the first view's teacher (None: all), ascending.

    Errors: NoStoreError where the views have no utterance in common.
    """
    rows = held_rows(store, views)
    if not len(rows):
        listed = ", ".join(v.address for v in views)
        raise NoStoreError(f"no utterance has states in {listed}", where=store.path, remedy="finish the extraction")
    if tokens is None:
        return rows
    order = np.random.default_rng(seed).permutation(rows)
    length = store.lengths(views[0].teacher)[order]
    return np.sort(order[: int(np.searchsorted(np.cumsum(length), tokens)) + 1])


def blocks(store: Store, view: View, rows: np.ndarray, block_tokens: int = BLOCK_TOKENS) -> Iterator[tuple]:
    """(rows of the block [b], lengths int32 [b], states float32 [Σ, D]) over whole utterances."""
    dtype = store.teacher(view.teacher).dtype
    for part in cut(store, view.teacher, rows, block_tokens):
        gathered = store.gather([store.index.id(int(r)) for r in part], [view])
        yield part, gathered.lengths[view.teacher], to_float32(gathered.states[view], dtype)


def cut(store: Store, teacher: str, rows: np.ndarray, block_tokens: int) -> list[np.ndarray]:
    """Runs of rows of about `block_tokens` tokens each."""
    length = store.lengths(teacher)[rows]
    number = np.cumsum(length, dtype=np.int64) // block_tokens
    return np.split(rows, np.flatnonzero(np.diff(number)) + 1) if len(rows) else []

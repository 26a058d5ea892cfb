"""Reading states for people: samples of utterances, float32 blocks of bounded size.

Invariant: no more than a block of states is in memory, whatever the store's size, and a sample depends on the store,
the seed and its size alone. Exercised by: `stillhouse inspect stats STORE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...data.errors import NoStoreError, first_few
from ..store import Store, View, to_float32
from ..store.remote.paths import mirror_of
from ..store.verify.verify import damaged_items

BLOCK_TOKENS = 16_384
BLOCK_NUMBERS = 1 << 23  # of one block, if that is less
SAMPLE_NUMBERS = 1 << 28  # of all views together: seconds, whatever the store's size
LEAST_TOKENS = 1000  # a view, though the views be many


def whole(store: Store, views: Sequence[View]) -> tuple[list[View], list[str]]:
    """Views of which no committed file is damaged as far as can be told without reading states; the others' damage."""
    damage: dict[View, str] = {}
    for unit, found in damaged_items(store, data=False):
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
        held &= store.available(view)
    return np.flatnonzero(held)


def sample_rows(store: Store, views: Sequence[View], tokens: int | None, seed: int = 0) -> np.ndarray:
    """Rows of utterances drawn until they have `tokens` tokens of the first view's teacher (None: all), ascending.

    Errors: NoStoreError where the views have no utterance in common.
    """
    rows = held_rows(store, views)
    if not len(rows):
        raise NoStoreError(
            f"no utterance has states in {'all of ' if len(views) > 1 else ''}{first_few([v.address for v in views])}",
            where=store.address,
            remedy="name fewer views with --view, or finish the extraction"
            if len(views) > 1
            else "finish the extraction",
        )
    if tokens is None:
        return rows
    order = np.random.default_rng(seed).permutation(rows)
    length = store.lengths(views[0].teacher)[order]
    return np.sort(order[: int(np.searchsorted(np.cumsum(length), tokens)) + 1])


def affordable(store: Store, views: Sequence[View], most: int) -> int:
    """Tokens a view of a sample that takes seconds: `most`, but fewer where the views are wide or many."""
    numbers = sum(store.plan.teachers[v.teacher].width for v in views)
    return min(most, max(LEAST_TOKENS, SAMPLE_NUMBERS // max(1, numbers)))


def spread(views: Sequence[View], most: int) -> list[View]:
    """At most so many of the views, in their order: of each teacher and context layers evenly apart, its first and
    last among them; where there are more contexts than that, evenly from the whole list.
    """
    groups: dict[tuple[str, str], list[View]] = {}
    for view in views:
        groups.setdefault((view.teacher, view.context), []).append(view)
    if len(views) <= most:
        return list(views)
    if 2 * len(groups) > most:
        return _evenly(list(views), most)
    share = most // len(groups)
    return [view for group in groups.values() for view in _evenly(group, share)]


def _evenly(views: list[View], most: int) -> list[View]:
    return [views[i] for i in np.unique(np.linspace(0, len(views) - 1, min(most, len(views))).round().astype(int))]


def blocks(store: Store, view: View, rows: np.ndarray, block_tokens: int = BLOCK_TOKENS) -> Iterator[tuple]:
    """(rows of the block [b], lengths int32 [b], states float32 [Σ, D]) over whole utterances."""
    dtype = store.teacher(view.teacher).dtype
    for part in cut(store, view.teacher, rows, states_at_once(store, view.teacher, block_tokens)):
        gathered = store.gather([store.index.id(int(r)) for r in part], [view])
        unmap(store)
        yield part, gathered.lengths[view.teacher], to_float32(gathered.states[view], dtype)


def states_at_once(store: Store, teacher: str, most: int) -> int:
    """Tokens of a block of states: `most`, but fewer where they are wide."""
    return max(1, min(most, BLOCK_NUMBERS // store.plan.teachers[teacher].width))


def unmap(store: Store) -> None:
    """Give back the pages of files that were read through their map; they count as this process's memory."""
    if mirror_of(store.paths.root) is None:
        store.close()


def cut(store: Store, teacher: str, rows: np.ndarray, block_tokens: int) -> list[np.ndarray]:
    """Runs of rows of about `block_tokens` tokens each."""
    length = store.lengths(teacher)[rows]
    number = np.cumsum(length, dtype=np.int64) // block_tokens
    return np.split(rows, np.flatnonzero(np.diff(number)) + 1) if len(rows) else []

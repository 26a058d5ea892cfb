"""How `store gc` empties and fills shards, without files, so that many stores can be tried."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillhouse.extract.pipeline.layout import compact, cut_shards, is_small, pack_shards

ROWS = 64


def test_small_runs_are_put_together_by_hand() -> None:
    """Each utterance is a run: 10, 20 and 15 are small alone, and not together."""
    lengths = np.array([10, 60, 20, 50, 15, 60, 33])
    assert [s.rows for s in cut_shards(lengths, ROWS)[0]] == lengths.tolist()
    assert [p.tolist() for p in pack_shards(lengths, ROWS)] == [[1], [3], [0, 2, 4], [5], [6]]
    assert [p.tolist() for p in pack_shards(lengths[:4], ROWS)] == [[1], [3], [0, 2]]
    assert pack_shards(lengths[:0], ROWS) == []


def test_full_shards_stay_by_hand() -> None:
    """A shard with deleted rows is emptied. A small one is only if another small one is left."""
    shard, lengths = np.array([0, 0, 1, 2]), np.array([30, 30, 64, 10])
    held = {0: 60, 1: 64, 2: 10}
    assert compact(shard, lengths, held, ROWS) == ([], [])
    go, packed = compact(shard[1:], lengths[1:], held, ROWS)  # 30 of 60 are left, 10 are in another shard
    assert go == [0, 2] and [p.tolist() for p in packed] == [[0, 2]]
    go, packed = compact(shard, lengths, held | {1: 70}, ROWS)
    assert go == [1] and [p.tolist() for p in packed] == [[2]]
    go, packed = compact(shard[2:], lengths[2:], held, ROWS)  # 0 has no live utterance
    assert go == [0] and packed == []
    assert compact(shard[:0], lengths[:0], {4: 0}, ROWS) == ([], [])


@st.composite
def stores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Draw shards as extraction, refreshes and deletions leave them, with live utterances in any order."""
    shard, lengths, held = [], [], {}
    for number in range(draw(st.integers(0, 8))):
        mine = draw(st.lists(st.integers(1, ROWS), max_size=6))
        while sum(mine) > ROWS:
            mine.pop()
        alive = [draw(st.integers(0, 9)) > 0 for _ in mine]
        held[3 * number] = sum(mine)
        shard += [3 * number] * sum(alive)
        lengths += [n for n, a in zip(mine, alive) if a]
    order = draw(st.permutations(range(len(lengths))))
    return np.array(shard, np.int64)[list(order)], np.array(lengths, np.int64)[list(order)], held


@settings(max_examples=400, deadline=None)
@given(stores())
@example((np.array([0, 3, 6, 9]), np.array([10, 60, 10, 60]), {0: 10, 3: 61, 6: 10, 9: 60}))
@example((np.array([0, 3, 3]), np.array([10, 20, 24]), {0: 10, 3: 64}))
def test_once_is_enough(store: tuple[np.ndarray, np.ndarray, dict[int, int]]) -> None:
    """All live utterances of emptied shards are kept once, no shard is too full, and a second call empties none."""
    shard, lengths, held = store
    go, packed = compact(shard, lengths, held, ROWS)
    moved = np.concatenate([np.zeros(0, np.int64), *packed])
    assert sorted(moved.tolist()) == np.flatnonzero(np.isin(shard, go)).tolist()
    after = {s: n for s, n in held.items() if s not in go}
    where = shard.copy()
    for number, part in enumerate(packed, start=100):
        where[part], after[number] = number, int(lengths[part].sum())
        assert 0 < after[number] <= ROWS
    assert all(after[s] == int(lengths[where == s].sum()) for s in after)
    assert sum(is_small(n, ROWS) for n in after.values()) <= 1
    assert compact(where, lengths, after, ROWS) == ([], [])
    # No more is moved than needed: emptied shards had deleted rows or were small.
    assert all(int(lengths[shard == s].sum()) < held[s] or is_small(held[s], ROWS) for s in go)

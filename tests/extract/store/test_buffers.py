"""Memory that goes into the next batch: never while anyone holds it, always afterwards, and no more than is allowed."""

from __future__ import annotations

import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.extract.store import Store, View
from stillhouse.extract.store.read import buffers as memory
from stillhouse.extract.store.read.buffers import BATCH_BUFFERS, HUGE, SMALLEST, BufferPool

VIEWS = [View("bert", "alone", k) for k in (0, 1, 2)]
HELD = {
    "itself": lambda a: a,
    "a row": lambda a: a[-1:],
    "a view of a view": lambda a: a.reshape(-1)[1:][-5:],
    "its bytes": lambda a: a.reshape(-1).view(np.uint8)[-3:],
    "a tensor": lambda a: torch.from_numpy(a)[-1],
    "a buffer": lambda a: memoryview(a),
}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from(sorted(HELD)), st.integers(0, 3)), max_size=20))
def test_what_is_held_is_not_handed_out(steps: list[tuple[int, str, int]]) -> None:
    """Whatever part of an array is held, and by whom: its content stays."""
    pool, held = BufferPool(8 << 20), []
    for number, (rows, how, drop) in enumerate(steps):
        array = pool.empty((rows, SMALLEST // 8), "float32")
        array[:] = number
        held.append((number, HELD[how](array)))
        del array
        if drop < len(held):
            del held[drop]
        assert all(unchanged(np.asarray(part), want) for want, part in held)
    held.clear()
    assert pool.kept <= pool.most and not pool._lent


def unchanged(values: np.ndarray, want: int) -> bool:
    return values.tobytes() == np.full(values.nbytes // 4 + 1, want, "f4").tobytes()[-values.nbytes :]


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_what_is_dropped_is_used_again() -> None:
    pool = BufferPool()
    first = pool.empty((1000, 1000), "float16")
    where = address(first)
    second = pool.empty((1000, 1000), "float16")
    assert address(second) != where and first.flags.c_contiguous and first.flags.writeable
    del first
    third = pool.empty((1050, 1000), "float16")  # a little more has room, too
    assert address(third) == where and pool.kept == 0
    small, large = pool.empty((3, 4), "float16"), pool.empty((0, 7), "int8")
    assert small.flags.owndata and large.shape == (0, 7)  # numpy's own
    del second, third
    assert pool.kept == 2 * 2 * HUGE
    assert pool.empty((100, 1000), "float16").nbytes < pool.kept // 10  # far too large a block is left alone
    pool.clear()
    assert pool.kept == 0


def test_no_more_is_kept_than_allowed() -> None:
    pool = BufferPool(16 << 20)
    arrays = [pool.empty((n << 20,), "uint8") for n in (1, 2, 3, 4, 5, 6, 7, 8, 17)]
    last = address(arrays[-2])
    while arrays:
        del arrays[0]
    assert 8 << 20 <= pool.kept <= 16 << 20
    assert address(pool.empty((8 << 20,), "uint8")) == last  # those that were used last are kept


def test_threads_do_not_share() -> None:
    pool, before = BufferPool(4 << 20), sys.getswitchinterval()

    def work(seed: int) -> bool:
        rng, sound = np.random.default_rng(seed), True
        for n in range(150):
            array = pool.empty((int(rng.integers(1, 5)), SMALLEST), "uint8")
            array[:] = (mark := (seed * 31 + n) % 251)
            sound &= bool((array == mark).all())
        return sound

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert pool.kept <= pool.most and not pool._lent


def test_gather_uses_memory_again(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held batches stay what they are; a dropped one's memory is the next one's, in every dtype."""
    monkeypatch.setattr(memory, "SMALLEST", 1)
    BATCH_BUFFERS.clear()
    store = Store.open(small_store)
    ids = store.utterance_ids
    for dtype in (None, "float32"):
        kept = store.gather(ids, VIEWS, dtype)
        copies = {v: s.copy() for v, s in kept.states.items()}
        dropped = store.gather(ids[::-1], VIEWS, dtype)
        places = {address(s) for s in dropped.states.values()}
        assert not places & {address(s) for s in kept.states.values()}
        del dropped
        again = store.gather(ids[::-1], VIEWS, dtype)
        assert {address(s) for s in again.states.values()} == places
        assert all(np.array_equal(kept.states[v], copies[v]) for v in VIEWS)
        del again, kept


def test_pages_are_touched_once() -> None:
    """What it is for: batches that follow each other cost the kernel no pages, whatever is a little longer."""
    pool = BufferPool()

    def batch(rows: int) -> None:
        for array in [pool.empty((rows, 1024), "float16") for _ in range(6)]:
            array[:] = 1

    batch(2500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for rows in (2500, 2400, 2600, 2450, 2550):
        batch(rows)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100  # 30 MB each are 7,300 pages


def test_a_fork_begins_without() -> None:
    array = BATCH_BUFFERS.empty((HUGE,), "uint8")
    array[:] = 3
    del array
    held = BATCH_BUFFERS.empty((HUGE // 2,), "uint8")
    held[:] = 5
    pid = os.fork()
    if not pid:
        fine = BATCH_BUFFERS.kept == 0 and (held == 5).all()
        held[:] = 6  # its own copy
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (held == 5).all() and BATCH_BUFFERS.kept

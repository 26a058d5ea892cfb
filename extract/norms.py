"""Mean and standard deviation of each view's dimensions, over a sample that the plan fixes.

Invariant: the sample is at most 2,000 utterances spread evenly over the plan, the same for every view and whoever
wrote it; norms are taken from the stored states, written once, and never changed.
Run: `pytest tests/extract/test_run.py -k norms`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .store.arrays import RawArray
from .store.commits import Commit, Commits, link_commit
from .store.files import Lock, fsync_all
from .store.layout import to_float32
from .store.plan import Plan
from .store.reader import Store, View
from .store.writer import versions

SAMPLE = 2000
LEAST_STD = 1e-3


def sample_rows(lengths: np.ndarray, most: int = SAMPLE) -> np.ndarray:
    """Rows of the sampled utterances: spread evenly over those that have tokens. int64 [≤ most]."""
    full = np.flatnonzero(lengths > 0)
    return full[np.unique(np.linspace(0, len(full) - 1, min(most, len(full))).round().astype(np.int64))]


def fix_norms(plan: Plan, teacher: str, context: str, scratch: Path) -> None:
    """Write norm_mean and norm_std of a context's layers, once all of its units are committed.

    Does nothing where they are there, or where units are still missing.
    """
    record = plan.teachers[teacher]
    with Lock(plan.paths.lock(teacher, context, "norms"), wait=True):
        commits = Commits(plan.paths, teacher, context)
        asked = {
            k: g.number
            for g in plan.generations
            for w in g.work
            if g.teacher == teacher and w.context == context
            for k in w.layers
        }
        store = Store.open(plan.paths.root)
        units = [u for u in plan.units(teacher) if u.context == context]
        ready = [
            k
            for k in sorted(asked)
            if not commits.has("norms", [k])
            and all(commits.has(u.shard.number, [k], u.generation.number) for u in units if k in u.layers)
        ]
        if not ready:
            return
        rows = sample_rows(np.asarray(RawArray(plan.paths.data / teacher / "length").read()))
        ids = [store.index.id(int(r)) for r in rows]
        group, c = plan.paths.data / teacher, record.contexts.index(context)
        written: list[Path] = []
        for k in ready:
            mean, std = _moments(store, View(teacher, context, k), ids, record.dtype)
            axis = record.layers.index(k)
            written += RawArray(group / "norm_mean").write_range(mean, c, axis, first=0)
            written += RawArray(group / "norm_std").write_range(std, c, axis, first=0)
        fsync_all(written)
        commit = Commit(
            teacher=teacher,
            context=context,
            shard="norms",
            generation=max(asked[k] for k in ready),
            layers=ready,
            utterances=[int(rows[0]), int(rows[-1]) + 1],
            rows=[],
            versions=versions(),
        )
        link_commit(plan.paths, scratch, commit)


def _moments(store: Store, view: View, ids: list[str], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [D], float32 [D]; sums in float64, in blocks, so that the sample need not fit into memory."""
    count, total, square = 0, 0.0, 0.0
    shift: np.ndarray | None = None  # huge outlier dimensions would cancel without it
    for first in range(0, len(ids), 100):
        states = to_float32(store.gather(ids[first : first + 100], [view]).states[view], dtype).astype(np.float64)
        if shift is None:
            shift = states.mean(axis=0)
        states -= shift
        count, total, square = count + len(states), total + states.sum(axis=0), square + (states**2).sum(axis=0)
    assert shift is not None
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    return (mean + shift).astype(np.float32), np.maximum(std, LEAST_STD).astype(np.float32)

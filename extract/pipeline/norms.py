"""Mean and standard deviation of each view's dimensions, over a sample that the plan fixes.

Invariant: the sample is at most 2,000 utterances spread evenly over the plan, the same for every view and whoever
wrote it; norms are taken from the stored states (int8, which needs them first: from the model's), written once, and
never changed. Run: `pytest tests/extract/store/test_reader.py tests/extract/store/test_int8.py -k norms`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...data.errors import StoreError
from ..store.disk.durable import Lock, fsync_all
from ..store.disk.layout import Paths, crc32c, dtype_of, to_float32
from ..store.format.arrays import RawArray
from ..store.format.commits import Commit, Commits, link_commit
from ..store.format.index import Index
from ..store.format.plan import Plan, WorkItem
from ..store.format.plan import TeacherRecord as Record
from ..store.reader import Store
from ..store.verify.sums import NORMS
from ..store.views import View
from ..store.writer import versions

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
        items = [u for u in plan.work_items(teacher) if u.context == context]
        ready = [
            k
            for k in sorted(asked)
            if not commits.has("norms", [k])
            and all(commits.has(u.shard.number, [k], u.generation.number) for u in items if k in u.layers)
        ]
        if not ready:
            return
        rows = sample_rows(store.lengths(teacher))
        ids = [store.index.id(int(r)) for r in rows]
        found = _moments(plan.paths.root, [View(teacher, context, k) for k in ready], ids, record.dtype)
        commit_norms(plan, teacher, context, max(asked[k] for k in ready), found, scratch)


def fix_norms_again(store: Store, view: View) -> bool:
    """Write a view's norms as its states give them, where these are the norms that were committed. False where they
    are not: those of int8 come from the model's own states, and those of a part of a store from the whole of it.
    """
    record, commits = store.plan.teachers[view.teacher], store.commits(view.teacher, view.context)
    if dtype_of(record.dtype).scaled:
        return False
    ids = [store.index.id(int(r)) for r in sample_rows(store.lengths(view.teacher))]
    found = _moments(store.paths.root, [view], ids, record.dtype)
    told = commits.of["norms", view.layer].checksums
    if any(told.get(name) != crc for name, crc in _checksums(found).items()):
        return False
    fsync_all(_write(store.paths, record, view.context, found))
    return True


def fix_norms_first(
    plan: Plan, item: WorkItem, sample: Sample, scratch: Path
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{layer: (mean, std) float32 [D]} of a unit's views, before anything of them is written: int8 needs them.

    Where nobody has fixed them yet, the states of the sample are made for this alone. The first writer does it under a
    lock, and what it commits holds for all. Errors: StoreError naming view and utterance of a state that is not finite.
    """
    name, context = item.teacher, item.context
    group, record = plan.paths.data / name, plan.teachers[name]
    with Lock(plan.paths.lock(name, context, "norms"), wait=True):
        commits = Commits(plan.paths, name, context)
        missing = [k for k in item.layers if not commits.has("norms", [k])]
        if missing:
            rows = sample_rows(np.asarray(RawArray(group / "length").read()))
            moments = {k: Moments() for k in missing}
            for row, states in sample(item, rows, missing):
                for k, values in states.items():
                    if not np.isfinite(values).all():
                        raise StoreError(
                            f"a value of {name}/{context}/{k} is not finite",
                            where=Index(plan.paths.data / "utterances").id(row),
                            remedy="the model itself yields it: try --model-dtype float32",
                        )
                    moments[k].add(values)
            found = {k: m.result() for k, m in moments.items()}
            commit_norms(plan, name, context, item.generation.number, found, scratch)
    c = record.contexts.index(context)
    read = RawArray(group / "norm_mean"), RawArray(group / "norm_std")
    return {k: (read[0].read(c, axis), read[1].read(c, axis)) for k, axis in _axes(record, item.layers).items()}


# (unit, rows, layers) -> (row, {layer: float32 [n, D]}) of the rows' tokens, in whatever order
Sample = Callable[[WorkItem, np.ndarray, Sequence[int]], Iterable[tuple[int, dict[int, np.ndarray]]]]


def _axes(record: Record, layers: Sequence[int]) -> dict[int, int]:
    return {k: record.layers.index(k) for k in layers}


def commit_norms(
    plan: Plan,
    teacher: str,
    context: str,
    generation: int,
    norms: dict[int, tuple[np.ndarray, np.ndarray]],
    scratch: Path,
) -> None:
    """Write {layer: (mean, std) float32 [D]} and commit them; nobody else writes norms meanwhile."""
    fsync_all(_write(plan.paths, plan.teachers[teacher], context, norms))
    sums = _checksums(norms)
    commit = Commit(teacher, context, "norms", generation, sorted(norms), [], [], checksums=sums, versions=versions())
    link_commit(plan.paths, scratch, commit)


Norms = dict[int, tuple[np.ndarray, np.ndarray]]  # {layer: (mean, std) float32 [D]}


def _write(paths: Paths, record: Record, context: str, norms: Norms) -> list[Path]:
    """What is to be synced before anything may rely on them."""
    group, c, written = paths.data / record.name, record.contexts.index(context), []
    for k, axis in _axes(record, list(norms)).items():
        for name, values in zip(NORMS, norms[k]):
            written += RawArray(group / name).write_range(values, c, axis, first=0)
    return written


def _checksums(norms: Norms) -> dict[str, int]:
    """As a commit has them: {"norm_mean.LAYER": crc32c, …}."""
    every = ((f"{name}.{k}", values) for k, both in norms.items() for name, values in zip(NORMS, both))
    return {key: crc32c(np.ascontiguousarray(values, "<f4")) for key, values in every}


class Moments:
    """Mean and deviation of rows that come in blocks; sums in float64 over runs of float32 sums."""

    def __init__(self) -> None:
        self._count, self._total, self._square = 0, np.zeros(1), np.zeros(1)
        self._shift: np.ndarray | None = None  # huge outlier dimensions would cancel without it

    def add(self, states: np.ndarray) -> None:
        """float32 [N, D]."""
        if self._shift is None and len(states):
            self._shift = states.mean(axis=0, dtype=np.float64).astype(np.float32)
        for first in range(0, len(states), _CACHED):
            part = states[first : first + _CACHED] - self._shift
            self._count += len(part)
            self._total = self._total + _sums(part)
            self._square = self._square + _sums(np.multiply(part, part, out=part))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [D], float32 [D]; no deviation is below 1e-3."""
        assert self._shift is not None
        mean = self._total / self._count
        std = np.sqrt(np.maximum(self._square / self._count - mean**2, 0))
        return (mean + self._shift).astype(np.float32), np.maximum(std, LEAST_STD).astype(np.float32)


_RUN, _CACHED = 64, 512  # rows summed in float32; rows at a time, so that they stay in the processor's cache


def _sums(values: np.ndarray) -> np.ndarray:
    """float32 [N, D] over its rows: float64 [D], five times as fast as numpy's own sums in float64."""
    whole = len(values) // _RUN * _RUN
    runs = values[:whole].reshape(-1, _RUN, values.shape[1]).sum(axis=1)
    return runs.sum(axis=0, dtype=np.float64) + values[whole:].sum(axis=0, dtype=np.float64)


def _moments(root: Path, views: Sequence[View], ids: list[str], dtype: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{layer: (mean, std) float32 [D]}; in blocks, so that the sample need not fit into memory."""

    def of(mine: Sequence[View]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        store, found = Store.open(root), {}
        for view in mine:
            moments = Moments()
            for first in range(0, len(ids), 100):
                part = ids[first : first + 100]
                moments.add(to_float32(store.gather(part, [view]).states[view], dtype))
            found[view.layer] = moments.result()
        return found

    count = min(len(views), 4, os.cpu_count() or 1)
    with ThreadPoolExecutor(count, "stillhouse-norms") as threads:  # numpy lets others run
        return {k: v for found in threads.map(of, [views[i::count] for i in range(count)]) for k, v in found.items()}

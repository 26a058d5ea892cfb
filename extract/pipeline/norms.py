"""Mean and standard deviation of each view's dimensions, over a sample of utterances that the plan decides.

Guarantees: the sample is at most 2,000 utterances, spread evenly over the plan, and is the same for every view and
writer. Norms are computed from the stored states, or for int8 and pq, which need them first, from the model's. They
are committed once, together with the codebooks of pq, and never change.
Try: `pytest tests/extract/store/test_reader.py -k norms`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...data.errors import StoreError
from ...data.files.atomic import sync
from ...data.files.lock import FileLock
from ..store.disk.layout import crc32c, dtype_of, to_float32
from ..store.disk.paths import Paths
from ..store.format.arrays import RawArray
from ..store.format.commits import Commit, Commits, link_commit
from ..store.format.index import Index
from ..store.format.plan import Plan, TeacherRecord, WorkItem
from ..store.format.pq import ROWS, learn
from ..store.reader import Store
from ..store.verify.sums import NORMS
from ..store.views import View
from ..store.writer import versions

SAMPLE = 2000
SAMPLE_BYTES = 1 << 30  # of rows in memory from which codebooks are learned
LEAST_STD = 1e-3

# {layer: (mean, standard deviation)}, float32 [D] each; of pq also the codebooks, float16 [M, 256, D/M]
Norms = dict[int, tuple[np.ndarray, ...]]
# (work item, rows, layers) -> (row, {layer: float32 [n, D]}) of the tokens of these rows, in any order
Sample = Callable[[WorkItem, np.ndarray, Sequence[int]], Iterable[tuple[int, dict[int, np.ndarray]]]]


def sample_rows(lengths: np.ndarray, most: int = SAMPLE) -> np.ndarray:
    """Return the rows of the sample, int64 [≤ most]: spread evenly over the utterances that have tokens."""
    full = np.flatnonzero(lengths > 0)
    return full[np.unique(np.linspace(0, len(full) - 1, min(most, len(full))).round().astype(np.int64))]


def write_norms(plan: Plan, teacher: str, context: str, scratch: Path) -> None:
    """Compute and commit the norms of a context's layers whose work items are all committed and that have none yet."""
    with FileLock(plan.paths.lock(teacher, context, "norms"), wait=True):
        commits = Commits(plan.paths, teacher, context)
        items = [item for item in plan.work_items(teacher) if item.context == context]
        pairs = [(item, k) for item in items for k in item.layers if not commits.has("norms", [k])]
        newest = {k: item.generation.number for item, k in pairs}
        missing = {k for item, k in pairs if not commits.has(item.shard.number, [k], item.generation.number)}
        ready = sorted(newest.keys() - missing)
        if ready:
            store = Store.open(plan.paths.files)
            norms = _norms_of(store, [View(teacher, context, k) for k in ready])
            commit_norms(plan, teacher, context, max(newest[k] for k in ready), norms, scratch)


def restore_norms(store: Store, view: View) -> bool:
    """Write a view's norms again, if its states still give the norms that were committed; return False if not.

    The norms of int8 and pq come from the model's own states (see `relearn_norms`), and those of a part of a store from
    the whole store.
    """
    quantised = dtype_of(store.plan.teachers[view.teacher].dtype).quantised
    return not quantised and _restore(store.plan, view, _norms_of(store, [view]))


def relearn_norms(plan: Plan, view: View, sample: Sample) -> bool:
    """Write the norms of an int8 or pq view again, if the model still gives those that were committed.

    Return False if not, as after a change of the corpus.
    """
    items = (i for i in plan.work_items(view.teacher) if i.context == view.context and view.layer in i.layers)
    return _restore(plan, view, _norms_of_sample(plan, next(items), sample, [view.layer]))


def _restore(plan: Plan, view: View, norms: Norms) -> bool:
    recorded = Commits(plan.paths, view.teacher, view.context).of["norms", view.layer].checksums
    if any(recorded.get(name) != crc for name, crc in _checksums(norms).items()):
        return False
    sync(*_write(plan.paths, plan.teachers[view.teacher], view.context, norms))
    return True


def norms_before_states(plan: Plan, item: WorkItem, sample: Sample, scratch: Path) -> Norms:
    """Return the norms of a work item's views before any of its states is written, as int8 and pq need them.

    The first writer computes the sample's states for this alone, under a lock. What it commits holds for all writers.
    Raises StoreError, with view and utterance, if a state is not finite, and if committed norms are damaged.
    """
    name, context = item.teacher, item.context
    with FileLock(plan.paths.lock(name, context, "norms"), wait=True):
        commits = Commits(plan.paths, name, context)
        missing = [k for k in item.layers if not commits.has("norms", [k])]
        if missing:
            norms = _norms_of_sample(plan, item, sample, missing)
            commit_norms(plan, name, context, item.generation.number, norms, scratch)
    store = Store.open(plan.paths.files)
    return {k: store.norms_stored(View(name, context, k)) for k in item.layers}


def _norms_of_sample(plan: Plan, item: WorkItem, sample: Sample, layers: Sequence[int]) -> Norms:
    """Compute norms from the model's own states. Of pq, all layers whose samples fit into memory are run at once."""
    record = plan.teachers[item.teacher]
    codes, lengths = dtype_of(record.dtype).codes, np.asarray(RawArray(plan.paths, item.teacher, "length").read())
    rows = sample_rows(lengths)
    kept_bytes = min(ROWS, int(lengths[rows].sum())) * record.width * 4 if codes else 0
    at_once = max(1, SAMPLE_BYTES // kept_bytes) if kept_bytes else len(layers)
    norms: Norms = {}
    for first in range(0, len(layers), at_once):
        part = layers[first : first + at_once]
        moments = {k: Moments() for k in part}
        kept = {k: KeptRows(rows, lengths[rows], record.width) for k in part if codes}
        for row, states in sample(item, rows, part):
            for k, values in states.items():
                if not np.isfinite(values).all():
                    raise StoreError(
                        f"a value of {item.teacher}/{item.context}/{k} is not finite",
                        where=Index(plan.paths).id(row),
                        remedy="the model itself yields it: try --model-dtype float32",
                    )
                moments[k].add(values)
                if codes:
                    kept[k].add(row, values)
        for k in part:
            mean, std = moments[k].result()
            norms[k] = (mean, std, learn(kept.pop(k).result(), mean, std, codes)) if codes else (mean, std)
    return norms


class KeptRows:
    """At most 32,768 rows of a sample, spread evenly over its tokens. Rows come in blocks of single utterances."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, width: int) -> None:
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1])
        self._next = dict(zip(rows.tolist(), (ends - lengths).tolist()))  # {row: number of its next token}
        self._chosen = np.unique(np.linspace(0, total - 1, min(ROWS, total)).round().astype(np.int64))
        self._filled = np.zeros(len(self._chosen), bool)
        self._states = np.empty((len(self._chosen), width), np.float32)

    def add(self, row: int, states: np.ndarray) -> None:
        """Add the next tokens of an utterance, float32 [n, D]."""
        begin = self._next[row]
        end = self._next[row] = begin + len(states)
        first, last = np.searchsorted(self._chosen, (begin, end))
        self._states[first:last] = states[self._chosen[first:last] - begin]
        self._filled[first:last] = True

    def result(self) -> np.ndarray:
        """Return the rows in the order of the tokens, float32 [S, D]."""
        return self._states[self._filled]


def commit_norms(plan: Plan, teacher: str, context: str, generation: int, norms: Norms, scratch: Path) -> None:
    """Write and commit norms. No other process may write norms of this context meanwhile."""
    sync(*_write(plan.paths, plan.teachers[teacher], context, norms))
    sums = _checksums(norms)
    commit = Commit(teacher, context, "norms", generation, sorted(norms), [], [], checksums=sums, versions=versions())
    link_commit(plan.paths, scratch, commit)


def _write(paths: Paths, record: TeacherRecord, context: str, norms: Norms) -> list[Path]:
    """Write norms, and return the files and folders to sync before they are committed."""
    c, written = record.contexts.index(context), []
    for k, values in norms.items():
        for name, array in zip(NORMS, values):
            written += RawArray(paths, record.name, name).write_rows(array, c, record.layers.index(k), first=0)
    return written


def _checksums(norms: Norms) -> dict[str, int]:
    """{"norm_mean.LAYER": crc32c, …}, as a commit record has them."""
    arrays = {f"{name}.{k}": array for k, values in norms.items() for name, array in zip(NORMS, values)}
    return {key: crc32c(np.ascontiguousarray(array, array.dtype.newbyteorder("<"))) for key, array in arrays.items()}


class Moments:
    """Mean and standard deviation of rows that come in blocks: float64 sums over runs of float32 sums."""

    def __init__(self) -> None:
        self._count, self._total, self._square = 0, np.zeros(1), np.zeros(1)
        self._shift: np.ndarray | None = None  # Without it, dimensions with huge values would lose their deviation.

    def add(self, states: np.ndarray) -> None:
        """Add rows, float32 [N, D]."""
        if self._shift is None and len(states):
            self._shift = states.mean(axis=0, dtype=np.float64).astype(np.float32)
        for first in range(0, len(states), _CACHED):
            part = states[first : first + _CACHED] - self._shift
            self._count += len(part)
            self._total = self._total + _sums(part)
            self._square = self._square + _sums(np.multiply(part, part, out=part))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, float32 [D] each. No deviation is below 1e-3."""
        assert self._shift is not None
        mean = self._total / self._count
        std = np.sqrt(np.maximum(self._square / self._count - mean**2, 0))
        return (mean + self._shift).astype(np.float32), np.maximum(std, LEAST_STD).astype(np.float32)


_RUN, _CACHED = 64, 512  # rows that are summed in float32; rows at a time, so that they stay in the processor's cache


def _sums(values: np.ndarray) -> np.ndarray:
    """float64 [D]: sums over the rows of float32 [N, D], five times as fast as numpy's own sums in float64."""
    whole = len(values) // _RUN * _RUN
    runs = values[:whole].reshape(-1, _RUN, values.shape[1]).sum(axis=1)
    return runs.sum(axis=0, dtype=np.float64) + values[whole:].sum(axis=0, dtype=np.float64)


def _norms_of(store: Store, views: Sequence[View]) -> Norms:
    """Norms of a teacher's views from stored states, read in blocks: the sample need not fit into memory."""
    name = views[0].teacher
    ids = [store.index.id(row) for row in sample_rows(store.lengths(name)).tolist()]

    def norm(view: View) -> tuple[np.ndarray, np.ndarray]:
        own, moments = Store.open(store.paths.files), Moments()
        for first in range(0, len(ids), 100):
            states = own.gather(ids[first : first + 100], [view]).states[view]
            moments.add(to_float32(states, store.plan.teachers[name].dtype))
        return moments.result()

    with ThreadPoolExecutor(min(len(views), 4, os.cpu_count() or 1), "stillhouse-norms") as threads:
        return dict(zip((v.layer for v in views), threads.map(norm, views)))  # numpy lets other threads run

"""Units of work made with a loaded teacher: while the model runs one batch, others are written and committed.

Invariant: the model waits for nothing but the model. What is written depends on no other unit, and a unit is
committed only after all of its batches are written; the lock that its claim holds is kept until then.
Run: `pytest tests/extract/pipeline/test_runner.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..store.disk.durable import Lock
from ..store.format.index import Index
from ..store.format.int8 import Quantised
from ..store.format.plan import Plan, WorkItem
from ..store.read.handles import most_handles
from ..store.read.rows import TeacherRows
from ..store.writer import ItemWriter
from ..teacher.batching import make_batches
from ..teacher.contexts import ItemWindows, TokenLists, Window
from ..teacher.forward import encode_tensor, tensors
from ..teacher.model import Teacher
from ..teacher.replicas import Task, TeacherPool
from .corpus_diff import windows_of
from .norms import fix_norms_first
from .progress import ExtractionProgress, Report
from .reuse import Reuse, without
from .reuse import write as write_copies

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LockedItem:
    """A unit to be made; `lock` is given back when it is committed, None where the caller keeps it. `generation`: of
    the commit, None: the unit's own.
    """

    item: WorkItem
    lock: Lock | None = None
    generation: int | None = None


@dataclass(eq=False)
class OpenItem:
    """A unit on its way: its open files, and what is left to be computed."""

    claim: LockedItem
    writer: ItemWriter
    work: ItemWindows
    batches: list[list[Window]]
    computed: bool = False

    @property
    def item(self) -> WorkItem:
        return self.claim.item

    def commit(self, written: Future[None] | None) -> None:
        """Commit what has been written, and let go of it."""
        if written is not None:
            written.result()
        g, work = self.claim.generation, self.work
        number = self.item.generation.number if g is None else g
        self.writer.commit(work.input_hash, work.context_left, work.context_right, number)
        self.close()

    def close(self) -> None:
        self.writer.close()
        if self.claim.lock is not None:
            self.claim.lock.release()


class ItemRunner:
    """Makes units of work; a thread writes their batches, another commits them, the teacher's own compute the next."""

    def __init__(
        self,
        plan: Plan,
        teacher: Teacher,
        rows: TeacherRows,
        scratch: Path,
        progress: ExtractionProgress,
        report: Report | None = None,
    ) -> None:
        self.plan, self.teacher, self.rows, self.scratch = plan, teacher, rows, scratch
        self.progress, self.report = progress, report
        self.index = Index(plan.paths.data / "utterances", plan.edition(rows.record.name))
        self.session = np.asarray(self.index.session_of)
        self.texts = StoredTexts(rows, self.index.order)
        self.reuse = Reuse(plan, self.index)
        self.threads = TeacherPool(teacher)
        self._writer = ThreadPoolExecutor(1, "stillhouse-writer")
        self._committer = ThreadPoolExecutor(1, "stillhouse-committer")
        self._writing: Future[None] | None = None
        self._committing: Future[None] | None = None
        self._open: dict[OpenItem, None] = {}
        self._most_open = max(2, most_handles() // max(1, len(rows.record.layers)))

    def __enter__(self) -> ItemRunner:
        self.threads.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.__exit__(*exc)
        self._writer.shutdown(wait=True)
        self._committer.shutdown(wait=True)

    def make(self, item: WorkItem, generation: int | None = None) -> None:
        """Run a unit and commit it; the caller holds its lock."""
        self.run_items([LockedItem(item, None, generation)])

    def run_items(self, claims: Iterable[LockedItem]) -> None:
        """Run units and commit them. The next claim is asked for when the threads have no batch of the last one left
        to begin with, so it is asked for early, and seldom more than one is held that waits to be computed.

        Errors: StoreError where a value is not finite or the disk is full; what was committed stays, the locks of
        all claims that were taken are given back.
        """
        try:
            for job, write in self.blocks(self._begun(claims)):
                if write is not None:
                    _finish(self._writing)
                    self._writing = self._writer.submit(write)
                else:
                    job.computed = True
                    _finish(self._committing)
                    self._committing = self._committer.submit(self._commit, job, self._writing)
            _finish(self._writing)
            _finish(self._committing)
        finally:
            wait([f for f in (self._writing, self._committing) if f is not None])
            self._writing = self._committing = None
            for job in list(self._open):
                with suppress(OSError):
                    job.close()
            self._open.clear()

    def _begun(self, claims: Iterable[LockedItem]) -> Iterator[OpenItem]:
        for claim in claims:
            try:
                job = self._begin(claim)
            except BaseException:
                if claim.lock is not None:
                    claim.lock.release()
                raise
            yield job

    def _begin(self, claim: LockedItem) -> OpenItem:
        """Open a unit's files and lay out its windows; what the store has already is copied here."""
        item, record = claim.item, self.plan.teachers[claim.item.teacher]
        shard, g = item.shard, item.generation
        wanted = self.index.position[shard.first : shard.last]
        work = context_passes(self.plan, item, self.texts, self.session, wanted)
        copies = self.reuse.copies(item, work.input_hash)
        windows = without(work.windows, set(copies))
        ids = [self.index.id(u) for u in range(shard.first, shard.last)]
        starts, lengths = self.rows.start[shard.first : shard.last], self.rows.length[shard.first : shard.last]
        batches = make_batches(windows, g.batch_tokens, g.batch_overhead_tokens)
        writer = ItemWriter(self.plan.paths, self.scratch, record, item, starts, lengths, ids)
        job = OpenItem(claim, writer, work, batches)
        self._open[job] = None
        writer.leave_out(np.flatnonzero(wanted < 0))
        write_copies(writer, copies)
        self.progress.rows += int(lengths[wanted < 0].sum() + lengths[list(copies)].sum())
        return job

    def _commit(self, job: OpenItem, written: Future[None] | None) -> None:
        job.commit(written)
        self._open.pop(job)
        self.progress.units += 1

    def blocks(self, jobs: Iterable[OpenItem]) -> Iterator[tuple[OpenItem, Callable[[], None] | None]]:
        """(job, what writes a part of it) in the order of the jobs; and (job, None) after all parts of one."""
        p = self.progress
        for task, parts in self.threads.run_all(self._tasks(jobs)):
            job: OpenItem = task.owner
            p.item, p.model_s = str(job.item), self.threads.seconds / self.threads.count
            for windows, states in parts:
                yield job, WriteBlock(job.writer, windows, states)
                p.rows += sum(k.last - k.first for w in windows for k in w.kept)
                p.fed_tokens += sum(len(w.ids) for w in windows)
                p.padded_tokens += len(windows) * max(len(w.ids) for w in windows)
                if self.report is not None:
                    self.report(p)
            if task.last:
                yield job, None

    def _tasks(self, jobs: Iterable[OpenItem]) -> Iterator[Task | None]:
        for job in jobs:
            while len(self._open) > self._most_open:
                if all(other.computed or other is job for other in self._open):
                    _finish(self._committing)
                else:
                    yield None
            norms = {k: tensors(norm, self.teacher.device) for k, norm in self.norms(job.item).items()}
            keep = Encode(job.writer, norms)
            batches = job.batches or [[]]
            for number, batch in enumerate(batches, start=1):
                yield Task(batch, job.item.layers, keep, job.item, job, number == len(batches))

    def norms(self, item: WorkItem) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """What standardises the states of an int8 store, by layer; fixed now where this is its first unit."""
        return fix_norms_first(self.plan, item, self.sample, self.scratch) if self.rows.dtype.scaled else {}

    def sample(self, item: WorkItem, rows: np.ndarray, layers: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """(row, {layer: float32 [n, D]}) of the rows' tokens in the unit's context, by parts."""
        work = context_passes(self.plan, item, self.texts, self.session, self.index.position[rows])
        g = item.generation

        def keep(states: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
            return {k: v.float().cpu().numpy() for k, v in states.items()}

        batches = make_batches(work.windows, g.batch_tokens, g.batch_overhead_tokens)
        for part, states in self.threads.run(batches, layers, keep, item):
            for row, window in enumerate(part):
                for p in window.kept:
                    kept = slice(p.at, p.at + p.last - p.first)
                    yield int(rows[p.utterance]), {k: block[row, kept] for k, block in states.items()}


@dataclass(frozen=True)
class Encode:
    """What the model's thread makes of a batch's states: what is stored."""

    writer: ItemWriter
    norms: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, states: dict[int, torch.Tensor]) -> dict[int, np.ndarray | Quantised]:
        return {k: encode_tensor(v, self.writer.dtype, self.norms.get(k)) for k, v in states.items()}


@dataclass(frozen=True)
class WriteBlock:
    """Puts the states {layer: [B, T, ...]} of a batch of windows into a unit's files."""

    writer: ItemWriter
    windows: list[Window]
    states: dict[int, np.ndarray | Quantised]

    def __call__(self) -> None:
        for layer, block in self.states.items():
            for row, window in enumerate(self.windows):
                for k in window.kept:
                    n = k.last - k.first
                    self.writer.write(layer, k.utterance, k.first, block[row, k.at : k.at + n])


def _finish(future: Future[None] | None) -> None:
    """Wait for it, and raise what went wrong in it."""
    if future is not None:
        future.result()


def context_passes(
    plan: Plan, item: WorkItem, texts: TokenLists, session: np.ndarray, wanted: Sequence[int] | np.ndarray
) -> ItemWindows:
    """The windows that these utterances come out of, in the unit's context; `wanted` are positions in the corpus."""
    record, core = plan.teachers[item.teacher], item.generation.core_tokens
    return windows_of(record, item.context, core, texts, session, wanted)


class StoredTexts:
    """Token ids of the utterances of a corpus, by position: `order` are their rows. A slice gives a list of arrays."""

    def __init__(self, rows: TeacherRows, order: np.ndarray) -> None:
        self._rows, self._order = rows, order

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        t = self._rows
        places = t.places(self._order[which])
        return np.split(t.tokens(t.token_id, places), places.into[1:])

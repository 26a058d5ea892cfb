"""Run work items with a loaded teacher. While the model runs one batch, others are written and committed.

Guarantees: the model never waits for the disk. A work item is committed only after all of its batches are written, and
its lock is held until then. What is written for it depends on no other work item.
Try: `pytest tests/extract/pipeline/test_runner.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.files.lock import FileLock
from ...data.files.stopping import StopNow, StopRequest
from ..speech.teacher import AnyTeacher, SpeechTeacher
from ..store.format.arrays import RawArray
from ..store.format.commits import Commits
from ..store.format.index import Index
from ..store.format.plan import Generation, Plan, WorkItem
from ..store.format.quantised import Quantised
from ..store.read.handles import most_handles
from ..store.read.rows import TeacherRows
from ..store.writer import ItemWriter
from ..teacher.batching import make_batches
from ..teacher.contexts import ItemWindows, Window
from ..teacher.forward import encode_tensor, largest_of, tensors
from ..teacher.passes import passes_of
from ..teacher.replicas import Task, TeacherPool
from .corpus_diff import CorpusTexts, windows_of
from .norms import Norms, norms_before_states
from .progress import ExtractionProgress, OnProgress
from .reuse import Reuse, windows_without, write_copies

if TYPE_CHECKING:
    import torch


EncodedStates = dict[int, tuple[np.ndarray | Quantised, float]]  # {layer: (states, their largest magnitude)}


@dataclass(frozen=True)
class LockedItem:
    """A work item to run."""

    item: WorkItem
    lock: FileLock | None = None  # is released when the item is committed; None: the caller keeps the lock
    generation: int | None = None  # of the commit record; None: the item's own


@dataclass(eq=False)
class OpenItem:
    """A work item that is being run: its open files, and the batches to compute."""

    locked: LockedItem
    writer: ItemWriter
    windows: ItemWindows
    batches: list[list[Window]]
    ids: list[str]  # of the utterances that `KeptTokens.utterance` counts
    computed: bool = False

    @property
    def item(self) -> WorkItem:
        return self.locked.item

    def commit(self, written: Future[None] | None) -> None:
        """Wait for the last batch to be written, then commit the item and release it."""
        _wait_for(written)
        generation, windows = self.locked.generation, self.windows
        number = self.item.generation.number if generation is None else generation
        self.writer.commit(windows.input_hash, windows.context_left, windows.context_right, number)
        self.close()

    def close(self) -> None:
        """Close the item's files and release its lock."""
        self.writer.close()
        if self.locked.lock is not None:
            self.locked.lock.release()


class ItemRunner:
    """Runs work items: the teacher's threads compute batches, one thread writes them and another commits items."""

    def __init__(
        self,
        plan: Plan,
        teacher: AnyTeacher,
        teacher_rows: TeacherRows,
        scratch: Path,
        progress: ExtractionProgress,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.plan, self.teacher, self.rows, self.scratch = plan, teacher, teacher_rows, scratch
        self.progress, self.on_progress = progress, on_progress
        self.index = Index(plan.paths, plan.edition(teacher_rows.record.name))
        self.session = np.asarray(self.index.session_of)
        self.texts = None if teacher_rows.record.is_speech else CorpusTexts(self.index.order, teacher_rows)
        self.reuse = Reuse(plan, self.index)
        self.passes = teacher.passes = passes_of(plan, teacher_rows.record.name)
        self.threads = TeacherPool(teacher)
        self._writer = ThreadPoolExecutor(1, "stillhouse-writer")
        self._committer = ThreadPoolExecutor(1, "stillhouse-committer")
        self._writing: Future[None] | None = None
        self._committing: Future[None] | None = None
        self._open: dict[OpenItem, None] = {}
        self.stop: StopRequest | None = None  # a request ends the run before the next batch is written
        self._most_open = max(2, most_handles() // max(1, len(teacher_rows.record.layers)))

    def __enter__(self) -> ItemRunner:
        self.threads.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.__exit__(*exc)
        self._writer.shutdown(wait=True)
        self._committer.shutdown(wait=True)

    def run_items(self, items: Iterable[LockedItem]) -> None:
        """Run and commit work items. Raises StoreError if a value is not finite or the disk is full.

        The next item is asked for when the threads have no batch of the last one left to begin. So the model never
        waits for a lock, and seldom more than one locked item waits for the model. After an error or a
        request to stop, items of which all batches are computed are committed, and all locks are released.
        """
        try:
            for opened, write in self.blocks(self._opened(items)):
                if write is not None:
                    if self.stop is not None and self.stop.requested:
                        raise StopNow
                    _wait_for(self._writing)
                    self._writing = self._writer.submit(write)
                else:
                    opened.computed = True
                    _wait_for(self._committing)
                    self._committing = self._committer.submit(self._commit, opened, self._writing)
            _wait_for(self._writing)
            _wait_for(self._committing)
        finally:
            wait([f for f in (self._writing, self._committing) if f is not None])
            self._writing = self._committing = None
            for opened in list(self._open):
                with suppress(OSError):
                    opened.close()
            self._open.clear()

    def _opened(self, items: Iterable[LockedItem]) -> Iterator[OpenItem]:
        for locked in items:
            try:
                opened = self._open_item(locked)
            except BaseException:
                if locked.lock is not None:
                    locked.lock.release()
                raise
            yield opened

    def _open_item(self, locked: LockedItem) -> OpenItem:
        """Open an item's files and lay out its windows. Rows that the store has already are copied here."""
        item, record = locked.item, self.plan.teachers[locked.item.teacher]
        shard, generation = item.shard, item.generation
        rows = np.arange(shard.first, shard.last)
        positions = self.index.position[rows]
        windows = self._windows(item, rows)
        if record.is_speech:
            self._hash_replaced(windows, shard.first)
        copies = self.reuse.copies(item, windows.input_hash)
        ids = [self.index.id(row) for row in range(shard.first, shard.last)]
        starts, lengths = self.rows.start[shard.first : shard.last], self.rows.length[shard.first : shard.last]
        to_run = windows_without(windows.windows, set(copies))
        batches = self._batches(to_run, generation)
        writer = ItemWriter(self.plan.paths, self.scratch, record, item, starts, lengths, ids)
        opened = OpenItem(locked, writer, windows, batches, ids)
        self._open[opened] = None
        writer.leave_out(np.flatnonzero(positions < 0))
        write_copies(writer, copies)
        self.progress.rows += int(lengths[positions < 0].sum() + lengths[list(copies)].sum())
        return opened

    def _batches(self, windows: list[Window], generation: Generation) -> list[list[Window]]:
        return make_batches(windows, generation.batch_tokens, generation.batch_overhead_tokens, self.passes)

    def _windows(self, item: WorkItem, rows: np.ndarray) -> ItemWindows:
        record, core_tokens = self.plan.teachers[item.teacher], item.generation.core_tokens
        positions = self.index.position[rows]
        if self.texts is None:
            assert isinstance(self.teacher, SpeechTeacher)
            length = np.where(positions < 0, 0, self.rows.length[rows])
            ids, source = [self.index.id(row) for row in rows.tolist()], self.rows.audio_source(rows)
            return self.teacher.windows(ids, length, source, self._known_hashes(item, rows))
        return windows_of(record, item.context, core_tokens, self.texts, self.session, positions)

    def _hash_replaced(self, windows: ItemWindows, first: int) -> None:
        """Read the audio of rows that replace others, whose states are copied if it is the same."""
        for window in windows.windows:
            if self.index.source_of(first + window.kept[0].utterance) >= 0:
                window.hash_samples()

    def _known_hashes(self, item: WorkItem, rows: np.ndarray) -> np.ndarray:
        """uint64 [n]: hashes of the audio of rows of which a layer is committed, 0 for others."""
        shards = {shard for shard, _ in Commits(self.plan.paths, item.teacher, item.context).of}
        committed = np.isin(self.rows.shard_of(rows), [s for s in shards if isinstance(s, int)])
        stored = RawArray(self.plan.paths, item.teacher, "input_hash").read(0)[rows]
        return np.where(committed, stored, np.uint64(0))

    def _commit(self, opened: OpenItem, written: Future[None] | None) -> None:
        opened.commit(written)
        self._open.pop(opened)
        self.progress.items += 1

    def blocks(self, items: Iterable[OpenItem]) -> Iterator[tuple[OpenItem, Callable[[], None] | None]]:
        """Yield (item, what writes a part of it) in the order of the items, and (item, None) after its last part."""
        p = self.progress
        for task, parts in self.threads.run_all(self._tasks(items)):
            opened: OpenItem = task.owner
            p.item, p.model_s = str(opened.item), self.threads.seconds / self.threads.count
            for windows, states in parts:
                yield opened, WriteBlock(opened.writer, windows, states)
                p.rows += sum(k.last - k.first for w in windows for k in w.kept)
                p.fed_tokens += sum(w.size for w in windows)
                p.padded_tokens += len(windows) * max(w.size for w in windows)
                if self.on_progress is not None:
                    self.on_progress(p)
            if task.last:
                yield opened, None

    def _tasks(self, items: Iterable[OpenItem]) -> Iterator[Task | None]:
        for opened in items:
            while len(self._open) > self._most_open:
                if all(other.computed or other is opened for other in self._open):
                    _wait_for(self._committing)
                else:
                    yield None
            norms = {k: tensors(norm, self.teacher.device) for k, norm in self.norms(opened.item).items()}
            encode = Encode(opened.writer, norms)
            batches = opened.batches or [[]]
            for number, batch in enumerate(batches, start=1):
                yield Task(batch, opened.item.layers, encode, opened.item, opened, number == len(batches), opened.ids)

    def norms(self, item: WorkItem) -> Norms:
        """Return what quantises the states of an int8 or pq store; {} for others. The first item computes it."""
        return norms_before_states(self.plan, item, self.sample, self.scratch) if self.rows.dtype.quantised else {}

    def sample(self, item: WorkItem, rows: np.ndarray, layers: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """Yield (row, {layer: float32 [n, D]}) of the tokens of some rows in the item's context, in parts."""
        windows = self._windows(item, rows)
        generation = item.generation

        def keep(states: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
            return {k: v.float().cpu().numpy() for k, v in states.items()}

        batches = self._batches(windows.windows, generation)
        for part, states in self.threads.run(batches, layers, keep, item):
            for b, window in enumerate(part):
                for kept in window.kept:
                    places = slice(kept.at, kept.at + kept.last - kept.first)
                    yield int(rows[kept.utterance]), {k: block[b, places] for k, block in states.items()}


@dataclass(frozen=True)
class Encode:
    """Encodes the states of a batch as they are stored. The model's thread calls it."""

    writer: ItemWriter
    norms: dict[int, tuple[torch.Tensor, ...]]

    def __call__(self, states: dict[int, torch.Tensor]) -> EncodedStates:
        narrow = self.writer.dtype.quantised or self.writer.dtype.logical == "float16"
        return {
            k: (encode_tensor(v, self.writer.dtype, self.norms.get(k)), largest_of(v) if narrow else math.nan)
            for k, v in states.items()
        }


@dataclass(frozen=True)
class WriteBlock:
    """Writes the states of a batch of windows, {layer: [B, T, ...]}, into a work item's files."""

    writer: ItemWriter
    windows: list[Window]
    states: EncodedStates

    def __call__(self) -> None:
        for layer, (block, largest) in self.states.items():
            for b, window in enumerate(self.windows):
                for kept in window.kept:
                    places = slice(kept.at, kept.at + kept.last - kept.first)
                    self.writer.write(layer, kept.utterance, kept.first, block[b, places], largest)


def _wait_for(future: Future[None] | None) -> None:
    """Wait for a thread's work, and raise its error."""
    if future is not None:
        future.result()

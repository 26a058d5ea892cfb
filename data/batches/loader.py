"""Batches for training: features, ASR units and teacher targets, read some batches ahead in a thread.

Invariant: a batch depends on its plan alone, whoever reads it. The thread, not worker processes, because reading is a
copy into arrays that the trainer uses where they lie; what processes read has to be copied once more. They are there
for machines whose one thread does not keep up. Exercised by `stillhouse train`.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils import signal_handling

from ..errors import CorpusError, StillhouseError
from ..features.compute import FeatureFile
from ..manifest import Corpus, Utterance
from ..text import transform
from ..units import Units
from .sampler import BatchPlan, BatchSampler


@dataclass(frozen=True)
class Batch:
    """Features are plain fbank; padding is 0. `transfer` is the target reader's batch, or None; `share` and `part` are
    `BatchPlan`'s: how much, and what, of a batch shared out among ranks this is.
    """

    ids: list[str]
    features: Tensor  # float32 [B, T, bins]
    feature_lengths: Tensor  # int64 [B]
    targets: Tensor  # int32 [B, U]
    target_lengths: Tensor  # int32 [B]
    transfer: Any
    read_s: float
    teacher_s: float
    share: float = 1.0
    part: tuple[int, range] | None = None

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        # Lengths and targets stay on the CPU: the loss checks them there without a synchronisation.
        features = self.features.pin_memory().to(device, non_blocking=True)
        transfer = None if self.transfer is None else self.transfer.pin_memory().to(device, non_blocking=True)
        return replace(self, features=features, transfer=transfer)


class BatchLoader:
    """Makes a Batch of a BatchPlan over `utterances`, in the order given.

    Utterances with empty text or more than `max_frames` frames at some speed are left out; `left_out` counts them.
    `untranscribed` keeps empty texts, for decoding. Raises CorpusError where nothing is left,
    FeatureError for an utterance without features.
    """

    def __init__(
        self,
        corpus: Corpus,
        features: FeatureFile,
        units: Units,
        *,
        speeds: Sequence[float] = (1.0,),
        max_frames: int = 0,
        targets: Any = None,
        untranscribed: bool = False,
    ) -> None:
        self.features, self.units, self.speeds, self.targets = features, units, list(speeds), targets
        everyone = [u.id for u in corpus.utterances]
        frames = np.stack([features.frames(everyone, [s] * len(everyone)) for s in self.speeds], axis=1)
        encoded = [units.encode(u.text) for u in corpus.utterances]
        empty = np.array([len(e.ids) == 0 and not untranscribed for e in encoded], dtype=bool)
        long = (frames.max(axis=1) > max_frames) if max_frames and len(everyone) else np.zeros(len(everyone), bool)
        keep = np.flatnonzero(~(empty | long))
        self.left_out = {
            "empty text": int(empty.sum()),
            f"longer than {max_frames} frames": int((long & ~empty).sum()),
        }
        if not len(keep):
            raise CorpusError(
                "no utterance to use",
                where=corpus.path,
                expected="one with text and fewer frames than data.max_frames",
            )
        self.utterances: list[Utterance] = [corpus.utterances[i] for i in keep]
        self.encoded = [encoded[i] for i in keep]
        self.frames = frames[keep]

    def shared(self, rank: int, size: int) -> BatchLoader:
        """Every `size`-th utterance, from `rank` on; it may be none."""
        other = copy.copy(self)
        mine = slice(rank, None, size)
        other.utterances, other.encoded, other.frames = self.utterances[mine], self.encoded[mine], self.frames[mine]
        return other

    def load(self, plan: BatchPlan) -> Batch:
        began = time.perf_counter()
        utterances = [self.utterances[i] for i in plan.indices]
        encoded = [self.encoded[i] for i in plan.indices]
        ids = [u.id for u in utterances]
        packed, lengths = self.features.gather(ids, [self.speeds[s] for s in plan.speeds])
        # Memory of torch's: NumPy's starts anywhere, and matrix products round as their operands lie
        padded = torch.zeros(len(ids), int(lengths.max()), packed.shape[1])
        features = padded.numpy()
        features[np.arange(features.shape[1]) < lengths[:, None]] = packed
        target_lengths = np.array([len(e.ids) for e in encoded], dtype=np.int32)
        targets = np.zeros((len(ids), int(target_lengths.max())), dtype=np.int32)
        targets[np.arange(targets.shape[1]) < target_lengths[:, None]] = np.concatenate([e.ids for e in encoded])
        read = time.perf_counter()
        transfer = None
        if self.targets is not None:
            texts, spans = [u.text for u in utterances], [e.spans for e in encoded]
            transfer = self.targets.read(ids, texts, spans, step=plan.number)
        return Batch(
            ids,
            padded,
            torch.from_numpy(np.asarray(lengths, dtype=np.int64)),
            torch.from_numpy(targets),
            torch.from_numpy(target_lengths),
            transfer,
            read - began,
            time.perf_counter() - read,
            plan.share,
            plan.part,
        )

    def references(self, plan: BatchPlan) -> list[str]:
        """The transcripts as the units spell them: what a hypothesis is compared with."""
        return [transform(self.utterances[i].text, self.units.transform).text for i in plan.indices]


def plans_from(sampler: BatchSampler, epoch: int, position: int) -> Generator[tuple[int, int, BatchPlan], None, None]:
    """Endless (epoch, position after this batch, plan), from `position` batches into `epoch` on."""
    while True:
        plans = sampler.epoch(epoch)
        for i in range(position, len(plans)):
            yield epoch, i + 1, plans[i]
        epoch, position = epoch + 1, 0


class _Plans(torch.utils.data.Sampler):
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __iter__(self) -> Generator[tuple[int, int, BatchPlan], None, None]:
        return plans_from(*self.arguments)


class _Batches(torch.utils.data.Dataset):
    """An exception travels as an item: a DataLoader would make another one of it."""

    def __init__(self, load: Callable[[BatchPlan], Batch]) -> None:
        self.load = load

    def __getitem__(self, item: tuple[int, int, BatchPlan]) -> Any:
        epoch, position, plan = item
        try:
            return epoch, position, self.load(plan)
        except Exception as e:
            return e


def _as_it_is(item: Any) -> Any:
    return item


def _end_with_parent(worker: int) -> None:
    """In each worker: it ends when its parent does.

    The DataLoader's own watch takes the parent's number when the worker begins to serve, so a parent killed before
    that leaves a worker which waits for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="stillhouse-parent", daemon=True).start()


def _started(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """Its batches, without the handler by which a worker's death raises RuntimeError wherever the main thread is, as in
    the middle of a checkpoint. `next` notices a death too, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        from_torch = getattr(before, "__module__", None) == signal_handling.__name__  # of an earlier DataLoader
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None or from_torch else before)
    return items


def with_workers(
    sampler: BatchSampler,
    load: Callable[[BatchPlan], Batch],
    *,
    epoch: int,
    position: int,
    workers: int,
    start: str = "spawn",
    depth: int = 4,
) -> Generator[tuple[int, int, Batch], None, None]:
    """The same as `prefetch`, read by a DataLoader's processes. `start`: "spawn" or "fork"; with "spawn", `load` must
    be picklable. StillhouseError: one of them was killed.
    """
    loader = torch.utils.data.DataLoader(
        _Batches(load),
        batch_size=None,
        sampler=_Plans(sampler, epoch, position),
        num_workers=workers,
        prefetch_factor=max(1, depth // workers),
        multiprocessing_context=start,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_parent,
    )
    items = _started(loader)
    while True:
        try:
            item = next(items)
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise StillhouseError(
                f"a process that reads batches is gone, as where memory is short: {str(e).splitlines()[0]}",
                remedy="set fewer data.workers, or 0; the same command again goes on from the last checkpoint",
            ) from None
        if isinstance(item, Exception):
            raise item
        yield item


def prefetch(
    sampler: BatchSampler, load: Callable[[BatchPlan], Batch], *, epoch: int, position: int, depth: int = 4
) -> Generator[tuple[int, int, Batch], None, None]:
    """Endless (epoch, position after this batch, batch), from `position` batches into `epoch` on.

    An exception in the thread is raised here, at the batch where it happened. Closing the iterator ends the thread.
    """
    results: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: object) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for at_epoch, at, plan in plans_from(sampler, epoch, position):
                if not offer((at_epoch, at, load(plan))):
                    return
        except BaseException as e:
            offer(e)

    thread = threading.Thread(target=work, name="stillhouse-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = results.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()

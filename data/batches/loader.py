"""Batches for training: features, ASR units and teacher targets, read ahead in a thread.

Guarantees: a batch depends on its plan alone.
Try: `stillhouse train`.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CorpusError, first_few
from ..features.file import FeatureFile
from ..features.settings import FBANK_HZ, is_encoder
from ..manifest import Corpus, Utterance
from ..units import UNKNOWN, UNKNOWN_PIECE, Units
from .sampler import BatchPlan, BatchSampler

JOIN_S = 5.0  # A read from a slow disk does not keep a run from its end for longer. The thread ends after it.


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch. Features are as stored, padding is 0, `share` and `part` as in `BatchPlan`.

    A batch of texts without audio has no frames.
    """

    ids: list[str]
    features: Tensor  # float32 [B, T, bins]
    feature_lengths: Tensor  # int64 [B]
    targets: Tensor  # int32 [B, U]
    target_lengths: Tensor  # int32 [B]
    transfer: dict[str, Any]  # the target readers' batches, by transfer
    read_s: float  # seconds spent on features and units
    teacher_s: float  # seconds spent on teacher targets
    share: float = 1.0
    part: tuple[int, range] | None = None
    frame_hz: float = FBANK_HZ
    mel: bool = True  # whether a frame has the energies of mel bins

    def to(self, device: torch.device) -> Batch:
        """Return the batch with features and targets of the transfer loss on a device, copied from pinned memory."""
        if device.type == "cpu":
            return self
        # Lengths and targets stay on the CPU: the loss checks them there without a synchronisation.
        features = (self.features.pin_memory() if self.features.numel() else self.features).to(
            device, non_blocking=True
        )
        transfer = {k: t.pin_memory().to(device, non_blocking=True) for k, t in self.transfer.items()}
        return replace(self, features=features, transfer=transfer)


class BatchLoader:
    """Make a `Batch` of each `BatchPlan` over `utterances`. Plans name `speeds` by index.

    Utterances without audio are left out, and so are those with more than `max_frames` at some speed (0: no limit) and
    empty texts, unless `untranscribed` keeps these for decoding. With `unit_frames`, each unit needs so many frames of
    its own, and the utterance some more: others are left out, too. `left_out` counts them by the reason, and
    CorpusError is raised if no utterance is left.
    Plans name noisy copies up to `copies`, all of which have to be there. `targets` has the `TargetReader` of each
    transfer, by name.
    """

    def __init__(
        self,
        corpus: Corpus,
        features: FeatureFile,
        units: Units,
        *,
        speeds: Sequence[float] = (1.0,),
        copies: int = 0,
        max_frames: int = 0,
        unit_frames: int = 0,
        targets: Mapping[str, Any] | None = None,
        untranscribed: bool = False,
    ) -> None:
        self.features, self.units, self.speeds, self.targets = features, units, list(speeds), targets or {}
        spoken = with_sound(corpus, features)
        ids = [u.id for u in spoken]
        frames = np.stack([features.frames(ids, [s] * len(ids)) for s in self.speeds], axis=1)
        encoded = [units.encode(u.text) for u in spoken]
        empty = np.array([len(e.ids) == 0 and not untranscribed for e in encoded], dtype=bool)
        long = (frames.max(axis=1) > max_frames) if max_frames and len(ids) else np.zeros(len(ids), bool)
        needed = np.array([len(e.ids) * unit_frames for e in encoded])
        dense = (needed >= frames.min(axis=1)) & ~long if unit_frames and len(ids) else np.zeros(len(ids), bool)
        keep = np.flatnonzero(~(empty | long | dense))
        self.left_out = {
            "without audio": len(corpus) - len(spoken),
            "empty text": int(empty.sum()),
            f"longer than {max_frames} frames": int((long & ~empty).sum()),
            "with more units than encoder states": int((dense & ~empty).sum()),
        }
        if not len(keep) and dense.any():
            remedy = "use longer word pieces, or a smaller model.subsampling"
            raise CorpusError("all transcripts have more units than encoder states", where=corpus.path, remedy=remedy)
        if not len(keep):
            expected = "one with text and fewer frames than data.max_frames"
            raise CorpusError("no utterance to use", where=corpus.path, expected=expected)
        self.utterances: list[Utterance] = [spoken[i] for i in keep]
        self.encoded = [encoded[i] for i in keep]
        self.frames, self.copies = frames[keep], copies
        for speed in self.speeds:
            for copy_ in range(1, copies + 1):
                features.numbers([u.id for u in self.utterances], speed, copy_)

    def shared(self, rank: int, size: int) -> BatchLoader:
        """Return a loader of every `size`-th utterance from number `rank` on. It may have none."""
        return self.only(range(rank, len(self.utterances), size))

    def only(self, numbers: Sequence[int]) -> BatchLoader:
        """Return a loader of the utterances with these numbers. It may have none."""
        other = copy.copy(self)
        other.utterances = [self.utterances[i] for i in numbers]
        other.encoded = [self.encoded[i] for i in numbers]
        other.frames = self.frames[np.asarray(numbers, np.int64)]
        return other

    def load(self, plan: BatchPlan) -> Batch:
        """Read the batch of a plan."""
        begun = time.perf_counter()
        utterances = [self.utterances[i] for i in plan.indices]
        encoded = [self.encoded[i] for i in plan.indices]
        ids = [u.id for u in utterances]
        speeds = [self.speeds[s] for s in plan.speeds]
        packed, lengths = self.features.gather(ids, speeds, 0 if plan.copies is None else plan.copies.tolist())
        # torch aligns its memory, NumPy does not, and matrix products round differently by alignment.
        padded = torch.zeros(len(ids), int(lengths.max()), packed.shape[1])
        features = padded.numpy()
        features[np.arange(features.shape[1]) < lengths[:, None]] = packed
        targets, target_lengths = padded_units([e.ids for e in encoded])
        read = time.perf_counter()
        texts, spans = [u.text for u in utterances], [e.spans for e in encoded]
        at = {"step": plan.number, "rows": lengths, "speeds": speeds}
        transfer = {k: reader.read(ids, texts, spans, **at) for k, reader in self.targets.items()}
        return Batch(
            ids,
            padded,
            torch.from_numpy(np.asarray(lengths, dtype=np.int64)),
            targets,
            target_lengths,
            transfer,
            read - begun,
            time.perf_counter() - read,
            plan.share,
            plan.part,
            self.features.frame_times.hz,
            not is_encoder(self.features.settings),
        )

    @property
    def without(self) -> str:
        """What is left out, and which transcripts have symbols that the units lack, in words."""
        found = ", ".join(f"{n} {why}" for why, n in self.left_out.items() if n) or "none"
        unknown = [u.id for u, e in zip(self.utterances, self.encoded) if UNKNOWN in e.ids]
        named = f"; {len(unknown)} learn symbols that the units lack as {UNKNOWN_PIECE}: {first_few(unknown, 3)}"
        return f"left out: {found}{named if unknown else ''}"

    def references(self, plan: BatchPlan) -> list[str]:
        """Return the transcripts as the units spell them, to compare hypotheses with."""
        return [self.units.normalise(self.utterances[i].text).text for i in plan.indices]


def padded_units(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the units of some utterances, int32 [B, U], and how many each has, int32 [B]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    units = np.zeros((len(rows), int(lengths.max())), dtype=np.int32)
    units[np.arange(units.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(units), torch.from_numpy(lengths)


def with_sound(corpus: Corpus, features: FeatureFile) -> list[Utterance]:
    """Return the utterances that have audio, or at least features. Raises CorpusError if all are text alone."""
    if all(u.audio is not None for u in corpus.utterances):
        return corpus.utterances
    rows = set(features.ids)
    spoken = [u for u in corpus.utterances if u.audio is not None or u.id in rows]
    if not spoken:
        of = f" of split {corpus.split}" if corpus.split is not None else ""
        what = f"none of the {len(corpus)} utterances{of} has audio, for example {corpus.utterances[0].id}"
        raise CorpusError(what, where=corpus.path, expected="a split with audio")
    return spoken


def plans_from(sampler: BatchSampler, epoch: int, position: int) -> Generator[tuple[int, int, BatchPlan], None, None]:
    """Yield (epoch, position after this batch, plan) without end, from `position` batches into `epoch` on."""
    while True:
        plans = sampler.epoch(epoch)
        for i in range(position, len(plans)):
            yield epoch, i + 1, plans[i]
        epoch, position = epoch + 1, 0


def prefetch(
    sampler: BatchSampler, load: Callable[[BatchPlan], Batch], *, epoch: int, position: int, depth: int = 4
) -> Generator[tuple[int, int, Batch], None, None]:
    """Yield (epoch, position after this batch, batch) without end. A thread reads up to `depth` batches ahead.

    An exception of the thread is raised at the batch where it happened. Closing the generator ends the thread.
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
        thread.join(JOIN_S)

"""Batch plans: length buckets filled to a budget of frames, in shuffled order.

Guarantees: the batches of an epoch depend on seed, epoch, lengths, shards and settings alone. A run therefore resumes
from a position in an epoch, also with another number of ranks, because ranks share each batch out.
Try: `pytest tests/data/batches/test_sampler.py`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

MIX_SHARDS = 16  # All of a small corpus is mixed, because it has no more shards than this.


@dataclass(frozen=True)
class BatchPlan:
    """One rank's part of a batch.

    `share` is the part's share of the batch's utterances. Means over the parts, weighted by it, add up to the mean over
    the batch. 0 marks a placeholder on a rank without an utterance, which must not count.
    """

    indices: np.ndarray  # int64 [B], utterances
    speeds: np.ndarray  # int64 [B], the index of each utterance's speed
    number: int  # of the batch: the same on all ranks and unique in a run
    share: float = 1.0
    part: tuple[int, range] | None = None  # how many utterances the batch has, and which these are; None: all
    copies: np.ndarray | None = None  # int64 [B], which noisy copy of each utterance, 0 for the clean one; None: all 0


class BatchSampler:
    """Plan batches of at most `max_frames` padded frames over all ranks, from utterances of similar length.

    A batch has at most `max_count` utterances (0: no limit).
    `frames`, int64 [U, S], are the lengths of every utterance at every speed. `shards`, int64 [U], are the shards of
    the utterances. About `mix` of them are mixed at a time, drawn again in each epoch, so that reads stay close (0:
    all). In an epoch, an utterance is one of its `copies` noisy copies with a probability of `noise`. Without
    `shuffle`, every utterance comes once at speed 0 and without noise, longest first, for decoding. A rank gets every
    `world_size`-th utterance of each batch, so that parts have similar lengths.
    """

    def __init__(
        self,
        frames: np.ndarray,
        *,
        max_frames: int,
        max_count: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        shards: np.ndarray | None = None,
        mix: int = MIX_SHARDS,
        noise: float = 0.0,
        copies: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}", expected="a rank from 0 to world_size - 1")
        self.frames = np.asarray(frames, dtype=np.int64)
        self.max_frames, self.max_count, self.seed, self.shuffle = max_frames, max_count, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.noise, self.copies = noise, copies
        self._windows, self._shard = 1, None
        if shuffle and mix and shards is not None and len(shards):
            numbers, shard = np.unique(shards, return_inverse=True)
            self._windows = max(1, round(len(numbers) / mix))
            self._shard = shard if self._windows > 1 else None

    def shared(self, rank: int, world_size: int) -> BatchSampler:
        """Return the sampler of one of `world_size` ranks, which share the same batches."""
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}", expected="a rank from 0 to world_size - 1")
        other = copy.copy(self)
        other.rank, other.world_size = rank, world_size
        return other

    def epoch(self, number: int) -> list[BatchPlan]:
        """Return this rank's parts of all batches of an epoch, in order. Every rank gets the same number."""
        count, speeds = self.frames.shape
        rng = np.random.default_rng([self.seed, number])
        speed = np.asarray(rng.integers(speeds, size=count) if self.shuffle else np.zeros(count, dtype=np.int64))
        length = self.frames[np.arange(count), speed]
        # With a jitter of a few per cent, batches differ between epochs and the padding stays small.
        key = length * rng.uniform(0.95, 1.05, size=count) if self.shuffle else length
        order: np.ndarray = np.argsort(-key, kind="stable")
        batches: list[np.ndarray] = []
        for window in self._order_by_window(order, rng):
            cut = self._cut(window, length)
            batches += [cut[i] for i in rng.permutation(len(cut)).tolist()] if self.shuffle else cut
        noisy = self._draw_copies(number)
        return [self._part(b, speed, noisy, (number << 32) + i) for i, b in enumerate(batches)]

    def _draw_copies(self, number: int) -> np.ndarray | None:
        """Draw which noisy copy each utterance of an epoch is, if any, apart from the draws of all else."""
        if not self.noise or not self.shuffle:
            return None
        rng, count = np.random.default_rng([self.seed, number, 1]), len(self.frames)
        return np.where(rng.random(count) < self.noise, rng.integers(1, self.copies + 1, size=count), 0)

    def _order_by_window(self, order: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Split `order` by a new draw of the shards that are mixed together."""
        if self._shard is None:
            return [order]
        shards = int(self._shard.max()) + 1
        place = rng.permutation(shards)
        window = place[self._shard[order]] * self._windows // shards
        return [order[window == w] for w in range(self._windows)]

    def _cut(self, order: np.ndarray, length: np.ndarray) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        begin, longest = 0, 0
        for i, index in enumerate(order):
            longest = max(longest, int(length[index]))
            size = i - begin + 1
            if size > 1 and (longest * size > self.max_frames or 0 < self.max_count < size):
                batches.append(order[begin:i])
                begin, longest = i, int(length[index])
        if begin < len(order):
            batches.append(order[begin:])
        return batches

    def _part(self, batch: np.ndarray, speed: np.ndarray, noisy: np.ndarray | None, number: int) -> BatchPlan:
        places = range(self.rank, len(batch), self.world_size)
        share = len(places) / len(batch)
        if not places:
            places = range(len(batch) - 1, len(batch))
        own = batch[places.start :: places.step]
        part = None if share == 1 else (len(batch), places)
        return BatchPlan(own, speed[own], number, share, part, None if noisy is None else noisy[own])

"""Which utterances, at which speed, make up which batch: length buckets filled to a budget of frames.

Invariant: the batches of an epoch depend on (seed, epoch, lengths, shards, settings) alone, so a position in an epoch
is all the state there is, and a resumed run sees exactly the batches that it would have seen; with another number of
ranks, too, for ranks share out each batch and never change it. Exercised by `stillhouse train`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

MIX_SHARDS = 16  # a corpus has about that many unless it is large: then all of it is mixed


@dataclass(frozen=True)
class BatchPlan:
    """One rank's part of a batch: utterance indices [B], the index of each one's speed [B], and a number that no
    other batch has (all parts of one batch have the same).

    `share` is the part's share of the batch's utterances: weighted by it, means over the parts add up to the mean
    over the batch. 0 marks a stand-in for a rank that is left without an utterance: it must not count.
    `part` is the number of utterances in the whole batch, and which of them these are; None: all.
    """

    indices: np.ndarray
    speeds: np.ndarray
    number: int
    share: float = 1.0
    part: tuple[int, range] | None = None


class BatchSampler:
    """Batches of at most `max_frames` padded frames, of utterances of like length, in a shuffled order.

    frames      int64 [U, S]: the length of every utterance at every speed, in acoustic frames
    shards      int64 [U]: which shard an utterance is read from. About `mix` shards, drawn anew each epoch, are
                shuffled together before the next ones are begun, so that reading stays near. None, or mix = 0: all
    rank, world_size
                this process gets its part of each batch: every `world_size`-th utterance, so that all parts have
                about the same lengths; the budget is that of the whole batch
    shuffle     False: every utterance comes once at speed 0, longest first (for decoding)
    """

    def __init__(
        self,
        frames: np.ndarray,
        *,
        max_frames: int,
        seed: int = 0,
        shuffle: bool = True,
        shards: np.ndarray | None = None,
        mix: int = MIX_SHARDS,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}", expected="a rank from 0 to world_size - 1")
        self.frames = np.asarray(frames, dtype=np.int64)
        self.max_frames, self.seed, self.shuffle = max_frames, seed, shuffle
        self.rank, self.world_size = rank, world_size
        found: tuple[np.ndarray, np.ndarray] | None = None
        if shuffle and mix and shards is not None and len(shards):
            found = np.unique(shards, return_inverse=True)
        self._windows = 1 if found is None else max(1, round(len(found[0]) / mix))
        self._shard = None if found is None or self._windows == 1 else found[1]

    def shared(self, rank: int, world_size: int) -> BatchSampler:
        """The same batches, shared out: the sampler of one of `world_size` ranks."""
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}", expected="a rank from 0 to world_size - 1")
        other = copy.copy(self)
        other.rank, other.world_size = rank, world_size
        return other

    def epoch(self, number: int) -> list[BatchPlan]:
        """This rank's parts of all batches of an epoch, in order: as many for every rank."""
        count, speeds = self.frames.shape
        rng = np.random.default_rng([self.seed, number])
        speed = np.asarray(rng.integers(speeds, size=count) if self.shuffle else np.zeros(count, dtype=np.int64))
        length = self.frames[np.arange(count), speed]
        # Jitter of a few per cent: batches differ between epochs while the padding stays small.
        key = length * rng.uniform(0.95, 1.05, size=count) if self.shuffle else length
        order: np.ndarray = np.argsort(-key, kind="stable")
        batches: list[np.ndarray] = []
        for window in self._order_by_window(order, rng):
            cut = self._cut(window, length)
            batches += [cut[i] for i in rng.permutation(len(cut)).tolist()] if self.shuffle else cut
        return [self._part(b, speed, (number << 32) + i) for i, b in enumerate(batches)]

    def _order_by_window(self, order: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """`order` apart by which shards are mixed, in a new draw of shards."""
        if self._shard is None:
            return [order]
        shards = int(self._shard.max()) + 1
        place = rng.permutation(shards)  # of each shard in this epoch
        window = place[self._shard[order]] * self._windows // shards
        return [order[window == w] for w in range(self._windows)]

    def _cut(self, order: np.ndarray, length: np.ndarray) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        begin, longest = 0, 0
        for i, index in enumerate(order):
            longest = max(longest, int(length[index]))
            size = i - begin + 1
            if size > 1 and longest * size > self.max_frames:
                batches.append(order[begin:i])
                begin, longest = i, int(length[index])
        if begin < len(order):
            batches.append(order[begin:])
        return batches

    def _part(self, batch: np.ndarray, speed: np.ndarray, number: int) -> BatchPlan:
        places = range(self.rank, len(batch), self.world_size)
        share = len(places) / len(batch)
        if not places:
            places = range(len(batch) - 1, len(batch))
        mine = batch[places.start :: places.step]
        return BatchPlan(mine, speed[mine], number, share, None if share == 1 else (len(batch), places))

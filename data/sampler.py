"""Which utterances, at which speed, make up which batch: length buckets filled to a budget of frames.

Invariant: the batches of an epoch depend on (seed, epoch, lengths, settings) alone, so a position in an epoch is all
the state there is, and a resumed run sees exactly the batches that it would have seen.
Exercised by `stillhouse train`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchPlan:
    """One batch: utterance indices [B], the index of each one's speed [B], and a number that no other batch has."""

    indices: np.ndarray
    speeds: np.ndarray
    number: int


class BatchSampler:
    """Batches of at most `max_frames` padded frames, of utterances of like length, in a shuffled order.

    `frames` int64 [U, S]: the length of every utterance at every speed, in acoustic frames. With `shuffle=False`
    every utterance comes once at speed 0, longest first (for decoding).
    """

    def __init__(self, frames: np.ndarray, *, max_frames: int, seed: int = 0, shuffle: bool = True) -> None:
        self.frames = np.asarray(frames, dtype=np.int64)
        self.max_frames, self.seed, self.shuffle = max_frames, seed, shuffle

    def epoch(self, number: int) -> list[BatchPlan]:
        count, speeds = self.frames.shape
        rng = np.random.default_rng([self.seed, number])
        speed = np.asarray(rng.integers(speeds, size=count) if self.shuffle else np.zeros(count, dtype=np.int64))
        length = self.frames[np.arange(count), speed]
        # Jitter of a few per cent: batches differ between epochs while the padding stays small.
        key = length * rng.uniform(0.95, 1.05, size=count) if self.shuffle else length
        order: np.ndarray = np.argsort(-key, kind="stable")
        batches: list[np.ndarray] = []
        begin, longest = 0, 0
        for i, index in enumerate(order):
            longest = max(longest, int(length[index]))
            size = i - begin + 1
            if size > 1 and longest * size > self.max_frames:
                batches.append(order[begin:i])
                begin, longest = i, int(length[index])
        if begin < count:
            batches.append(order[begin:])
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches)).tolist()]
        return [BatchPlan(b, speed[b], (number << 32) + i) for i, b in enumerate(batches)]

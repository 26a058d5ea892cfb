"""Batches: every utterance once an epoch, within the budget, from (seed, epoch) alone."""

from __future__ import annotations

import numpy as np
import pytest

from stillhouse.data.sampler import BatchSampler

FRAMES = np.random.default_rng(0).integers(50, 1500, size=(400, 3))


def test_every_utterance_once_an_epoch_within_the_budget() -> None:
    sampler = BatchSampler(FRAMES, max_frames=6_000, seed=3)
    batches = sampler.epoch(5)
    assert sorted(np.concatenate([b.indices for b in batches]).tolist()) == list(range(400))
    kept = padded = 0
    for b in batches:
        lengths = FRAMES[b.indices, b.speeds]
        assert len(b.indices) * lengths.max() <= 6_000
        kept, padded = kept + lengths.sum(), padded + len(lengths) * lengths.max()
    assert kept / padded > 0.9
    assert {int(s) for b in batches for s in b.speeds} == {0, 1, 2}


def test_an_epoch_follows_from_its_seed_and_number() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        batches = BatchSampler(FRAMES, max_frames=6_000, seed=seed).epoch(epoch)
        return np.concatenate([np.stack([b.indices, b.speeds]) for b in batches], axis=1).ravel().tolist()

    assert flat(1, 2) == flat(1, 2)
    assert len({tuple(flat(seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4


def test_an_utterance_over_the_budget_is_a_batch_of_its_own() -> None:
    batches = BatchSampler(np.array([[10], [900], [20]]), max_frames=100).epoch(0)
    assert sorted(b.indices.tolist() for b in batches if len(b.indices) == 1) == [[1]]


def test_without_shuffling_the_longest_come_first_at_the_first_speed() -> None:
    batches = BatchSampler(FRAMES, max_frames=6_000, shuffle=False).epoch(9)
    assert not any(b.speeds.any() for b in batches)
    assert (np.diff(np.concatenate([FRAMES[b.indices, 0] for b in batches])) <= 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_few_utterances(count: int) -> None:
    assert len(BatchSampler(np.full((count, 1), 7), max_frames=100).epoch(0)) == count

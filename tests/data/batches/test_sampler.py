"""Every utterance is in one batch of an epoch, within the budget. Seed and epoch decide, for any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.batches.sampler import BatchPlan, BatchSampler
from stillhouse.data.errors import UsageError

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


def whole(parts: list[BatchPlan]) -> dict[int, int]:
    """{utterance: speed} of the parts of one batch; a stand-in counts for nothing."""
    pairs = [(int(u), int(s)) for p in parts if p.share for u, s in zip(p.indices, p.speeds)]
    assert len(pairs) == len(dict(pairs))  # disjoint
    return dict(pairs)


CORPORA = st.lists(st.integers(1, 300), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(lengths=CORPORA, world=st.integers(1, 6), budget=st.integers(50, 2_000), mix=st.integers(0, 4))
def test_ranks_share_out_the_batches_of_one_process(lengths: list[int], world: int, budget: int, mix: int) -> None:
    """Equal in steps, disjoint, and at every step together what one process gets: so any number of ranks may resume."""
    frames = np.stack([lengths, np.array(lengths) * 2], axis=1)
    setting = {"max_frames": budget, "seed": 2, "shards": np.arange(len(lengths)) // 7, "mix": mix}
    one = BatchSampler(frames, **setting).epoch(3)
    ranks = [BatchSampler(frames, rank=r, world_size=world, **setting).epoch(3) for r in range(world)]
    assert {len(steps) for steps in ranks} == {len(one)}
    for single, *parts in zip(one, *ranks):
        assert whole(parts) == whole([single]) and single.share == 1
        assert {p.number for p in parts} == {single.number}
        assert sum(p.share for p in parts) == pytest.approx(1) and all(len(p.indices) for p in parts)
        sizes = [len(p.indices) if p.share else 0 for p in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [p.share for p in parts] == [n / sum(sizes) for n in sizes]
    assert sorted(u for b in one for u in whole([b])) == list(range(len(lengths)))


def test_parts_of_a_batch_have_like_lengths() -> None:
    """The ranks of a step wait for the slowest."""
    ranks = [BatchSampler(FRAMES, max_frames=30_000, rank=r, world_size=4).epoch(0) for r in range(4)]
    for parts in zip(*ranks):
        padded = [FRAMES[p.indices, p.speeds].max() * len(p.indices) for p in parts]
        assert max(padded) <= 1.35 * min(padded)


def test_few_shards_at_a_time() -> None:
    """Any part of an epoch reads few shards, each epoch others, and the lengths still fit."""
    shards = np.arange(4_000) // 100
    frames = np.random.default_rng(1).integers(50, 1500, size=(4_000, 1))
    sampler = BatchSampler(frames, max_frames=12_000, seed=1, shards=shards, mix=5)
    mixed = []
    for epoch in (0, 1):
        batches = sampler.epoch(epoch)
        assert sorted(np.concatenate([b.indices for b in batches]).tolist()) == list(range(4_000))
        kept = frames.sum() / sum(len(b.indices) * frames[b.indices].max() for b in batches)
        assert kept > 0.9
        seen = [set(shards[b.indices].tolist()) for b in batches]
        # The batches of a window, as sets of shards, do not touch those of another one: 8 components of 5.
        groups: list[set[int]] = []
        for own in seen:
            touching = [g for g in groups if g & own]
            groups = [g for g in groups if not g & own] + [own.union(*touching)]
        assert sorted(map(len, groups)) == [5] * 8
        order = [next(i for i, g in enumerate(groups) if own <= g) for own in seen]
        assert sum(a != b for a, b in itertools.pairwise(order)) == 7  # one after the other
        mixed.append(sorted(sorted(g) for g in groups))
    assert mixed[0] != mixed[1]


def test_few_shards_change_nothing() -> None:
    def flat(**more: object) -> list[list[int]]:
        return [b.indices.tolist() for b in BatchSampler(FRAMES, max_frames=6_000, **more).epoch(1)]  # type: ignore

    assert flat(shards=np.arange(400) // 25, mix=16) == flat(shards=np.arange(400) // 25, mix=0) == flat()
    assert flat(shards=np.arange(400) // 25, mix=8) != flat()


def test_a_rank_outside_the_world() -> None:
    with pytest.raises(UsageError, match="rank 2 of 2"):
        BatchSampler(FRAMES, max_frames=6_000, rank=2, world_size=2)

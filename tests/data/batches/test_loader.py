"""The ranks of a distributed run read together the batches of one process, from any position on."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from stillhouse.data.batches.loader import Batch, BatchLoader, prefetch
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.features.compute import FeatureFile
from stillhouse.data.manifest import read_manifest
from stillhouse.data.units import load_units


@pytest.fixture(scope="module")
def loader(tones: Path) -> BatchLoader:
    corpus = read_manifest(tones / "corpus.jsonl").select("train")
    return BatchLoader(corpus, FeatureFile(tones / "features.h5"), load_units(tones / "units"), speeds=(1.0, 1.1))


def batches(loader: BatchLoader, rank: int, world: int, epoch: int, position: int, count: int) -> list[Batch]:
    sampler = BatchSampler(loader.frames, max_frames=1200, seed=4, rank=rank, world_size=world)
    with closing(prefetch(sampler, loader.load, epoch=epoch, position=position)) as stream:
        return [batch for _, _, batch in islice(stream, count)]


def test_ranks_read_the_batches_of_one_process(loader: BatchLoader) -> None:
    """A run of one rank resumes as one of three in the middle of an epoch, and over its end."""
    steps = len(BatchSampler(loader.frames, max_frames=1200, seed=4).epoch(0)) + 3
    one = batches(loader, 0, 1, 0, 0, steps)
    ranks = [batches(loader, r, 3, 0, 5, steps - 5) for r in range(3)]
    for whole, *parts in zip(one[5:], *ranks, strict=True):
        counted = [p for p in parts if p.share]
        assert sorted(i for p in counted for i in p.ids) == sorted(whole.ids)
        assert sum(p.share for p in parts) == pytest.approx(1)
        # What a mean over the batch is made of: means over the parts, weighted by their shares.
        mean = sum(p.share * p.feature_lengths.double().mean() for p in parts)
        assert float(mean) == pytest.approx(float(whole.feature_lengths.double().mean()))
        rows = {i: (whole.features[k, : whole.feature_lengths[k]], whole.targets[k]) for k, i in enumerate(whole.ids)}
        for p in counted:
            for k, i in enumerate(p.ids):
                assert torch.equal(p.features[k, : p.feature_lengths[k]], rows[i][0])

"""What the ranks of a distributed run read: together the batches of one process, from any position on."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from stillhouse.data.batches.loader import Batch, BatchLoader, prefetch, with_workers
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.errors import StillhouseError
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
    """A run of one rank goes on as one of three in the middle of an epoch, and over its end."""
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


@pytest.mark.parametrize("first", [False, True])
def test_a_killed_reader_ends_the_run_in_words(loader: BatchLoader, first: bool) -> None:
    """Whether or not a DataLoader of somebody else has set its handler for a worker's death in this process."""
    if first:
        list(torch.utils.data.DataLoader([1, 2], num_workers=1, multiprocessing_context="fork"))  # type: ignore[arg-type]
    sampler = BatchSampler(loader.frames, max_frames=1200, seed=4)
    before = {p.pid for p in multiprocessing.active_children()}
    with closing(with_workers(sampler, loader.load, epoch=0, position=0, workers=1, start="fork")) as stream:
        next(stream)
        (reader,) = (p for p in multiprocessing.active_children() if p.pid not in before)
        reader.kill()
        while reader.exitcode is None:
            time.sleep(0.01)  # where nothing is raised, nor anywhere but where batches are asked for
        with pytest.raises(StillhouseError, match=r"a process that reads batches is gone.*data\.workers"):
            for _ in range(20):
                next(stream)


ORPHANS = """
import os, signal, time
from contextlib import suppress
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.batches import loader

end_with_parent, parent = loader._end_with_parent, os.getpid()

def killed_early(worker):
    with suppress(ProcessLookupError):  # the other worker was first
        os.kill(parent, signal.SIGKILL)
    time.sleep(0.2)
    end_with_parent(worker)

loader._end_with_parent = killed_early
sampler = BatchSampler([100] * 9, max_frames=300, seed=4)
next(loader.with_workers(sampler, id, epoch=0, position=0, workers=2, start="fork"))
"""


def test_readers_end_with_a_run_killed_while_they_start() -> None:
    """They hold the run's output, so whoever waits for its end would wait for ever."""
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr

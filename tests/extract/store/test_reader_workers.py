"""Batches read by a thread and by worker processes are the same, wherever reading begins."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.batches.loader import prefetch, with_workers
from stillhouse.data.batches.sampler import BatchPlan, BatchSampler
from stillhouse.data.errors import NoStoreError
from stillhouse.distill.targets import TargetReader
from stillhouse.extract.store import Store

from ..conftest import TEXTS

USED = [i for i, text in enumerate(TEXTS * 3) if text]


class Reads:
    """What a BatchLoader does of it: targets of a plan's utterances. Unknown ids where `lost`."""

    def __init__(self, root: Path, lost: bool = False) -> None:
        self.store, self.lost = Store.open(root, checksums=True), lost
        self.targets = TargetReader([(self.store, self.store.resolve("bert/*/0,2"))])

    def __call__(self, plan: BatchPlan) -> Any:
        which = [USED[i] for i in plan.indices]
        ids = ["nobody" if self.lost and plan.number == 3 else f"u{i}" for i in which]
        return ids, self.targets.read(ids, [(TEXTS * 3)[i] for i in which], step=plan.number).targets


def sampler() -> BatchSampler:
    return BatchSampler(np.arange(10, 10 + len(USED))[:, None], max_frames=100, seed=1)


def taken(batches: Any, count: int = 9) -> list[tuple[int, int, list[str], dict[str, torch.Tensor]]]:
    found = [(epoch, position, *batch) for epoch, position, batch in islice(batches, count)]
    batches.close()
    return found


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_thread_reads(small_store: Path, start: str) -> None:
    """Over the end of an epoch; after the parent has read (a fork inherits its open files)."""
    load, last = Reads(small_store), len(sampler().epoch(0)) - 4
    want = taken(prefetch(sampler(), load, epoch=0, position=last))
    got = taken(with_workers(sampler(), load, epoch=0, position=last, workers=2, start=start))
    assert [x[:3] for x in got] == [x[:3] for x in want] and got[-1][0] == 1
    for ours, theirs in zip(got, want):
        assert ours[3].keys() == theirs[3].keys() and len(ours[3]) == 4
        assert all(torch.equal(ours[3][k], v) for k, v in theirs[3].items())


@pytest.mark.parametrize("how", ["thread", "spawn"])
def test_an_error_arrives_at_its_batch(small_store: Path, how: str) -> None:
    load = Reads(small_store, lost=True)
    batches = (
        prefetch(sampler(), load, epoch=0, position=0)
        if how == "thread"
        else with_workers(sampler(), load, epoch=0, position=0, workers=1)
    )
    for _ in range(3):
        next(batches)
    with pytest.raises(NoStoreError, match="no states of nobody"):
        next(batches)
    batches.close()

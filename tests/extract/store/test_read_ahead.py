"""Batches that the read-ahead thread reads from a store."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.batches.loader import plans_from, prefetch
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


def test_the_thread_reads_what_the_plans_name(small_store: Path) -> None:
    """From any position on, over the end of an epoch."""
    load, last = Reads(small_store), len(sampler().epoch(0)) - 4
    plans = plans_from(sampler(), 0, last)
    want = [(epoch, position, *load(plan)) for epoch, position, plan in islice(plans, 9)]
    got = taken(prefetch(sampler(), load, epoch=0, position=last))
    assert [x[:3] for x in got] == [x[:3] for x in want] and got[-1][0] == 1
    for ours, theirs in zip(got, want):
        assert ours[3].keys() == theirs[3].keys() and len(ours[3]) == 4
        assert all(torch.equal(ours[3][k], v) for k, v in theirs[3].items())


def test_an_error_arrives_at_its_batch(small_store: Path) -> None:
    batches = prefetch(sampler(), Reads(small_store, lost=True), epoch=0, position=0)
    for _ in range(3):
        next(batches)
    with pytest.raises(NoStoreError, match="no states of nobody"):
        next(batches)
    batches.close()

"""Several batches at a time: each runs in one thread, results are in order, and bytes equal those of one thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.errors import StoreError
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify
from stillhouse.extract.teacher.contexts import Window
from stillhouse.extract.teacher.model import Teacher, load_teacher
from stillhouse.extract.teacher.replicas import TeacherPool

from ..conftest import loaded, make_corpus
from ..pipeline.test_crash import tree

REQUEST = Request("t", [0, 2], ["alone", "both:4"], batch_tokens=128)


class Watched(Teacher):
    """A teacher that records the thread of each call, torch's number of threads, and the batch size."""

    calls: list[tuple[int, int, int]]
    most = 1_000

    def states(self, windows: Any, layers: Any) -> Any:
        self.calls.append((threading.get_ident(), torch.get_num_threads(), len(windows)))
        if len(windows) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().states(windows, layers)


@pytest.fixture
def watched(bert: Path) -> Watched:
    teacher = load_teacher(str(bert), device="cpu")
    teacher.__class__, teacher.calls = Watched, []  # type: ignore[attr-defined]
    return teacher  # type: ignore[return-value]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_make_the_bytes_of_one(watched: Watched, bert: Path, two_threads: None, tmp_path: Path) -> None:
    summary = extract(tmp_path / "two", make_corpus(), watched, REQUEST)
    assert torch.get_num_threads() == 2 and summary.model_share > 0
    assert len({who for who, _, _ in watched.calls}) == 2 and {n for _, n, _ in watched.calls} == {1}
    torch.set_num_threads(1)
    extract(tmp_path / "one", make_corpus(), loaded(bert), REQUEST)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_clone_shares_weights_and_nothing_else(bert: Path) -> None:
    teacher = loaded(bert)
    twin = teacher.clone_model()
    for a, b in zip(teacher.model.parameters(), twin.model.parameters(), strict=True):
        assert a is b
    assert not set(map(id, teacher.model.modules())) & set(map(id, twin.model.modules()))
    window = Window(np.arange(5, 12, dtype=np.int32), None, [])
    for k, states in teacher.states([window], [0, 1, 2]).items():
        assert torch.equal(states, twin.states([window], [0, 1, 2])[k])


def test_results_come_in_order_and_errors_where_they_happened(watched: Watched, two_threads: None) -> None:
    batches = [[Window(np.full(3 + i, 5, dtype=np.int32), None, [])] for i in range(9)]
    with TeacherPool(watched) as threads:
        sizes = [(len(part[0].ids), s) for part, s in threads.run(batches, [1], lambda s: s[1].shape[1], "here")]
        assert sizes == [(3 + i, 3 + i) for i in range(9)] and threads.seconds > 0

        def refuse(states: dict[int, torch.Tensor]) -> int:
            if states[1].shape[1] == 6:
                raise ValueError("six")
            return states[1].shape[1]

        seen = []
        with pytest.raises(ValueError, match="six"):
            seen += [s for _, s in threads.run(batches, [1], refuse, "here")]
        assert [s for _, s in threads.run(batches[:2], [1], refuse, "here")] == [3, 4]  # it works on


def test_batches_are_halved_until_they_fit(watched: Watched, bert: Path, tmp_path: Path) -> None:
    """The states equal those of other batches up to rounding, and the store has no damage."""
    watched.most = 3
    extract(tmp_path / "halves", make_corpus(), watched, REQUEST)
    sizes = [n for _, _, n in watched.calls]
    assert max(sizes) > 6 and {n for n in sizes if n <= 3} == {1, 2}
    extract(tmp_path / "whole", make_corpus(), loaded(bert), REQUEST)
    a, b = Store.open(tmp_path / "halves"), Store.open(tmp_path / "whole")
    assert verify(a) == []
    for view in b.views:
        got, want = (s.gather(b.utterance_ids, [view]).states[view].astype(np.float32) for s in (a, b))
        np.testing.assert_allclose(got, want, atol=4e-3)


def test_a_window_that_never_fits_is_named(watched: Watched, tmp_path: Path) -> None:
    watched.most = 0
    with pytest.raises(StoreError, match=r"t/alone shard 0: one window of \d+ tokens does not fit .*--window"):
        extract(tmp_path / "s", make_corpus(), watched, REQUEST)
    watched.most = 1
    assert extract(tmp_path / "s", make_corpus(), watched, REQUEST).views  # nothing was lost

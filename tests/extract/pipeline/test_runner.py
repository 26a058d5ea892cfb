"""Work items overlap: one is computed while another is written and a third committed. Errors release all locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.data.errors import StoreError
from stillhouse.data.files.lock import FileLock
from stillhouse.extract.pipeline import runner
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify
from stillhouse.extract.store.writer import ItemWriter

from ..conftest import loaded, make_corpus, sentences
from .test_crash import tree

REQUEST = Request("t", [0, 2], ["alone", "both:4"])


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    extract(folder, corpus(), loaded(bert), REQUEST)
    return folder


def corpus() -> Any:
    return make_corpus([t for t in sentences() if t.isascii()] * 4, per_session=5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_item_is_computed_while_the_one_before_is_committed(
    calm: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commit waits for a batch of the second work item. It would never come if the two took turns."""
    items = len(Store.open(calm).plan.work_items("t"))
    assert items >= 4
    second, overlapped, order = threading.Event(), [], []
    write, commit = ItemWriter.write, ItemWriter.commit

    def watched_write(self: ItemWriter, *arguments: Any) -> None:
        if self.item.shard.number == 1:
            second.set()
        write(self, *arguments)

    def watched_commit(self: ItemWriter, *arguments: Any) -> bool:
        if not order:
            overlapped.append(second.wait(20))
        order.append(str(self.item))
        return commit(self, *arguments)

    monkeypatch.setattr(ItemWriter, "write", watched_write)
    monkeypatch.setattr(ItemWriter, "commit", watched_commit)
    extract(tmp_path / "s", corpus(), loaded(bert), REQUEST)
    assert overlapped == [True]
    assert order == [str(u) for u in Store.open(calm).plan.work_items("t")]
    assert tree(tmp_path / "s") == tree(calm)


@pytest.mark.parametrize("where", ["model", "write", "commit"])
def test_an_error_leaves_what_was_committed_and_no_lock(
    where: str, calm: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    teacher, root = loaded(bert), tmp_path / "s"
    plan = Store.open(calm).plan
    bad = plan.work_items("t")[2]

    def refuse(self: Any, *arguments: Any) -> Any:
        if str(self.item) == str(bad):
            raise StoreError(f"no {where}")
        return before(self, *arguments)

    with monkeypatch.context() as patch:
        if where == "model":
            before = runner.Encode.__call__
            patch.setattr(runner.Encode, "item", property(lambda self: self.writer.item), raising=False)
            patch.setattr(runner.Encode, "__call__", refuse)
        else:
            before = getattr(ItemWriter, where)
            patch.setattr(ItemWriter, where, refuse)
        with pytest.raises(StoreError, match=f"no {where}"):
            extract(root, corpus(), teacher, REQUEST)
    store = Store.open(root)
    assert store.commits("t", "alone").has(0, [0, 2])
    assert not store.commits("t", "alone").has(bad.shard.number, [0, 2])
    for item in plan.work_items("t"):
        with FileLock(store.paths.lock("t", item.context, item.shard.number)):
            pass  # LockedError where one is still held
    assert verify(store) == []  # and no files are left over
    assert extract(root, corpus(), teacher, REQUEST).units_done_now >= len(plan.work_items("t")) - 3
    assert tree(root) == tree(calm)


def test_few_items_are_open_at_a_time(
    calm: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    """Otherwise many threads would open more files than a process may have."""
    monkeypatch.setattr(runner, "most_handles", lambda: 0)
    most = []
    open_item = runner.ItemRunner._open_item

    def watched(self: runner.ItemRunner, locked: runner.LockedItem) -> runner.OpenItem:
        opened = open_item(self, locked)
        self.threads.count = 16  # as on a larger machine, with as many batches ahead
        most.append(len(self._open))
        return opened

    monkeypatch.setattr(runner.ItemRunner, "_open_item", watched)
    extract(tmp_path / "s", corpus(), loaded(bert), REQUEST)
    assert max(most) == 3 and tree(tmp_path / "s") == tree(calm)

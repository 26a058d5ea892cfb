"""Fifty generations: what plans take grows with what was added, and locks do not stay for good."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from known_store import KnownTeacher

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.inspect.facts.store import store_facts, verified
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify


def plan_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in (root / "plan").rglob("*") if p.is_file())


def locks(root: Path) -> set[str]:
    return {p.name for p in (root / "locks").iterdir()}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A store that was refreshed 50 times, one changed text each, and the bytes of its plans after each."""
    root, teacher = tmp_path_factory.mktemp("grown") / "s", KnownTeacher()
    texts = [f"w{i % 50} w{i % 7} bank" for i in range(2000)]
    request, sizes = Request("t", [1, 2], ["alone", "past:4"]), []
    for generation in range(51):
        texts[generation] += f" w{generation + 60}"
        utterances = [Utterance(id=f"u{i}", text=t, session=f"s{i // 10}") for i, t in enumerate(texts)]
        extract(root, Corpus(Path("grown.jsonl"), utterances), teacher, request, refresh=generation > 0)
        sizes.append(plan_bytes(root))
    return SimpleNamespace(root=root, sizes=sizes, texts=texts)


def test_plans_grow_linearly(grown: SimpleNamespace) -> None:
    steps = np.diff(grown.sizes)
    assert steps[-10:].mean() < 2 * steps[5:15].mean() and steps.max() < grown.sizes[0]
    assert len(list((grown.root / "plan").rglob("plan.json"))) == 51


def test_only_the_sums_in_use_are_kept(grown: SimpleNamespace) -> None:
    """They find damage, and one that is gone is missed."""
    assert [p.parent.name for p in (grown.root / "plan").rglob("sums.json")] == ["50"]
    store = Store.open(grown.root)
    assert verify(store) == []
    (sums,) = (grown.root / "plan").rglob("sums.json")
    hidden = sums.rename(sums.with_name("away"))
    try:
        assert any(f.where.endswith("sums.json") and "missing" in f.what for f in verify(Store.open(grown.root)))
    finally:
        hidden.rename(sums)
    table = grown.root / "data.zarr" / "t" / "length" / "c" / "0"
    data = bytearray(table.read_bytes())
    data[8] ^= 1
    before = table.read_bytes()
    table.write_bytes(data)
    try:
        assert verify(Store.open(grown.root)) != []
    finally:
        table.write_bytes(before)


def test_all_count_the_same_work_items(grown: SimpleNamespace) -> None:
    store, contexts = Store.open(grown.root), status(grown.root).contexts
    counts = {(sum(c.done for c in contexts), sum(c.units for c in contexts))}
    teacher, checked = store_facts(store).teachers[0], verified(store)
    counts |= {(teacher.work_items, teacher.work_items_planned), (checked.work_items, checked.work_items_planned)}
    assert len(counts) == 1, counts


def test_gc_deletes_locks(grown: SimpleNamespace, tmp_path: Path) -> None:
    root = tmp_path / "s"
    shutil.copytree(grown.root, root)
    before = Store.open(root).gather(["u3", "u1999"], Store.open(root).views)
    assert len(locks(root)) > 50
    collect_garbage(root, dry_run=True)
    assert len(locks(root)) > 50
    collect_garbage(root)
    assert locks(root) == {"plan.lock", "tmp.lock"}
    assert collect_garbage(root).files == 0
    store = Store.open(root)
    assert verify(store) == []
    after = store.gather(["u3", "u1999"], store.views)
    assert all(np.array_equal(before.states[v], after.states[v]) for v in before.states)

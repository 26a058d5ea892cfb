"""int8 stores that are changed, copied and merged: kept rows keep their bytes, and norms never change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.errors import StaleError
from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.maintain.combine import copy, merge, subset
from stillhouse.extract.maintain.garbage import unreferenced_files
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.maintain.remove import remove_utterances, remove_views
from stillhouse.extract.maintain.repair import repair
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus, sentences
from ..pipeline.test_refresh import edited
from .test_maintain import states

INT8 = Request("t", [0, 2], ["alone", "both:4"], dtype="int8")
WIDER = Request("t", [0, 1, 2], ["alone", "past:4", "both:4"], dtype="int8")


def norms(root: Path) -> dict[str, bytes]:
    store = Store.open(root)
    return {v.address: b"".join(a.tobytes() for a in store.norm(v)) for v in store.views}


def sound(root: Path, corpus: Corpus, teacher: Path, request: Request, scratch: Path) -> None:
    """Check checksums and records. States equal those of a float16 store of this corpus up to the int8 loss."""
    store = Store.open(root, checksums=True)
    assert verify(store) == [] and status(root).complete and unreferenced_files(store.plan) == []
    half = Request(request.name, request.layers, request.contexts)
    if not scratch.exists():
        extract(scratch, corpus, loaded(teacher), half)
    fresh, ids = Store.open(scratch), store.utterance_ids
    assert set(ids) <= set(fresh.utterance_ids)
    for view in store.views:
        assert np.array_equal(store.input_hash(ids, view), fresh.input_hash(ids, view)), view
        got, want = (s.gather(ids, [view], "float32").states[view] for s in (store, fresh))
        assert np.linalg.norm(got - want) <= 0.015 * np.linalg.norm(want), view
        loss = store.loss(view)
        assert loss is not None and 0 < loss.relative <= 0.015 and 0 < loss.standardised <= 0.015


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus([t for t in sentences() if t.isascii()][:48], per_session=5)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MIN_SHARD_ROWS", 256)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bert: Path, corpus: Corpus) -> Path:
    root = tmp_path_factory.mktemp("int8life") / "s"
    extract(root, corpus, loaded(bert), INT8)
    assert len(Store.open(root).plan.shards("t")) == 4
    return root


def test_refreshed_collected_and_extended(bert: Path, made: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Layers and contexts that are added after rows were deleted get norms of the readable rows."""
    root = tmp_path / "s"
    copy(made, root)
    first, kept = norms(root), states(root)
    new = [Utterance(id=f"n{i}", text=t, session="new") for i, t in enumerate(["wholly unseen quartz", "", "the tea"])]
    gone = {f"u{i}": None for i in range(20, 30)}
    now = edited(corpus, u3="something else entirely", u44="the end of it", **gone)
    now = Corpus(now.path, [*now.utterances, *new])
    extract(root, now, loaded(bert), INT8, refresh=True)
    assert norms(root) == first

    assert verify(Store.open(root, checksums=True)) == []
    served = states(root)
    assert all(served[k] == v for k, v in kept.items() if k in served and k[1] not in ("u3", "u44") and "alone" in k[0])
    extract(root, now, loaded(bert), WIDER)
    assert {k: v for k, v in norms(root).items() if k in first} == first
    served = states(root)
    assert collect_garbage(root).moved_tokens > 0 and collect_garbage(root).files == 0
    assert states(root) == served and {k: v for k, v in norms(root).items() if k in first} == first
    sound(root, now, bert, WIDER, tmp_path / "fresh")
    remove_utterances(root, ["u5", "u6"])
    remove_views(root, ["t/both:4/0"])
    collect_garbage(root)
    assert states(root) == {k: v for k, v in served.items() if k[0] != "t/both:4/0" and k[1] not in ("u5", "u6")}
    sound(root, now, bert, WIDER, tmp_path / "fresh")
    extract(root, now, loaded(bert), WIDER)  # they are extracted again, the view with its own norms
    assert collect_garbage(root).moved_tokens == 0
    sound(root, now, bert, WIDER, tmp_path / "fresh")
    assert set(states(root)) == set(served)


def test_cut_copied_and_merged(bert: Path, made: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Parts of one store share its norms and can be merged. Two stores cannot, and the error says what to do."""
    whole, all_norms = states(made), norms(made)
    ids = [u.id for u in corpus.utterances]
    copy(made, tmp_path / "c", ["t/*/2"])
    assert states(tmp_path / "c") == {k: v for k, v in whole.items() if k[0].endswith("/2")}
    sound(tmp_path / "c", corpus, bert, INT8, tmp_path / "fresh")
    for name, part in (("a", ids[:25]), ("b", ids[25:])):
        subset(made, tmp_path / name, part)
        assert states(tmp_path / name) == states(made, part) and norms(tmp_path / name) == all_norms
        sound(tmp_path / name, corpus, bert, INT8, tmp_path / "fresh")
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    assert states(tmp_path / "ab") == whole and norms(tmp_path / "ab") == all_norms
    sound(tmp_path / "ab", corpus, bert, INT8, tmp_path / "fresh")
    extract(tmp_path / "a", corpus, loaded(bert), INT8)  # the rest is extracted with the same norms
    assert norms(tmp_path / "a") == all_norms
    sound(tmp_path / "a", corpus, bert, INT8, tmp_path / "fresh")
    extract(tmp_path / "other", Corpus(corpus.path, corpus.utterances[25:]), loaded(bert), INT8)
    with pytest.raises(StaleError, match=r"other norms.*extract one of the corpora into the other's store"):
        merge(made, tmp_path / "other", tmp_path / "no")


def test_repaired_after_a_refresh(bert: Path, made: Path, corpus: Corpus, tmp_path: Path) -> None:
    """A work item with deleted rows, and one in a shard that a refresh added: states and scales."""
    root = tmp_path / "s"
    copy(made, root, ["t/both:4/*"])
    now = edited(corpus, u3="something else entirely", u40=None)
    extract(root, now, loaded(bert), Request("t", [0, 2], ["both:4"], dtype="int8"), refresh=True)
    served, first = states(root), norms(root)
    store = Store.open(root)
    for i, array in (("u0", "hidden"), ("u3", "scale")):
        shard = int(store.shard_of("t", int(store.rows([i])[0])))
        path = getattr(Paths(root), array)("t", 0, 1, shard)
        data = bytearray(path.read_bytes())
        data[3] ^= 16
        path.write_bytes(data)
    found = verify(Store.open(root))
    assert len(found) == 2 and all("t/both:4/2" in f.where for f in found)
    assert len(repair(root, loaded(bert), "t")) == 2
    assert verify(Store.open(root)) == [] and norms(root) == first and states(root).keys() == served.keys()
    assert sum(states(root)[k] == v for k, v in served.items()) > 0.9 * len(served)
    collect_garbage(root)
    sound(root, now, bert, Request("t", [0, 2], ["both:4"], dtype="int8"), tmp_path / "fresh")

"""pq stores that are changed, copied, merged, imported and repaired: kept rows keep their codes, and codebooks too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import s3

from stillhouse.data.errors import StaleError, StoreError
from stillhouse.data.manifest import Corpus
from stillhouse.extract.inspect.facts.diff import diff
from stillhouse.extract.inspect.facts.export import export
from stillhouse.extract.inspect.facts.store import as_json, store_facts
from stillhouse.extract.inspect.numbers.statistics import statistics
from stillhouse.extract.inspect.sample import undamaged
from stillhouse.extract.inspect.show import facts as facts_text
from stillhouse.extract.inspect.show import numbers as numbers_text
from stillhouse.extract.maintain.combine import copy, merge, subset
from stillhouse.extract.maintain.garbage import unreferenced_files
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.maintain.import_states import ImportCache, import_states
from stillhouse.extract.maintain.remove import remove_utterances, remove_views
from stillhouse.extract.maintain.repair import repair_all
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus, sentences
from ..pipeline.test_crash import tree
from ..pipeline.test_refresh import edited

PQ = Request("t", [0, 2], ["alone", "both:4"], dtype="pq:8")


def codes(root: Path | str, ids: list[str] | None = None) -> dict[tuple[str, str], bytes]:
    """Return the codes of each view and utterance."""
    store, found = Store.open(root, checksums=True), {}
    for view in store.views:
        mine = store.utterance_ids if ids is None else ids
        got = store.gather(mine, [view], "codes")
        parts = np.split(got.states[view], np.cumsum(got.lengths[view.teacher])[:-1])
        found |= {(view.address, i): p.tobytes() for i, p in zip(mine, parts)}
    return found


def books(root: Path | str) -> dict[str, bytes]:
    store = Store.open(root)
    return {v.address: b"".join(a.tobytes() for a in store.norms_stored(v)) for v in store.views}


def flip(path: Path, at: int = 35) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus([t for t in sentences() if t.isascii()][:40], per_session=5)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MIN_SHARD_ROWS", 256)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bert: Path, corpus: Corpus) -> Path:
    root = tmp_path_factory.mktemp("pqlife") / "s"
    extract(root, corpus, loaded(bert), PQ)
    assert len(Store.open(root).plan.shards("t")) > 2
    return root


def test_refreshed_collected_and_deleted(bert: Path, made: Path, corpus: Corpus, tmp_path: Path) -> None:
    root = tmp_path / "s"
    copy(made, root)
    first, kept = books(root), codes(root)
    now = edited(corpus, u3="something else entirely", **{f"u{i}": None for i in range(20, 30)})
    extract(root, now, loaded(bert), PQ, refresh=True)
    served = codes(root)
    assert books(root) == first
    assert all(served[k] == v for k, v in kept.items() if k in served and k[1] != "u3" and "alone" in k[0])
    assert collect_garbage(root).moved_tokens > 0 and codes(root) == served and books(root) == first
    remove_utterances(root, ["u5"])
    before = (Paths(root).array("t", "codebook") / "c" / "1" / "0").exists()
    remove_views(root, ["t/both:4/0"])
    after = (Paths(root).array("t", "codebook") / "c" / "1" / "0").exists()
    assert before and not after  # A codebook has more bytes than many a view's codes.
    collect_garbage(root)
    assert codes(root) == {k: v for k, v in served.items() if k[0] != "t/both:4/0" and k[1] != "u5"}
    extract(root, now, loaded(bert), PQ)  # They are extracted again, the view with codebooks of what is there now.
    collect_garbage(root)
    store = Store.open(root)
    assert set(codes(root)) == set(served) and verify(store) == [] and unreferenced_files(store.plan) == []
    assert all(0 < loss.standardised < 0.5 for v in store.views if (loss := store.loss(v)) is not None)


def test_cut_copied_and_merged(bert: Path, made: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Parts of one store share its codebooks and can be merged. Two stores cannot, and the error says what to do."""
    whole, all_books = codes(made), books(made)
    ids = [u.id for u in corpus.utterances]
    copy(made, tmp_path / "c", ["t/*/2"])
    assert codes(tmp_path / "c") == {k: v for k, v in whole.items() if k[0].endswith("/2")}
    for name, part in (("a", ids[:25]), ("b", ids[25:])):
        subset(made, tmp_path / name, part)
        assert codes(tmp_path / name) == codes(made, part) and books(tmp_path / name) == all_books
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    assert codes(tmp_path / "ab") == whole and books(tmp_path / "ab") == all_books
    store, other = Store.open(tmp_path / "ab"), Store.open(made)
    assert verify(store) == []
    for view in store.views:
        ours, theirs = store.loss(view), other.loss(view)
        assert ours is not None and theirs is not None
        assert ours.standardised == pytest.approx(theirs.standardised, rel=0.1)
    assert diff(store, other).same
    extract(tmp_path / "other", Corpus(corpus.path, corpus.utterances[25:]), loaded(bert), PQ)
    with pytest.raises(StaleError, match=r"pq:8 .*other codebooks or norms.*extract one of the corpora"):
        merge(made, tmp_path / "other", tmp_path / "no")


def test_inspected_and_exported(made: Path, tmp_path: Path) -> None:
    """`info` and `stats` say the error in text and JSON; an export has decoded states."""
    store = Store.open(made)
    facts, measured = store_facts(store), statistics(store, store.views)
    worst = max(loss.standardised for v in store.views if (loss := store.loss(v)) is not None)
    told = as_json(facts, "info")["teachers"][0]
    assert told["pq_error_standardised"] == worst and 0 < told["pq_error"] < 1 and told["int8_error"] is None
    assert f"{worst:.1%} standardised at most" in facts_text.store(facts)
    assert [s.pq_error_standardised for s in measured] == [store.loss(v).standardised for v in store.views]  # type: ignore[union-attr]
    text = " ".join(numbers_text.statistics(measured).split())
    assert f"pq error: {measured[0].pq_error:.2%} of the states" in text and "int8" not in text
    export(store, store.views[:1], tmp_path / "x.h5", float32=True)
    with h5py.File(tmp_path / "x.h5") as f:
        ids = [i.decode() for i in f["utterance"][:]]
        want = store.gather(ids, store.views[:1]).states[store.views[0]]
        assert np.array_equal(f[store.views[0].address][:], want)
    export(store, store.views[:1], tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")[store.views[0].address].dtype == np.float16


def test_imported(made: Path, bert: Path, corpus: Corpus, tmp_path: Path) -> None:
    """States of another program, here those of a float32 store, become codes with the error that is recorded."""
    extract(tmp_path / "plain", corpus, loaded(bert), Request("t", [2], ["alone"], dtype="float32"))
    plain, view = Store.open(tmp_path / "plain"), View("t", "alone", 2)
    for u in corpus.utterances:
        np.save(tmp_path / f"{u.id}.npy", plain.gather([u.id], [view]).states[view])
    request = Request("t", [2], ["alone"], dtype="pq:8")
    import_states(tmp_path / "in", corpus, ImportCache(tmp_path, [2]), loaded(bert), request)
    store = Store.open(tmp_path / "in")
    (mean, std), ids = store.norm(view), store.utterance_ids
    got, want = ((s.gather(ids, [view]).states[view] - mean) / std for s in (store, plain))
    loss = store.loss(view)
    assert loss is not None and verify(store) == []
    assert np.linalg.norm(got - want) / np.linalg.norm(want) == pytest.approx(loss.standardised, rel=1e-3)


def test_codes_and_codebooks_are_repaired(made: Path, bert: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    copy(made, root)
    good, paths = tree(root), Paths(root)
    flip(paths.shard_file("code", "t", 0, 1, 0))
    flip(paths.chunk("t", "codebook", 1, 0, 0, 0, 0))
    flip(paths.chunk("t", "norm_std", 0, 0, 0))
    paths.chunk("t", "codebook", 1, 1, 0, 0, 0).unlink()
    store = Store.open(root)
    found = [f.where.split(" utterance")[0] for f in verify(store)]
    missing = str(paths.chunk("t", "codebook", 1, 1, 0, 0, 0))
    assert sorted(found) == sorted([missing, "t/alone/0 norm_std", "t/alone/2 shard 0", "t/both:4/0 codebook"])
    assert undamaged(store, store.views)[0] == [View("t", "alone", 2)]
    with pytest.raises(StoreError, match="a chunk is missing"):
        store.gather(["u1"], [View("t", "both:4", 2)])
    repaired = repair_all(root, {"t": str(bert)}, "cpu")
    assert sorted(r.unit for r in repaired) == [
        "t/alone shard 0",
        "t/alone/0 norms",
        "t/both:4/0 norms",
        "t/both:4/2 norms",
    ]
    assert verify(Store.open(root)) == []
    changed = [k for k, v in tree(root).items() if good.get(k) != v and "/c/" in k]
    assert changed == []


def test_in_an_object_store(
    proxy: s3.Proxy, server: int, made: Path, bert: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """Codes and codebooks go there and come back, a layer is added there, and a flipped bit of either is found."""
    copy(made, "s3://bucket/pq", ["t/alone/*"])
    more = Request("t", [0, 1, 2], ["alone"], dtype="pq:8")
    extract("s3://bucket/pq", corpus, loaded(bert), more)  # type: ignore[arg-type]
    copy(made, tmp_path / "disk", ["t/alone/*"])
    extract(tmp_path / "disk", corpus, loaded(bert), more)
    whole = codes(tmp_path / "disk")
    assert codes("s3://bucket/pq") == whole and books("s3://bucket/pq") == books(tmp_path / "disk")
    store, view = Store.open("s3://bucket/pq"), View("t", "alone", 1)
    got = store.gather(["u1", "u7"], [view]).states[view]
    assert np.array_equal(got, Store.open(tmp_path / "disk").gather(["u1", "u7"], [view]).states[view])
    paths = Paths(Path("pq"))
    for path in (paths.shard_file("code", "t", 0, 1, 0), paths.chunk("t", "codebook", 0, 0, 0, 0, 0)):
        data = bytearray(s3.get(server, str(path)))
        data[35] ^= 4
        s3.put(server, str(path), bytes(data))
    found = [f.where.split(" utterance")[0] for f in verify(Store.open("s3://bucket/pq"))]
    assert len(found) == 2 and found[1] == "t/alone/0 codebook"
    with pytest.raises(StoreError, match="t/alone/0: stored bytes differ from their checksum: codebook"):
        Store.open("s3://bucket/pq").gather(["u1"], [View("t", "alone", 0)])

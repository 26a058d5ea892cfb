"""Changes of whole stores: delete views and utterances, free disk space, copy, cut and merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr

from stillhouse.cli import main
from stillhouse.data.errors import LockedError, NoStoreError, StaleError, StoreError, UsageError
from stillhouse.data.manifest import Corpus
from stillhouse.extract.maintain.combine import copy, merge, subset
from stillhouse.extract.maintain.garbage import unreferenced_files
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.maintain.remove import remove_utterances, remove_views
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.disk.locks import Scratch
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.verify.stale import stale
from stillhouse.extract.store.verify.verify import verify

from ..conftest import TEXTS, loaded, make_corpus, sentences
from ..pipeline.test_refresh import CONTEXTS, REQUEST, edited, same_as_fresh


def states(root: Path, ids: list[str] | None = None) -> dict[tuple[str, str], bytes]:
    """Return all that can be read from a store: {(view, utterance): bytes}."""
    store = Store.open(root, checksums=True)
    found = {}
    for view in store.views:
        for i in store.utterance_ids if ids is None else ids:
            found[view.address, i] = store.gather([i], [view]).states[view].tobytes()
    return found


def opens_with_zarr(root: Path) -> None:
    """Compare rows that zarr-python reads with those of `gather`."""
    store, group = Store.open(root), zarr.open_group(root / "data.zarr", mode="r")
    for view in store.views:
        record = group[view.teacher].attrs["stillhouse"]
        c, k = record["contexts"].index(view.context), record["layers"].index(view.layer)
        for i in store.utterance_ids[::7]:
            row = int(store.rows([i], view.teacher)[0])
            at, n = int(group[view.teacher]["start"][row]), int(group[view.teacher]["length"][row])
            rows = group[view.teacher]["hidden"][c, k, at : at + n]
            assert np.array_equal(rows, store.gather([i], [view]).states[view])


@pytest.fixture
def corpus() -> Corpus:
    """Several shards of the tiny BERT."""
    return make_corpus([t for t in sentences() if t.isascii()] * 4, per_session=5)


def test_views_are_deleted(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    before = states(root)
    told = remove_views(root, ["t/both:4/2", "t/past:4/*"], dry_run=True)
    assert states(root) == before and not told.done
    done = remove_views(root, ["t/both:4/2", "t/past:4/*"])
    assert done.views == ["t/both:4/2", "t/past:4/0", "t/past:4/2"] == told.views
    assert told.bytes == done.bytes > 0
    assert states(root) == {k: v for k, v in before.items() if k[0] in ("t/alone/0", "t/alone/2", "t/both:4/0")}
    store = Store.open(root)
    assert verify(store) == [] and status(root).complete and unreferenced_files(store.plan) == []
    with pytest.raises(NoStoreError):
        store.gather(["u1"], [View("t", "both:4", 2)])
    # The norms of a deleted view are not computed again.
    assert extract(root, corpus, loaded(bert), Request("t", [0], ["both:4"])).units_done_now == 0
    extract(root, corpus, loaded(bert), REQUEST)  # asked for and extracted again
    assert states(root) == before and verify(Store.open(root)) == []
    with pytest.raises(UsageError, match="every view"):
        remove_views(root, ["*"])
    with pytest.raises(NoStoreError, match="no view matches"):
        remove_views(root, ["t/both:4/7"])


def test_a_teacher_is_deleted_with_its_last_view(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus(TEXTS)
    extract(root, corpus, loaded(bert), Request("t", [2], ["alone"]))
    alone = states(root)
    extract(root, corpus, loaded(gpt2), Request("gpt", [1], ["alone", "past:8"]))
    remove_views(root, ["gpt/*/*"])
    store = Store.open(root)
    assert list(store.plan.teachers) == ["t"] and states(root) == alone and verify(store) == []
    assert not (root / "data.zarr" / "gpt").exists() and not (root / "commits" / "gpt").exists()
    extract(root, corpus, loaded(gpt2), Request("gpt", [1], ["alone"]))
    assert verify(Store.open(root)) == [] and len(Store.open(root).views) == 2


def test_deleted_utterances_stay_context(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    before = states(root)
    told = remove_utterances(root, ["u1", "u6"], dry_run=True)
    done = remove_utterances(root, ["u1", "u6"])
    assert told.tokens == done.tokens > 0 and done.utterances == 2
    left = {k: v for k, v in before.items() if k[1] not in ("u1", "u6")}
    assert states(root) == left
    store = Store.open(root)
    assert verify(store) == [] and not store.has(["u6"], store.views[0])[0]
    cleared = collect_garbage(root)
    assert cleared.tokens == done.tokens and cleared.moved_tokens > 0
    assert states(root) == left and verify(Store.open(root)) == []
    opens_with_zarr(root)
    assert collect_garbage(root).files == 0
    # Their text is what the neighbours saw: a view that is added later sees it, too
    extract(root, edited(corpus, u1=None, u6=None), loaded(bert), REQUEST, refresh=True)
    same_as_fresh(root, edited(corpus, u1=None, u6=None), bert, REQUEST, tmp_path / "fresh")
    with pytest.raises(NoStoreError, match="u99"):
        remove_utterances(root, ["u99"])
    with pytest.raises(UsageError, match="every utterance"):
        remove_utterances(root, Store.open(root).utterance_ids)


def test_deleted_utterances_are_extracted_again(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    before = states(root)
    remove_utterances(root, ["u1", "u6"])
    collect_garbage(root)
    done = extract(root, corpus, loaded(bert), REQUEST)  # no neighbour is stale: nothing to refresh
    assert done.units_done_now == 3 and done.utterances == 30
    assert {k: len(v) for k, v in states(root).items()} == {k: len(v) for k, v in before.items()}
    same_as_fresh(root, corpus, bert, REQUEST, tmp_path / "fresh")


def test_gc_frees_what_a_refresh_dropped(bert: Path, corpus: Corpus, tmp_path: Path) -> None:
    root = tmp_path / "s"
    extract(root, corpus, loaded(bert), REQUEST)
    now = edited(corpus, u3="something else entirely", u50=None, u51="more", u99="the end of it")
    extract(root, now, loaded(bert), REQUEST, refresh=True)
    served, size = states(root), sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    reader = Store.open(root)
    told = collect_garbage(root, dry_run=True)
    assert states(root) == served and not told.done
    done = collect_garbage(root)
    assert done.tokens == told.tokens > 0 and done.moved_tokens == told.moved_tokens
    assert abs(done.bytes - told.bytes) < 0.2 * done.bytes
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) == size - done.bytes
    assert states(root) == served and verify(Store.open(root)) == [] and status(root).complete
    same_as_fresh(root, now, bert, REQUEST, tmp_path / "fresh")
    opens_with_zarr(root)
    # A reader that opened it before gets an error for files that are deleted.
    with pytest.raises(StoreError, match="has changed since it was opened"):
        reader.gather(reader.utterance_ids, reader.views)
    reader.refresh()
    assert len(reader.gather(reader.utterance_ids, reader.views).states) == 6
    assert extract(root, now, loaded(bert), REQUEST).units_done_now == 0
    extract(root, now, loaded(bert), Request("t", [1], ["future:4"]))
    assert verify(Store.open(root)) == []
    clean = unreferenced_files(Store.open(root).plan)
    assert clean == []


def test_empty_utterances_keep_no_shard(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts of a shard have changed but for two empty ones. The shard is dropped, and the two can still be read."""
    monkeypatch.setattr(layout, "MIN_SHARD_ROWS", 64)
    root, request = tmp_path / "s", Request("t", [0, 2], ["alone", "past:4"])
    corpus = make_corpus(["", "they went there by boat and by night", "", *["a knight rode there by night"] * 20], 23)
    extract(root, corpus, loaded(bert), request)
    ids, (shard, *rest) = [u.id for u in corpus.utterances], Store.open(root).plan.shards("t")
    first = [i for i, r in zip(ids, Store.open(root).rows(ids)) if r < shard.last]
    assert rest and {"u0", "u2"} < set(first)
    now = edited(corpus, **{i: "said in other words" for i in first if corpus.by_id[i].text})
    extract(root, now, loaded(bert), request, refresh=True)
    assert 0 not in [s.number for s in Store.open(root).plan.shards("t")]
    same_as_fresh(root, now, bert, request, tmp_path / "fresh")
    remove_views(root, ["t/past:4/0"])
    assert verify(Store.open(root)) == []
    collect_garbage(root)
    extract(root, now, loaded(bert), request)
    same_as_fresh(root, now, bert, request, tmp_path / "fresh")
    assert collect_garbage(root).moved_tokens == 0 and verify(Store.open(root)) == []


def test_a_reader_keeps_its_open_files(bert: Path, corpus: Corpus, tmp_path: Path) -> None:
    root = tmp_path / "s"
    extract(root, corpus, loaded(bert), REQUEST)
    extract(root, edited(corpus, u3="something else entirely"), loaded(bert), REQUEST, refresh=True)
    reader = Store.open(root)
    ids, views = reader.utterance_ids, reader.views
    first = reader.gather(ids, views)
    collect_garbage(root)
    second = reader.gather(ids, views)
    assert all(np.array_equal(first.states[v], second.states[v]) for v in views)


def test_no_gc_beside_a_writer(bert: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    extract(root, make_corpus(TEXTS), loaded(bert), Request("t", [2], ["alone"]))
    with Scratch(Paths(root)), pytest.raises(LockedError, match="a writer is at work"):
        collect_garbage(root)
    (Paths(root).commit("t", "alone", 0, 0)).unlink()
    remove_utterances(root, ["u1"])
    with pytest.raises(NoStoreError, match="not complete: t/alone/2"):
        collect_garbage(root)


def test_a_subset_has_the_same_bytes(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    extract(root, corpus, loaded(gpt2), Request("gpt", [1], ["past:8"], dtype="bfloat16"))
    kept = ["u1", "u2", "u9", "u20"]
    done = subset(root, tmp_path / "sub", kept)
    assert done.utterances == 4 and done.context_only == 8  # three sessions of four
    part = Store.open(tmp_path / "sub")
    assert sorted(part.utterance_ids) == sorted(kept) and verify(part) == [] and unreferenced_files(part.plan) == []
    assert states(tmp_path / "sub") == states(root, kept)
    opens_with_zarr(tmp_path / "sub")
    said = [[(u.id, u.text) for u in (corpus.utterances[i] for i in s)] for s in corpus.sessions()]
    assert stale(part, part.views, said) == {}  # the text of the neighbours was copied
    whole = Store.open(root)
    for view in part.views:
        assert all(np.array_equal(a, b) for a, b in zip(part.norm(view), whole.norm(view)))
        assert np.array_equal(part.input_hash(kept, view), whole.input_hash(kept, view))
    assert subset(root, tmp_path / "one", kept, ["t/past:4/2"]).views == ["t/past:4/2"]
    extract(tmp_path / "sub", corpus, loaded(bert), REQUEST)  # the others are extracted again, and none is stale
    assert Store.open(tmp_path / "sub").has([u.id for u in corpus.utterances], View("t", "both:4", 2)).all()
    with pytest.raises(NoStoreError, match="u99"):
        subset(root, tmp_path / "no", ["u99"])
    with pytest.raises(UsageError, match="is there already"):
        subset(root, tmp_path / "one", kept)


def test_a_copy_of_some_views(bert: Path, corpus: Corpus, tmp_path: Path) -> None:
    root = tmp_path / "s"
    extract(root, corpus, loaded(bert), REQUEST)
    now = edited(corpus, u3="something else entirely", u50=None)
    extract(root, now, loaded(bert), REQUEST, refresh=True)
    done = copy(root, tmp_path / "c", ["t/*/2"])
    assert done.views == ["t/alone/2", "t/both:4/2", "t/past:4/2"] and done.context_only == 0
    assert states(tmp_path / "c") == {k: v for k, v in states(root).items() if k[0].endswith("/2")}
    store = Store.open(tmp_path / "c")
    assert verify(store) == [] and store.plan.edition() == 0 and status(tmp_path / "c").complete
    opens_with_zarr(tmp_path / "c")
    extract(tmp_path / "c", now, loaded(bert), REQUEST)  # it can be extended
    same_as_fresh(tmp_path / "c", now, bert, REQUEST, tmp_path / "fresh")
    Paths(root).commit("t", "alone", 1, 0).unlink()
    with pytest.raises(NoStoreError, match="not complete: t/alone/0"):
        copy(root, tmp_path / "d")


def test_merging(bert: Path, corpus: Corpus, tmp_path: Path) -> None:
    half = Corpus(corpus.path, corpus.utterances[:100]), Corpus(corpus.path, corpus.utterances[95:])
    extract(tmp_path / "a", half[0], loaded(bert), REQUEST)
    extract(tmp_path / "b", half[1], loaded(bert), REQUEST)  # u95 to u99, one session, are in both
    done = merge(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    assert done.utterances == len(corpus.utterances)
    assert states(tmp_path / "ab") == states(tmp_path / "b") | states(tmp_path / "a")
    store = Store.open(tmp_path / "ab")
    assert verify(store) == [] and status(tmp_path / "ab").complete
    opens_with_zarr(tmp_path / "ab")
    assert extract(tmp_path / "ab", corpus, loaded(bert), REQUEST).units_done_now == 0
    extract(tmp_path / "whole", corpus, loaded(bert), REQUEST)
    whole, ids = Store.open(tmp_path / "whole"), store.utterance_ids
    for view in store.views:
        assert np.array_equal(store.input_hash(ids, view), whole.input_hash(ids, view))


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request("t", [0], CONTEXTS), "only .*a has t/alone/2"),
        (Request("t", [0, 2], CONTEXTS, transform="upper"), "the text transform"),
        (Request("t", [0, 2], CONTEXTS, join=" and "), "the join string"),
        (Request("t", [0, 2], CONTEXTS, dtype="float32"), "the stored dtype"),
    ],
)
def test_merging_names_what_differs(request_: Request, error: str, bert: Path, tmp_path: Path) -> None:
    extract(tmp_path / "a", make_corpus(TEXTS), loaded(bert), REQUEST)
    extract(tmp_path / "b", make_corpus(TEXTS[:4]), loaded(bert), request_)
    with pytest.raises(StaleError, match=error) as e:
        merge(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    assert e.value.exit_code == 12 and not (tmp_path / "ab").exists()


def test_merging_refuses_utterances_that_differ(bert: Path, tmp_path: Path) -> None:
    corpus, request = make_corpus(TEXTS), Request("t", [2], ["past:4"])
    extract(tmp_path / "a", corpus, loaded(bert), request)
    for n, (now, error) in enumerate(
        [
            (edited(corpus, u1="another"), "u1 has another text"),
            (edited(corpus, u0=None, u4=None), "saw another context|another text"),
            (Corpus(corpus.path, [*corpus.utterances, corpus.utterances[0].model_copy(update={"id": "n"})]), "n of"),
        ]
    ):
        extract(tmp_path / f"b{n}", now, loaded(bert), request)
        with pytest.raises(StaleError, match=error):
            merge(tmp_path / "a", tmp_path / f"b{n}", tmp_path / "ab")


@pytest.fixture
def stillhouse(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process. Returns exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in arguments])
        found = capsys.readouterr()
        return SimpleNamespace(code=e.value.code, out=found.out, err=found.err)

    return run


def test_the_commands(bert: Path, tmp_path: Path, stillhouse: Callable) -> None:
    root = tmp_path / "s"
    extract(root, make_corpus(), loaded(bert), REQUEST)
    (tmp_path / "ids").write_text("u1\nu7\n\n")
    told = json.loads(stillhouse("store", "rm", root, "t/past:4/*", "--dry-run", "--json").out)
    assert told["views"] == ["t/past:4/0", "t/past:4/2"] and not told["done"]
    asked = stillhouse("store", "rm", root, "t/past:4/*")  # where nobody can answer
    assert asked.code == 2 and "deletes 2 views" in asked.err and "t/past:4/2" in asked.err and "--yes" in asked.err
    assert len(Store.open(root).resolve(["t/past:4/*"])) == 2
    assert "t/past:4/0" in stillhouse("store", "rm", root, "t/past:4/*", "--yes").out
    assert stillhouse("store", "subset", root, tmp_path / "sub", "--utterances", tmp_path / "ids").code == 0
    assert sorted(Store.open(tmp_path / "sub").utterance_ids) == ["u1", "u7"]
    assert stillhouse("store", "rm", root, "--utterances", tmp_path / "ids").code == 0
    left = root / "data.zarr" / "t" / "input_hash" / "c" / ".0.0123abcd.tmp"  # of a killed writer
    left.write_bytes(b"0")
    assert json.loads(stillhouse("store", "gc", root, "--json").out)["done"] and not left.exists()
    assert stillhouse("store", "cp", root, tmp_path / "c", "--views", "t/*/2").code == 0
    merged = stillhouse("store", "merge", root, tmp_path / "c", tmp_path / "m")
    assert merged.code == 12 and "only" in merged.err
    assert stillhouse("store", "rm", root).code == 2
    assert stillhouse("store", "gc", tmp_path / "none").code == 10


def test_verify_repairs(bert: Path, tmp_path: Path, stillhouse: Callable) -> None:
    """Also in a store whose corpus has changed, only damaged work items are extracted again, by the models it names."""
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    extract(root, edited(corpus, u1="he would wear it here"), loaded(bert), REQUEST, refresh=True)
    served, commits = states(root), sorted(p.name for p in (root / "commits").rglob("*.json"))
    for shard in (0, 1):
        path = Paths(root).hidden("t", 0, 1, shard)
        data = bytearray(path.read_bytes())
        data[int(Store.open(root).lengths("t").sum()) if shard == 0 else 5] ^= 8
        path.write_bytes(data)
    told = stillhouse("inspect", "verify", root, "--data")
    assert told.code == 1 and "--repair" in told.out
    found = json.loads(stillhouse("inspect", "verify", root, "--data", "--repair", "--json").out)
    assert {m["unit"] for m in found["mended"]} == {"t/alone shard 0", "t/alone shard 1"} and not found["findings"]
    new = sorted(p.name for p in (root / "commits").rglob("*.json"))
    assert len(new) == len(commits) + 2 and verify(Store.open(root)) == []
    assert {k for k, v in states(root).items() if v == served[k]} >= {k for k in served if "both" in k[0]}
    assert stillhouse("inspect", "verify", root, "--data", "--repair").code == 0
    Paths(root).hidden("t", 0, 0, 0).unlink()
    assert stillhouse("inspect", "verify", root, "--repair", "--model", "t").code == 2
    moved = tmp_path / "moved"
    bert.rename(moved)
    try:
        assert stillhouse("inspect", "verify", root, "--repair").code == 1
        done = stillhouse("inspect", "verify", root, "--repair", "--model", f"t={moved}")
    finally:
        moved.rename(bert)
    assert done.code == 0 and "extracted again: t/alone shard 0" in done.out

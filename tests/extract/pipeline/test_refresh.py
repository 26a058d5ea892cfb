"""A corpus that changes after extraction: new, changed, removed and moved utterances, and stale contexts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zarr

from stillhouse.data.errors import LockedError, NoStoreError, StaleError
from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.distill.targets import TargetReader
from stillhouse.extract.pipeline.estimate import size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk.layout import to_float32
from stillhouse.extract.store.disk.locks import Scratch
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.verify.stale import stale
from stillhouse.extract.store.verify.verify import verify

from ..conftest import TEXTS, loaded, make_corpus
from .test_crash import tree

CONTEXTS = ["alone", "past:4", "both:4"]
REQUEST = Request("t", [0, 2], CONTEXTS)


def edited(corpus: Corpus, **texts: str | None) -> Corpus:
    """The corpus with other texts; None removes an utterance."""
    kept = [u for u in corpus.utterances if texts.get(u.id, "") is not None]
    return Corpus(corpus.path, [u.model_copy(update={"text": texts.get(u.id, u.text)}) for u in kept])


def same_as_fresh(root: Path, corpus: Corpus, teacher: Path, request: Request, scratch: Path) -> None:
    """Compare every row of a store with a new store of this corpus: the same inputs, and states equal up to the last
    bits, which depend on the other windows of a batch.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    extract(scratch, corpus, loaded(teacher), request)
    store, fresh = Store.open(root, checksums=True), Store.open(scratch)
    assert store.utterance_ids == fresh.utterance_ids
    ids = fresh.utterance_ids
    assert [v.address for v in store.views] == [v.address for v in fresh.views]
    for view in store.views:
        assert np.array_equal(store.input_hash(ids, view), fresh.input_hash(ids, view)), view
        for left, right in zip(store.context_seen(ids, view), fresh.context_seen(ids, view)):
            assert np.array_equal(left, right)
        a, b = store.gather(ids, [view]), fresh.gather(ids, [view])
        assert np.array_equal(a.token_id["t"], b.token_id["t"]) and np.array_equal(a.span["t"], b.span["t"])
        dtype = store.teacher("t").dtype
        left, right = (to_float32(g.states[view], dtype) for g in (a, b))
        assert np.allclose(left, right, atol=0.01, rtol=0.01), view
    assert np.array_equal(store.text_hash(ids), fresh.text_hash(ids))


def rows_of(root: Path, ids: Sequence[str]) -> list[int]:
    return Store.open(root).rows(ids).tolist()


def test_a_changed_text_makes_itself_and_its_neighbours_stale(bert: Path, tmp_path: Path) -> None:
    """u1's 4 neighbours share its session; `past:4` of u2 saw it, that of u3 did not (u2 has 8 tokens)."""
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    before, first = tree(root), rows_of(root, [u.id for u in corpus.utterances])
    now = edited(corpus, u1="he would wear it here")
    with pytest.raises(StaleError) as e:
        extract(root, now, loaded(bert), REQUEST)
    assert e.value.exit_code == 12 and "1 utterance has another text than in the store: u1" in str(e.value)
    assert "2 utterances have other neighbours" in str(e.value) or "3 utterances have other neighbours" in str(e.value)
    assert "t/past:4: 1" in str(e.value) and "t/alone" not in str(e.value) and "--refresh" in str(e.value)
    assert tree(root) == before
    done = extract(root, now, loaded(bert), REQUEST, refresh=True)
    assert done.views == ["t/alone/0", "t/alone/2", "t/both:4/0", "t/both:4/2", "t/past:4/0", "t/past:4/2"]
    same_as_fresh(root, now, bert, REQUEST, tmp_path / "fresh")
    after = tree(root)
    small = ("zarr.json", "/c/0")  # index and metadata; rows behind the old ones
    for name, data in before.items():
        assert after[name] == data or name.endswith(small), name
        assert not ("hidden" in name and name.endswith("/0/0")) or after[name] == data, name
    moved = [i for i, (a, b) in enumerate(zip(first, rows_of(root, [u.id for u in corpus.utterances]))) if a != b]
    assert set(moved) <= {0, 1, 2, 3} and 1 in moved
    assert verify(Store.open(root)) == [] and status(root).complete
    array = zarr.open_array(root / "data.zarr" / "t" / "hidden", mode="r")
    start = zarr.open_array(root / "data.zarr" / "t" / "start", mode="r")
    view = View("t", "both:4", 2)
    row, n = Store.open(root).rows(["u1"])[0], int(Store.open(root).lengths("t")[Store.open(root).rows(["u1"])[0]])
    at = int(np.asarray(start[row]))
    assert np.array_equal(array[2, 1, at : at + n], Store.open(root).gather(["u1"], [view]).states[view])
    again = extract(root, now, loaded(bert), REQUEST)
    assert again.units_done_now == 0 and tree(root) == after


def test_new_utterances_come_into_tail_shards(bert: Path, tmp_path: Path) -> None:
    """A new session only adds. An utterance at the end of a session changes the context of the last ones before it."""
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    more = Corpus(corpus.path, [*corpus.utterances, Utterance(id="n0", text="wholly unseen quartz", session="new")])
    size = size_up(root, more, loaded(bert), REQUEST)
    assert size.units_missing == 3 and size.utterances == 31
    done = extract(root, more, loaded(bert), Request("t", [0, 1, 2], CONTEXTS))
    assert "t/past:4/1" in done.views
    same_as_fresh(root, more, bert, Request("t", [0, 1, 2], CONTEXTS), tmp_path / "fresh")
    vocabulary, table = Store.open(root).embedding("t")
    fresh, expected = Store.open(tmp_path / "fresh").embedding("t")
    assert np.array_equal(vocabulary, fresh) and np.array_equal(table, expected)
    assert Store.open(root).pieces("t") == Store.open(tmp_path / "fresh").pieces("t")
    late = Corpus(corpus.path, [*more.utterances, Utterance(id="n1", text="and more", session="s0")])
    with pytest.raises(StaleError, match="t/both:4: "):
        extract(root, late, loaded(bert), REQUEST)
    extract(root, late, loaded(bert), REQUEST, refresh=True)
    same_as_fresh(root, late, bert, Request("t", [0, 1, 2], CONTEXTS), tmp_path / "fresh")
    assert verify(Store.open(root)) == []


def test_removed_utterances_cannot_be_read(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    now = edited(corpus, u5=None, u29=None)
    extract(root, now, loaded(bert), REQUEST, refresh=True)
    store = Store.open(root)
    view = store.views[0]
    assert not store.has(["u5"], view)[0] and len(store.utterance_ids) == 28
    with pytest.raises(NoStoreError, match="u5"):
        store.gather(["u5"], [view])
    same_as_fresh(root, now, bert, REQUEST, tmp_path / "fresh")
    extract(root, now, loaded(bert), Request("t", [1], ["future:4"]))  # more views in shards with deleted rows
    assert verify(Store.open(root)) == [] and status(root).complete
    assert int(store.lengths("t").sum()) == store.teacher("t").tokens
    last = edited(now, u28=None)  # alone in its session, so no context saw it and nothing is extracted again
    assert extract(root, last, loaded(bert), REQUEST, refresh=True).units_done_now == 0
    assert len(Store.open(root).utterance_ids) == 27 and verify(Store.open(root)) == []
    back = extract(root, corpus, loaded(bert), REQUEST, refresh=True)
    assert back.utterances == 30 and Store.open(root).has(["u5"], view)[0]


def test_moved_utterances_are_stale_in_contexts_alone(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    before = Store.open(root).gather(["u1"], [View("t", "alone", 2)])
    order = [0, 2, 1, *range(3, 30)]
    now = Corpus(corpus.path, [corpus.utterances[i] for i in order])
    with pytest.raises(StaleError) as e:
        extract(root, now, loaded(bert), REQUEST)
    assert "alone" not in str(e.value) and "another text" not in str(e.value)
    seen: list[int] = []
    extract(root, now, loaded(bert), REQUEST, lambda p: seen.append(p.fed_tokens), refresh=True)
    same_as_fresh(root, now, bert, REQUEST, tmp_path / "fresh")
    after = Store.open(root).gather(["u1"], [View("t", "alone", 2)])
    assert np.array_equal(*(g.states[View("t", "alone", 2)] for g in (before, after)))  # copied, not run again
    assert extract(root, Corpus(corpus.path, now.utterances[::1]), loaded(bert), REQUEST).units_done_now == 0
    sessions = Corpus(corpus.path, sorted(now.utterances, key=lambda u: str(u.session), reverse=True))
    assert extract(root, sessions, loaded(bert), REQUEST).units_done_now == 0  # no context depends on it


def test_each_teacher_is_refreshed_by_itself(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), REQUEST)
    other = Request("gpt", [1, 3], ["alone", "past:8"])
    extract(root, corpus, loaded(gpt2), other)
    now = edited(corpus, u7="another end", u3=None)
    extract(root, now, loaded(bert), REQUEST, refresh=True)
    store = Store.open(root)
    assert store.text_hash(["u7"], "t") != store.text_hash(["u7"], "gpt")
    assert store.has(["u3"], View("gpt", "alone", 1))[0] and not store.has(["u3"], View("t", "alone", 0))[0]
    g = store.gather(["u7", "u8"], [View("gpt", "past:8", 3), View("t", "both:4", 2)])
    assert len(g.states[View("gpt", "past:8", 3)]) == g.lengths["gpt"].sum()
    with pytest.raises(StaleError, match="u7"):
        extract(root, now, loaded(gpt2), other)
    extract(root, now, loaded(gpt2), other, refresh=True)
    extract(tmp_path / "own", now, loaded(gpt2), other)
    grown, own = Store.open(root), Store.open(tmp_path / "own")
    assert verify(grown) == [] and grown.utterance_ids == own.utterance_ids
    for view in own.views:
        assert np.array_equal(grown.input_hash(own.utterance_ids, view), own.input_hash(own.utterance_ids, view))
    extract(root, now, loaded(bert), Request("third", [1], ["past:4"]))  # new to a store whose rows are not in order
    assert verify(Store.open(root)) == []
    extract(tmp_path / "3", now, loaded(bert), Request("third", [1], ["past:4"]))
    third, view = Store.open(tmp_path / "3"), View("third", "past:4", 1)
    ids = third.utterance_ids
    assert np.array_equal(Store.open(root).input_hash(ids, view), third.input_hash(ids, view))


def test_no_refresh_under_a_writer(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus(TEXTS)
    extract(root, corpus, loaded(bert), REQUEST)
    with Scratch(Paths(root)), pytest.raises(LockedError, match="a writer is at work"):
        extract(root, edited(corpus, u1="x"), loaded(bert), REQUEST, refresh=True)
    assert extract(root, corpus, loaded(bert), REQUEST).units_done_now == 0


def said(corpus: Corpus) -> list[list[tuple[str, str]]]:
    return [[(u.id, u.text) for u in (corpus.utterances[i] for i in s)] for s in corpus.sessions()]


def test_stale_utterances_without_a_teacher(bert: Path, tmp_path: Path) -> None:
    """Utterances that saw a changed neighbour are among those that `extract` calls stale. After a refresh none is."""
    root, corpus = tmp_path / "s", make_corpus()
    contexts = ["alone", "past:4", "future:4", "both:4"]
    extract(root, corpus, loaded(bert), Request("t", [2], contexts))
    store = Store.open(root)
    assert stale(store, store.views, said(corpus)) == {}
    sessions = Corpus(corpus.path, sorted(corpus.utterances, key=lambda u: str(u.session), reverse=True))
    assert stale(store, store.views, said(sessions)) == {}
    first = corpus.utterances[0]
    edits = [
        edited(corpus, u1="he would wear it here"),
        edited(corpus, u5=None, u10=None),
        Corpus(corpus.path, [corpus.utterances[i] for i in [0, 2, 1, *range(3, 30)]]),
        Corpus(corpus.path, [Utterance(id="n", text="in front", session=first.session), *corpus.utterances]),
    ]
    for now in edits:
        found = stale(store, store.views, said(now))
        with pytest.raises(StaleError) as e:
            extract(root, now, loaded(bert), Request("t", [2], contexts))
        fresh = tmp_path / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        extract(fresh, now, loaded(bert), Request("t", [2], contexts))
        other = Store.open(fresh)
        both = [i for i in store.utterance_ids if other.index.rows([i])[0] >= 0]
        both = [i for i in both if store.text_hash([i])[0] == other.text_hash([i])[0]]
        assert found, str(e.value)
        for context in contexts:
            view = View("t", context, 2)
            fed = {i for i in both if store.input_hash([i], view)[0] != other.input_hash([i], view)[0]}
            told = {i for i, which in found.items() if context in which}
            if context in ("alone", "past:4", "future:4"):  # one window for each utterance: exact
                assert told == fed, (context, told, fed)
            assert told <= fed, (context, told - fed)
    extract(root, edits[0], loaded(bert), Request("t", [2], contexts), refresh=True)
    store = Store.open(root)
    assert stale(store, store.views, said(edits[0])) == {}
    assert "u0" in stale(store, store.views, said(corpus))


def test_training_refuses_what_saw_other_neighbours(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), Request("t", [2], ["alone", "past:4"]))
    now = edited(corpus, u1="he would wear it here")
    texts = {u.id: u.text for u in now.utterances}
    store, past = Store.open(root), View("t", "past:4", 2)

    def read(ids: list[str], views: list[View], on_missing: str = "error") -> int:
        reader = TargetReader([(store, views)], on_missing=on_missing, corpus=now)
        return reader.read(ids, [texts[i] for i in ids]).skipped

    assert read(["u0", "u4"], [past]) == 0
    with pytest.raises(StaleError, match=r"other neighbours than their contexts saw have u2; .*--refresh"):
        read(["u0", "u2"], [past])
    assert read(["u0", "u2"], [View("t", "alone", 2)]) == 0
    assert read(["u0", "u1", "u2"], [past], "skip") == 2
    extract(root, now, loaded(bert), Request("t", [2], ["alone", "past:4"]), refresh=True)
    store = Store.open(root)
    assert read([u.id for u in now.utterances], [past]) == 0
    part = Corpus(now.path, [u.model_copy(update={"split": "ab"[int(u.id[1:]) % 2]}) for u in now.utterances])
    extract(tmp_path / "a", part.select("a"), loaded(bert), Request("t", [2], ["past:4"]))
    reader = TargetReader([(Store.open(tmp_path / "a"), [past])], corpus=part)  # without b, which is between
    assert reader.read(["u0", "u2"], [texts["u0"], texts["u2"]]).skipped == 0

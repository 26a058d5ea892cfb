"""The reader against zarr-python, in forks and pickles, and what it says about missing and damaged utterances."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.errors import NoStoreError, StaleError, StoreError, UsageError
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View, hash_text
from stillhouse.extract.store.disk.paths import Paths

from ..conftest import TEXTS, loaded, make_corpus

VIEWS = [View("bert", c, k) for c in ("alone", "both:4") for k in (0, 1, 2)]


def slow_gather(root: Path, ids: list[str], view: View) -> np.ndarray:
    """Through zarr-python alone, from the definition of the format."""
    group = zarr.open_group(root / "data.zarr", mode="r")
    everything = bytes(group["utterances/id_bytes"][:])
    offset = group["utterances/id_offset"][:]
    where = {everything[a:b].decode(): u for u, (a, b) in enumerate(itertools.pairwise(offset))}
    record = group[view.teacher].attrs["stillhouse"]
    c, k = record["contexts"].index(view.context), record["layers"].index(view.layer)
    start, length = group[view.teacher]["start"][:], group[view.teacher]["length"][:]
    parts = [group[view.teacher]["hidden"][c, k, start[where[i]] : start[where[i]] + length[where[i]]] for i in ids]
    width = record["width"]
    return np.concatenate([np.zeros((0, width), np.float16), *parts])


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(st.integers(0, len(TEXTS) * 3 - 1), max_size=12),
    views=st.lists(st.sampled_from(VIEWS), min_size=1, max_size=4),
    checksums=st.booleans(),
)
def test_gather_equals_zarr(small_store: Path, picks: list[int], views: list[View], checksums: bool) -> None:
    """Any ids in any order, twice the same one, empty utterances, no ids at all."""
    store = Store.open(small_store, checksums=checksums)
    ids = [f"u{i}" for i in picks]
    got = store.gather(ids, views)
    for view in views:
        assert np.array_equal(got.states[view], slow_gather(small_store, ids, view))
    assert got.lengths["bert"].sum() == len(got.states[views[0]]) == len(got.token_id["bert"]) == len(got.span["bert"])
    assert (got.token_id["bert"] >= 0).all()


def test_resolve(small_store: Path) -> None:
    store = Store.open(small_store)
    assert store.views == VIEWS
    assert store.resolve("bert/*/0,2") == [VIEWS[0], VIEWS[2], VIEWS[3], VIEWS[5]]
    assert store.resolve("bert/alone/last") == store.resolve("bert/alone/-1") == [VIEWS[2]]
    assert store.resolve("bert") == store.resolve("*/*/*") == VIEWS
    assert store.resolve(["bert/both:4/1", "bert/*/1"]) == [VIEWS[4], VIEWS[1]]
    with pytest.raises(NoStoreError, match="there are: bert/alone/0, bert/alone/1"):
        store.resolve("gpt2/*/1")


def test_opening_opens_nothing(small_store: Path) -> None:
    def open_files() -> set[str]:
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _alive(fd)}

    before = open_files()
    store = pickle.loads(pickle.dumps(Store.open(small_store)))
    assert not any("hidden" in f for f in open_files() - before)
    store.gather(["u1"], VIEWS[:1])
    assert any("hidden" in f for f in open_files() - before)
    store.close()
    assert not any("hidden" in f for f in open_files() - before)


def _alive(fd: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{fd}")
        return True
    except OSError:
        return False


def _child(store: Store, ids: list[str], out: multiprocessing.Queue) -> None:
    out.put(store.gather(ids, VIEWS[:1]).states[VIEWS[0]].tobytes())


@pytest.mark.parametrize("how", ["spawn"])
def test_another_process_reads_the_same(small_store: Path, how: str) -> None:
    store = Store.open(small_store)
    ids = store.utterance_ids[:5]
    want = store.gather(ids, VIEWS[:1]).states[VIEWS[0]].tobytes()
    context = multiprocessing.get_context(how)
    with context.Pool(1) as pool:
        assert pool.apply(_read, (store, ids)) == want


def _read(store: Store, ids: list[str]) -> bytes:
    return store.gather(ids, VIEWS[:1]).states[VIEWS[0]].tobytes()


def test_a_fork_after_reading_uses_its_own_handles(small_store: Path) -> None:
    """The child closes all it inherited from the store's files; it must still read, and the parent, too."""
    store = Store.open(small_store)
    ids = store.utterance_ids[:5]
    want = _read(store, ids)
    parents = [h.fd for h in store._states.handles._open.values()]
    child = os.fork()
    if child == 0:
        for fd in parents:
            os.close(fd)
        os._exit(0 if _read(store, ids) == want else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert _read(store, ids) == want


def test_more_files_than_handles(small_store: Path) -> None:
    """Six files a batch and room for two handles: what is in use stays open, and nothing piles up."""
    store = Store.open(small_store, checksums=True)
    store._states.handles._most = 2
    before = 0
    for i in range(5):
        store.gather(store.utterance_ids, VIEWS)
        if i == 0:
            before = len(os.listdir("/proc/self/fd"))
    assert len(store._states.handles._open) == 2 and len(os.listdir("/proc/self/fd")) <= before


def test_unknown_ids_and_views_are_named(small_store: Path) -> None:
    store = Store.open(small_store)
    with pytest.raises(NoStoreError, match="nobody"):
        store.gather(["u1", "nobody"], VIEWS[:1])
    with pytest.raises(NoStoreError, match="bert/alone/9"):
        store.gather(["u1"], [View("bert", "alone", 9)])
    with pytest.raises(NoStoreError, match="no teacher"):
        store.gather(["u1"], [View("gpt2", "alone", 1)])
    assert store.has(["u1", "nobody"], VIEWS[0]).tolist() == [True, False]


def test_uncommitted_rows_are_never_returned(small_store: Path, tmp_path: Path) -> None:
    """The shard files are all there; without its commit record a unit does not exist."""
    root = shutil.copytree(small_store, tmp_path / "s")
    Paths(root).commit("bert", "both:4", 0, 0).unlink()
    store = Store.open(root)
    assert store.views == VIEWS[:3]
    assert not store.has(["u1"], VIEWS[3])[0] and store.has(["u1"], VIEWS[0])[0]
    with pytest.raises(NoStoreError, match=r"not extracted yet: .*u1"):
        store.gather(["u0", "u1"], [VIEWS[3]])


def test_damage_is_named(small_store: Path, tmp_path: Path) -> None:
    from stillhouse.extract.store.verify.verify import verify

    root = shutil.copytree(small_store, tmp_path / "s")
    store = Store.open(root, checksums=True)
    row = int(store._teacher_rows("bert").start[store.rows(["u7"])[0]])
    path = Paths(root).hidden("bert", 1, 2, 0)
    with open(path, "r+b") as f:
        f.seek(row * 16 * 2 + 5)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    with pytest.raises(StoreError, match="bert/both:4/2 u7"):
        store.gather(["u7"], [VIEWS[5]])
    store.gather(["u6"], [VIEWS[5]])
    assert [f.where for f in verify(Store.open(root))] == ["bert/both:4/2 shard 0 utterance u7"]
    assert verify(Store.open(root), data=False) == []
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - 1)
    assert len(verify(Store.open(root), data=False)) == 1
    with pytest.raises(StoreError):
        Store.open(root).gather(["u6"], [VIEWS[5]])
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        Store.open(root).gather(["u6"], [VIEWS[5]])
    assert ["cannot be opened" in f.what for f in verify(Store.open(root), data=False)] == [True]


def test_changed_transcripts_are_stale(small_store: Path) -> None:
    store = Store.open(small_store)
    store.check_texts(["u0", "u1"], TEXTS[:2])
    assert store.text_hash(["u1"])[0] == hash_text(TEXTS[1])
    with pytest.raises(StaleError, match="u1"):
        store.check_texts(["u0", "u1"], [TEXTS[0], "another text"])


def test_tokens_match_the_transcript(small_store: Path) -> None:
    store = Store.open(small_store)
    g = store.gather(["u5"], VIEWS[:1])
    text = TEXTS[5]
    vocab, embedding = store.embedding("bert")
    pieces = dict(zip(vocab.tolist(), store.pieces("bert")))
    assert embedding.shape == (len(vocab), 16) and len(pieces) == len(vocab)
    for i, (a, b) in zip(g.token_id["bert"].tolist(), g.span["bert"].tolist()):
        piece = pieces[i].removeprefix("##")
        if piece != "[UNK]":
            assert text[a:b].lower().replace("ï", "i").replace("é", "e") == piece


def test_embedding_rows_are_the_models(small_store: Path, bert: Path) -> None:
    vocab, embedding = Store.open(small_store).embedding("bert")
    weight = loaded(bert).model.get_input_embeddings().weight.numpy()
    assert np.array_equal(embedding, weight[vocab].astype(np.float16))


def test_norms_over_the_sample(small_store: Path) -> None:
    store = Store.open(small_store)
    states = store.gather(store.utterance_ids, [VIEWS[4]]).states[VIEWS[4]].astype(np.float64)
    mean, std = store.norm(VIEWS[4])
    np.testing.assert_allclose(mean, states.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, np.maximum(states.std(axis=0), 1e-3), rtol=1e-4)


def test_layer_0_has_a_floor_under_its_deviation(tmp_path: Path, bert: Path) -> None:
    corpus = make_corpus(["we", "we", "we"], per_session=1)
    extract(tmp_path / "s", corpus, loaded(bert), Request("t", [2], ["alone"]))
    assert (Store.open(tmp_path / "s").norm(View("t", "alone", 2))[1] >= 1e-3).all()


def test_what_comes_out(small_store: Path) -> None:
    """As float32 it is numpy's conversion; `allocate` gives the memory, C-contiguous, for every view."""
    store, given = Store.open(small_store), []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        given.append(np.full(shape, 7, dtype))
        return given[-1]

    ids = store.utterance_ids[::-1]
    stored = store.gather(ids, VIEWS[:3])
    for dtype in (None, "float32", "float16"):
        given.clear()
        got = store.gather(ids, VIEWS[:3], dtype, allocate)
        for view, memory in zip(VIEWS, given):
            assert got.states[view] is memory and memory.dtype == np.dtype(dtype or "float16")
            assert np.array_equal(memory, stored.states[view].astype(memory.dtype))
        assert len(given) == 3
    with pytest.raises(UsageError, match="float64"):
        store.gather(ids, VIEWS, "float64")


def test_ids_are_remembered_and_forgotten(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.extract.store.format import index

    monkeypatch.setattr(index, "REMEMBERED", 40)
    store = Store.open(small_store)
    want = {i: int(r) for i, r in zip(store.utterance_ids, store.rows(store.utterance_ids))}
    for first in range(0, 60, 3):
        ids = [f"u{i % 30}" for i in range(first, first + 5)] + ["u3", "nobody"]
        assert store.index.rows(ids).tolist() == [want.get(i, -1) for i in ids]
        assert len(store.index._known) <= 46
    assert store.index.rows([]).tolist() == []


def test_cold_reading_equals_hot(small_store: Path) -> None:
    """The path for what is not in memory, with runs that touch and one that is cut short."""
    from stillhouse.extract.store.read.rows import ShardRead

    store = Store.open(small_store, checksums=True)
    ids = ["u4", *store.utterance_ids, "u1", "u1"]
    want = store.gather(ids, VIEWS).states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardRead, "hot", lambda *_: False)
        got = store.gather(ids, VIEWS).states
        whole = os.preadv
        patch.setattr(os, "preadv", lambda fd, buffers, at, *rest: whole(fd, [buffers[0][:7]], at, *rest))
        short = store.gather(ids, VIEWS).states
    assert all(np.array_equal(got[v], want[v]) and np.array_equal(short[v], want[v]) for v in VIEWS)


def test_tokens_come_when_looked_at_and_from_files_found_before(small_store: Path, tmp_path: Path) -> None:
    """A batch that is pickled, or looked at after its store is gone, has the tokens that `tokens` reads."""
    whole = shutil.copytree(small_store, tmp_path / "store")
    store = Store.open(whole)
    ids = store.utterance_ids[:5][::-1]
    lengths, token_id, span = store.tokens(ids, "bert")
    batch = store.gather(ids, store.views[:1])
    assert batch.token_id.keys() == batch.span.keys() == batch.lengths.keys() == {"bert"}
    shutil.rmtree(whole)
    assert np.array_equal(batch.token_id["bert"], token_id) and batch.token_id["bert"] is batch.token_id["bert"]
    sent = pickle.loads(pickle.dumps(batch))
    assert type(sent.span) is dict and np.array_equal(sent.span["bert"], span)
    assert np.array_equal(sent.token_id["bert"], token_id) and np.array_equal(sent.lengths["bert"], lengths)


def test_missing_tokens_are_named_at_once(small_store: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(small_store, tmp_path / "store")
    for path in (whole / "data.zarr" / "bert" / "span" / "c").rglob("*"):
        if path.is_file():
            path.unlink()
    store = Store.open(whole)
    with pytest.raises(StoreError, match="a chunk is missing"):
        store.gather(store.utterance_ids[:5], store.views[:1])

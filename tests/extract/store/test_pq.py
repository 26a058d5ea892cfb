"""pq:M stores: M codes of 8 bits a state, and everything else as in the other stores."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from stillhouse.cli import main
from stillhouse.data.errors import StaleError, StoreError, UsageError
from stillhouse.extract.maintain.repair import repair
from stillhouse.extract.pipeline.estimate import size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import folder_bytes
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk.files import StoreFiles
from stillhouse.extract.store.disk.layout import dtype_of
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.format.pq import decode_pq, decoding_table, encode_pq, learn
from stillhouse.extract.store.verify.verify import verify
from stillhouse.extract.teacher.forward import encode_by_products, encode_tensor, tensors
from stillhouse.extract.teacher.model import load_teacher

from ..conftest import loaded, make_corpus
from ..pipeline.test_crash import tree
from ..pipeline.test_extract import long_corpus
from .test_int8 import check_kills

PQ = Request("bert", [0, 1, 2], ["alone", "both:4"], dtype="pq:4")
VIEWS = [View("bert", c, k) for c in ("alone", "both:4") for k in (0, 1, 2)]


@pytest.fixture(scope="module")
def pq_store(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """The corpus, teacher and views of `small_store`."""
    root = tmp_path_factory.mktemp("pq") / "s"
    extract(root, make_corpus(), loaded(bert), PQ)
    return root


def nearest(z: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Return the codes of standardised states [N, D] by a plain loop in float64."""
    width = book.shape[2]
    codes = np.empty((len(z), len(book)), np.uint8)
    for m in range(len(book)):
        part = z[:, m * width : (m + 1) * width].astype(np.float64)
        codes[:, m] = ((part[:, None] - book[m].astype(np.float64)) ** 2).sum(-1).argmin(1)
    return codes


def test_by_hand() -> None:
    """Two parts of one dimension: the nearest vector of each, the first of equals, and what is lost."""
    mean, std = np.array([1, 0], np.float32), np.array([2, 1], np.float32)
    book = np.full((2, 256, 1), 9, np.float16)
    book[0, :3, 0], book[1, :3, 0] = (0, 1, 3), (-1, 1, 1)
    got = encode_pq(np.array([[2, 1.5], [5, 0]], np.float32), mean, std, book)  # standardised: 0.5, 1.5 and 2, 0
    assert got.values.tolist() == [[0, 1], [1, 0]]
    assert got.loss[0].tolist() == [(0.5 * 2) ** 2 + 0.5**2, 4 + 1.5**2, 0.5**2 + 0.5**2, 0.5**2 + 1.5**2]
    assert got.loss[1].tolist() == [4 + 1, 25, 1 + 1, 4]
    for dtype in (np.float32, np.float16):
        out = np.empty((2, 2), dtype)
        decode_pq(got.values, decoding_table(mean, std, book, dtype=dtype), out)
        assert out.tolist() == [[1, 1], [3, -1]]
    assert not encode_pq(np.array([[np.nan, 0]], np.float32), mean, std, book).finite


def test_codes_are_those_of_a_plain_loop() -> None:
    """Also for numbers of rows that are no multiple of four, and in torch; the loss is recomputed from the codes."""
    rng = np.random.default_rng(1)
    sample = (rng.normal(size=(700, 24)) @ rng.normal(size=(24, 24))).astype(np.float32)
    mean, std = sample.mean(0), sample.std(0)
    for codes in (1, 6, 24):
        book = learn(sample, mean, std, codes)
        assert book.shape == (codes, 256, 24 // codes) and book.dtype == np.float16
        states = sample[: 131 + codes]
        ours, z = encode_pq(states, mean, std, book), (states - mean) / std
        assert np.array_equal(ours.values, nearest(z, book))
        theirs = encode_tensor(
            torch.from_numpy(states)[None], dtype_of(f"pq:{codes}"), tensors((mean, std, book), "cpu")
        )
        assert np.array_equal(theirs.values[0], ours.values)
        by_products = encode_by_products(torch.from_numpy(states)[None], *tensors((mean, std, book), "cpu"))
        assert np.array_equal(by_products.values[0], ours.values)
        np.testing.assert_allclose(by_products.loss[0], ours.loss, rtol=1e-4, atol=1e-5)
        decoded = np.concatenate([book[m][ours.values[:, m]].astype(np.float32) for m in range(codes)], 1)
        want = [(v.astype(np.float64) ** 2).sum(-1) for v in ((z - decoded) * std, states, z - decoded, z)]
        np.testing.assert_allclose(ours.loss, np.stack(want, -1), rtol=1e-4, atol=1e-5)


def test_codebooks_are_means_of_what_they_encode_and_the_same_whatever_the_threads(monkeypatch) -> None:
    """k-means has converged where each vector is the mean of its rows; fewer codes have a larger error."""
    rng = np.random.default_rng(2)
    sample = (rng.normal(size=(3000, 16)) @ rng.normal(size=(16, 16)) * rng.uniform(0.1, 900, 16)).astype(np.float32)
    mean, std = sample.mean(0), sample.std(0)
    errors = []
    for codes in (2, 4, 8, 16):
        book = learn(sample, mean, std, codes)
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
        assert np.array_equal(book, learn(sample, mean, std, codes))
        monkeypatch.undo()
        loss = encode_pq(sample, mean, std, book).loss.sum(0)
        errors.append(float(np.sqrt(loss[2] / loss[3])))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.03
    one = encode_pq(sample, mean, std, book).values[:, 3]
    z = ((sample - mean) / std)[:, 3]
    distance = [abs(z[one == k].mean() - float(book[3, k, 0])) for k in np.unique(one)]
    assert np.median(distance) < 0.01
    random = sample[rng.permutation(len(sample))[:256]]
    loss = encode_pq(sample, mean, std, np.ascontiguousarray(((random - mean) / std).reshape(256, 2, 8).swapaxes(0, 1)))
    best = encode_pq(sample, mean, std, learn(sample, mean, std, 2))
    assert best.loss[:, 2].sum() < 0.9 * loss.loss[:, 2].sum()


@pytest.mark.parametrize("rows", [1, 2, 255, 256])
def test_samples_of_at_most_256_rows_are_kept_exactly(rows: int) -> None:
    sample = np.random.default_rng(3).normal(size=(rows, 6)).astype(np.float32)
    sample[-1] = sample[0]  # Rows that are equal do not need two vectors.
    mean, std = np.zeros(6, np.float32), np.ones(6, np.float32)
    book = learn(sample, mean, std, 2)
    assert np.isfinite(book).all()
    loss = encode_pq(sample, mean, std, book).loss.sum(0)
    assert np.sqrt(loss[2] / loss[3]) < 1e-3


def test_it_reads_as_float16_does(pq_store: Path, small_store: Path) -> None:
    """Decoded states by default, as the definition of the format says; codes on request."""
    ours, theirs = Store.open(pq_store, checksums=True), Store.open(small_store)
    assert ours.views == theirs.views == VIEWS
    ids = [*ours.utterance_ids[::-1], "u1"]
    both = ours.gather(ids, VIEWS, "codes")
    for view in VIEWS:
        got, codes, book = ours.gather(ids, [view]).states[view], both.states[view], ours.codebooks(view)
        want = theirs.gather(ids, [view], "float32").states[view]
        assert codes.dtype == np.uint8 and codes.shape == (len(want), 4)
        assert book.dtype == np.float32 and book.shape == (4, 256, 4)
        mean, std = ours.norm(view)
        decoded = np.concatenate([book[m][codes[:, m]] for m in range(4)], 1) * std + mean
        assert got.dtype == np.float32 and np.array_equal(got, decoded)
        halves = ours.gather(ids, [view], "float16").states[view]
        assert halves.dtype == np.float16 and np.array_equal(halves, got.astype(np.float16))
        error = np.linalg.norm((got - want) / std) / np.linalg.norm((want - mean) / std)
        loss = ours.loss(view)
        assert loss is not None and error < 0.4 and loss.standardised == pytest.approx(error, abs=0.1)
        np.testing.assert_allclose(ours.norm(view), theirs.norm(view), rtol=0.05, atol=0.02)
        assert np.array_equal(both.lengths["bert"], ours.gather(ids, [view]).lengths["bert"])
    assert ours.gather([], VIEWS).states[VIEWS[0]].shape == (0, 16)
    assert ours.gather([], VIEWS, "codes").states[VIEWS[0]].shape == (0, 4)
    with pytest.raises(UsageError, match="bert/alone/0: its states are stored in float16, without codes"):
        theirs.gather(ids, VIEWS[:1], "codes")
    with pytest.raises(UsageError, match="bert/alone/0: its states are stored in float16, without codes"):
        theirs.codebooks(VIEWS[0])


def test_plain_zarr_and_xarray(pq_store: Path) -> None:
    import xarray

    group, store = zarr.open_group(pq_store / "data.zarr", mode="r")["bert"], Store.open(pq_store)
    code, book = group["code"], group["codebook"]
    assert code.dtype == np.uint8 and "hidden" not in group and "scale" not in group
    assert book.dtype == np.float16 and book.shape == (2, 3, 4, 256, 4)
    rows, lengths = store.rows(store.utterance_ids), group["length"][:]
    for c, k in ((0, 0), (1, 2)):
        view = VIEWS[3 * c + k]
        mean, std, vectors = group["norm_mean"][c, k], group["norm_std"][c, k], book[c, k].astype(np.float32)
        for u in rows[:12].tolist():
            s, n = int(group["start"][u]), int(lengths[u])
            want = vectors[np.arange(4), code[c, k, s : s + n]].reshape(n, 16) * std + mean
            np.testing.assert_allclose(store.gather([store.index.id(u)], [view]).states[view], want, rtol=1e-6)
    opened = xarray.open_zarr(pq_store / "data.zarr", group="bert", consolidated=False)
    assert opened["code"].sizes["part"] == opened["codebook"].sizes["part"] == 4
    assert opened["norm_mean"].sizes["dimension"] == 16


def test_names() -> None:
    assert dtype_of("pq:32").codes == 32 and dtype_of("pq:512").row_bytes(1024) == 512
    for wrong in ("pq:0", "pq:", "pq", "pq:1000", "pq:-4", "pq:4.0", "pq: 4", "pq:08", "pq:٣", "pq4", "int9"):
        with pytest.raises(UsageError, match=re.escape(repr(wrong))):
            dtype_of(wrong)


@pytest.mark.parametrize("wrong", ["pq:0", "pq:", "pq:1000", "float8"])
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    """A name that is none is refused before anything is read."""
    with pytest.raises(SystemExit) as e:
        main(["extract", str(tmp_path / "c.jsonl"), str(tmp_path / "s"), "--teacher", "x", "--dtype", wrong])
    told = capsys.readouterr().err
    assert e.value.code == 2 and repr(wrong) in told and "pq:M" in told


def test_widths_that_do_not_divide_name_those_that_do(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(UsageError, match=r"pq:6 cannot cut states of width 16 into 6 .* among 1, 2, 4, 8, 16\)"):
        extract(tmp_path / "s", make_corpus(), loaded(bert), Request("t", [0], ["alone"], dtype="pq:6"))
    assert not (tmp_path / "s" / "store.json").exists()


def test_an_unknown_dtype_is_refused_by_name(pq_store: Path, tmp_path: Path) -> None:
    """As a later format would be by this version."""
    text = (pq_store / "store.json").read_text()
    (tmp_path / "store.json").write_text(text.replace('"pq:4"', '"vq:4"'))
    with pytest.raises(StoreError, match=r"does not read the states of bert.*unknown store dtype 'vq:4'"):
        Store.open(tmp_path)


def test_size(tmp_path: Path, bert: Path) -> None:
    """A dry run says the bytes of the codes, and with the codebooks all bytes that will be there."""
    request, corpus = Request("t", [1, 2], ["alone"], dtype="pq:8"), long_corpus()
    plan = size_up(tmp_path / "s", corpus, loaded(bert), request)
    done = extract(tmp_path / "s", corpus, loaded(bert), request)
    group, files = tmp_path / "s" / "data.zarr" / "t", StoreFiles(tmp_path / "s")
    metadata = (group / "code" / "zarr.json").stat().st_size
    assert folder_bytes(files, group / "code") - metadata == sum(plan.bytes_per_view.values())
    assert done.hidden_bytes == folder_bytes(files, group / "code")
    assert plan.bytes_per_view["t/alone/1"] < done.tokens * 8 * 1.1
    assert folder_bytes(files, group / "codebook") > 2 * 256 * 16 * 2
    plain = size_up(tmp_path / "t", corpus, loaded(bert), Request("t", [1, 2], ["alone"]))
    assert plan.other_bytes == plain.other_bytes + 2 * 256 * 16 * 2
    more = size_up(tmp_path / "s", corpus, loaded(bert), Request("t", [0, 1], ["alone"], dtype="pq:8"))
    assert set(more.bytes_per_view) == {"t/alone/0"}


def test_damage_is_found_and_mended(tmp_path: Path, bert: Path) -> None:
    root = tmp_path / "s"
    extract(root, long_corpus(), loaded(bert), Request("t", [0, 2], ["alone", "both:4"], dtype="pq:4"))
    good, paths = tree(root), Paths(root)
    assert verify(Store.open(root)) == []
    files = [paths.shard_file("code", "t", 0, 1, 1), paths.shard_file("code", "t", 1, 0, 2)]
    for path in files:
        data = bytearray(path.read_bytes())
        data[33] ^= 8
        path.write_bytes(data)
    paths.shard_file("code", "t", 1, 1, 0).unlink()
    found = [f.where.split(" utterance")[0].split(": ")[0] for f in verify(Store.open(root))]
    assert found == ["t/alone/2 shard 1", "t/both:4/2 shard 0", "t/both:4/0 shard 2"]
    hurt = next(f.where.split(" utterance ")[1] for f in verify(Store.open(root)) if "t/both:4/0" in f.where)
    with pytest.raises(StoreError, match=f"t/both:4/0 {hurt}"):
        Store.open(root, checksums=True).gather([hurt], [View("t", "both:4", 0)])
    repair(root, loaded(bert), "t")
    assert tree(root) == good and verify(Store.open(root)) == []


def test_extending_keeps_what_is_there(tmp_path: Path, bert: Path) -> None:
    """Layers and contexts added later have the bytes that they would have had at once."""
    corpus = long_corpus(2)
    extract(tmp_path / "a", corpus, loaded(bert), Request("t", [0], ["alone"], dtype="pq:8"))
    before = tree(tmp_path / "a")
    both = Request("t", [0, 2], ["alone", "both:4"], dtype="pq:8")
    extract(tmp_path / "a", corpus, loaded(bert), both)
    extract(tmp_path / "b", corpus, loaded(bert), both)
    a, b = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    assert a.views == b.views and len(a.views) == 4
    for view in a.views:
        assert np.array_equal(a.codebooks(view), b.codebooks(view))
        one, other = (s.gather(a.utterance_ids, [view], "codes").states[view] for s in (a, b))
        assert np.array_equal(one, other)
    after = tree(tmp_path / "a")
    assert all(after[k] == v for k, v in before.items() if "/c/" in k and ("code" in k or "norm" in k))
    with pytest.raises(StaleError, match="the stored dtype"):
        extract(tmp_path / "a", corpus, loaded(bert), Request("t", [0], ["alone"], dtype="pq:4"))


def test_samples_beyond_the_memory_are_run_by_layers(tmp_path: Path, bert: Path, monkeypatch) -> None:
    from stillhouse.extract.pipeline import norms

    request = Request("t", [0, 1, 2], ["alone"], dtype="pq:4")
    extract(tmp_path / "a", long_corpus(2), loaded(bert), request)
    monkeypatch.setattr(norms, "SAMPLE_BYTES", 1)
    extract(tmp_path / "b", long_corpus(2), loaded(bert), request)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_killed_at_every_phase(tmp_path: Path, bert: Path) -> None:
    """Also between codebooks and codes: writers that come later agree on one set of codebooks."""
    phases = ["before_link:1", "after_link:1", "mid_write:3", "before_rename:1", "mid_rename:1", "after_link:2"]
    check_kills(tmp_path, bert, "pq:4", phases)


def test_large_states_fit_and_states_that_are_not_finite_are_named(tmp_path: Path, bert: Path, monkeypatch) -> None:
    from stillhouse.extract.pipeline import norms

    teacher = load_teacher(str(bert), device="cpu")
    teacher.model.embeddings.LayerNorm.weight.mul_(1e7)
    extract(tmp_path / "a", make_corpus(), teacher, Request("t", [0], ["alone"], dtype="pq:16"))
    store = Store.open(tmp_path / "a")
    states = store.gather(store.utterance_ids, store.views).states[store.views[0]]
    assert np.isfinite(states).all() and np.abs(states).max() > 65504
    monkeypatch.setattr(norms, "sample_rows", lambda lengths: np.array([0]))
    teacher = load_teacher(str(bert), device="cpu")
    seen = teacher.tokeniser.encode(["they went"], "none").ids
    teacher.model.embeddings.word_embeddings.weight[int(seen[-1])] = np.nan
    corpus = make_corpus(["we", "we", "they went", "we"], per_session=1)
    with pytest.raises(StoreError, match=r"u2: a value of t/alone/1 is not finite in pq:4: the model itself"):
        extract(tmp_path / "b", corpus, teacher, Request("t", [1], ["alone"], dtype="pq:4"))


def test_a_damaged_codebook_is_never_used(pq_store: Path, tmp_path: Path, bert: Path) -> None:
    """Neither to decode nor to encode more states."""
    import shutil

    root = shutil.copytree(pq_store, tmp_path / "s")
    path = Paths(root).chunk("bert", "codebook", 0, 1, 0, 0, 0)
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    store = Store.open(root)
    assert [f.where for f in verify(store, data=0.0)] == ["bert/alone/1 codebook"]
    message = "bert/alone/1: stored bytes differ from their checksum: codebook"
    with pytest.raises(StoreError, match=message):
        store.gather(["u1"], [VIEWS[1]])
    with pytest.raises(StoreError, match=message):
        store.codebooks(VIEWS[1])
    assert store.gather(["u1"], [VIEWS[1]], "codes").states[VIEWS[1]].shape[1] == 4
    Paths(root).commit("bert", "alone", 0, 0).unlink()
    with pytest.raises(StoreError, match=message):
        extract(root, make_corpus(), loaded(bert), PQ)

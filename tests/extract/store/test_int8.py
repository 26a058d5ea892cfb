"""int8 stores: half the size, an error below one percent, and everything else as in a float16 store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stillhouse.data.errors import StaleError, StoreError
from stillhouse.extract.maintain.repair import repair
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk.files import StoreFiles
from stillhouse.extract.store.disk.layout import dtype_of, to_float32
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.format.int8 import dequantise, quantise
from stillhouse.extract.store.verify.verify import verify
from stillhouse.extract.teacher.forward import encode_tensor, tensors
from stillhouse.extract.teacher.model import load_teacher

from ..conftest import loaded, make_corpus
from ..pipeline.test_crash import ENV, tree
from ..pipeline.test_extract import long_corpus

INT8 = Request("bert", [0, 1, 2], ["alone", "both:4"], dtype="int8")
VIEWS = [View("bert", c, k) for c in ("alone", "both:4") for k in (0, 1, 2)]


@pytest.fixture(scope="module")
def int8_store(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """The corpus, teacher and views of `small_store`."""
    root = tmp_path_factory.mktemp("int8") / "s"
    extract(root, make_corpus(), loaded(bert), INT8)
    return root


def test_quantising_by_hand() -> None:
    """Standardised 127, -63.5, 1 and 0 over a scale of 1; then a state that equals the mean."""
    mean, std = np.array([1, 0, 0, 5], np.float32), np.array([2, 1, 1, 1], np.float32)
    states = np.array([[255, -63.5, 1, 5], [1, 0, 0, 5]], np.float32)
    got = quantise(states, mean, std)
    assert got.values.tolist() == [[127, -64, 1, 0], [0, 0, 0, 0]]  # -63.5 rounds to even
    assert got.scale.tolist() == [1, 0]
    assert got.loss[0].tolist() == [0.25, 255**2 + 63.5**2 + 1 + 25, 0.25, 127**2 + 63.5**2 + 1]
    out = np.empty((2, 4), np.float32)
    dequantise(got.values, got.scale, mean, std, out)
    assert out.tolist() == [[255, -64, 1, 5], [1, 0, 0, 5]]


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (5, 6), elements=finite), st.integers(0, 9))
def test_torch_quantises_as_numpy(states: np.ndarray, seed: int) -> None:
    """Bit by bit; and what comes back is within half a step, that is 1/254 of the token's largest value."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=6).astype(np.float32), rng.uniform(0.01, 3, 6).astype(np.float32)
    ours = quantise(states, mean, std)
    theirs = encode_tensor(torch.from_numpy(states), dtype_of("int8"), tensors((mean, std), "cpu"))
    for name in ("values", "scale"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-4, atol=1e-6)
    out = np.empty_like(states)
    dequantise(ours.values, ours.scale, mean, std, out)
    z = np.abs((states - mean) / std)
    step = z.max(1, keepdims=True) / 127
    assert (np.abs((out - states) / std) <= 0.51 * step + 127 * 2**-11 * step + 1e-5).all()


def test_every_half_widens_as_in_numpy() -> None:
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for part in (half, half[np.isfinite(half)]):
        assert np.array_equal(to_float32(part, "float16"), part.astype(np.float32), equal_nan=True)


def test_it_reads_as_float16_does(int8_store: Path, small_store: Path) -> None:
    """Against the float16 store of the same states; as float32 by itself, as float16 when asked."""
    ours, theirs = Store.open(int8_store, checksums=True), Store.open(small_store)
    assert ours.views == theirs.views == VIEWS
    ids = [*ours.utterance_ids[::-1], "u1"]
    for view in VIEWS:
        got = ours.gather(ids, [view]).states[view]
        want = theirs.gather(ids, [view], "float32").states[view]
        assert got.dtype == want.dtype == np.float32
        assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
        halves = ours.gather(ids, [view], "float16").states[view]
        assert halves.dtype == np.float16 and np.array_equal(halves, got.astype(np.float16))
        loss = ours.loss(view)
        assert loss is not None and loss.relative <= 0.01 and loss.standardised <= 0.01
        np.testing.assert_allclose(ours.norm(view), theirs.norm(view), rtol=0.05, atol=0.02)
    assert theirs.loss(VIEWS[0]) is None
    assert ours.gather([], VIEWS).states[VIEWS[0]].shape == (0, 16)


def test_the_loss_is_what_was_lost(int8_store: Path, bert: Path) -> None:
    """Recomputed from the model's own states, over all tokens."""
    store, view = Store.open(int8_store), VIEWS[2]
    error = length = 0.0
    corpus = make_corpus()
    teacher = loaded(bert)
    seen: set[str] = set()
    for u in corpus.utterances:
        if not u.text or u.text in seen:
            continue
        seen.add(u.text)
        ids = torch.tensor(
            [teacher.tokeniser.prefix + store.tokens([u.id], "bert")[1].tolist() + teacher.tokeniser.suffix]
        )
        if ids.shape[1] > teacher.window:
            continue
        want = teacher._plain(ids)[2][0, 1:-1].numpy()
        got = store.gather([u.id], [view]).states[view]
        error, length = error + float(((got - want) ** 2).sum()), length + float((want**2).sum())
    loss = store.loss(view)
    assert loss is not None and np.sqrt(error / length) == pytest.approx(loss.relative, rel=0.1)


def test_plain_zarr(int8_store: Path) -> None:
    """From the definition of the format, through zarr-python alone; what was not asked for is NaN."""
    group = zarr.open_group(int8_store / "data.zarr", mode="r")["bert"]
    store = Store.open(int8_store)
    hidden, scale = group["hidden"], group["scale"]
    assert hidden.dtype == np.int8 and scale.dtype == np.float16 and scale.shape == hidden.shape[:3]
    rows, lengths = store.rows(store.utterance_ids), group["length"][:]
    for c, k in ((0, 0), (1, 2)):
        view = VIEWS[3 * c + k]
        mean, std = group["norm_mean"][c, k], group["norm_std"][c, k]
        for u in rows[:12].tolist():
            s, n = int(group["start"][u]), int(lengths[u])
            want = hidden[c, k, s : s + n].astype(np.float32) * scale[c, k, s : s + n].astype(np.float32)[:, None] * std
            got = store.gather([store.index.id(u)], [view]).states[view]
            np.testing.assert_allclose(got, want + mean, rtol=1e-6, atol=1e-6)
    assert np.isnan(scale[0, 0, int(lengths.sum()) :]).all()
    assert np.isfinite(scale[0, 0, : int(lengths.sum())]).all()


def test_size(tmp_path: Path, bert: Path) -> None:
    """16 dimensions take 16 bytes and 2 of scale a token; with 384 that is 0.503 of float16."""
    from stillhouse.extract.pipeline.estimate import size_up
    from stillhouse.extract.pipeline.progress import folder_bytes

    request = Request("t", [1], ["alone"], dtype="int8")
    corpus = long_corpus()
    plan = size_up(tmp_path / "s", corpus, loaded(bert), request)
    done = extract(tmp_path / "s", corpus, loaded(bert), request)
    group = tmp_path / "s" / "data.zarr" / "t"
    metadata = sum((group / n / "zarr.json").stat().st_size for n in ("hidden", "scale"))
    files = StoreFiles(tmp_path / "s")
    total = folder_bytes(files, group / "hidden") + folder_bytes(files, group / "scale")
    assert total - metadata == plan.bytes_per_view["t/alone/1"]
    assert done.hidden_bytes == total
    assert plan.bytes_per_view["t/alone/1"] < done.tokens * (16 + 2) * 1.1


def test_damage_of_states_and_scales_is_found_and_mended(tmp_path: Path, bert: Path) -> None:
    root = tmp_path / "s"
    request = Request("t", [0, 2], ["alone", "both:4"], dtype="int8")
    extract(root, long_corpus(), loaded(bert), request)
    good, paths = tree(root), Paths(root)
    assert verify(Store.open(root)) == []
    store = Store.open(root)
    for path in (paths.hidden("t", 0, 1, 1), paths.scale("t", 1, 0, 2)):
        data = bytearray(path.read_bytes())
        data[101] ^= 8
        path.write_bytes(data)
    paths.scale("t", 1, 1, 0).unlink()
    found = [f.where.split(" utterance")[0] for f in verify(Store.open(root))]
    assert found == ["t/alone/2 shard 1", "t/both:4/2 shard 0", "t/both:4/0 shard 2"]
    hurt = next(f.where.split(" utterance ")[1] for f in verify(Store.open(root)) if "t/both:4/0" in f.where)
    with pytest.raises(StoreError, match=f"t/both:4/0 {hurt}"):
        Store.open(root, checksums=True).gather([hurt], [View("t", "both:4", 0)])
    norms = store.norm(View("t", "alone", 2))
    repair(root, loaded(bert), "t")
    assert tree(root) == good and verify(Store.open(root)) == []
    assert np.array_equal(Store.open(root).norm(View("t", "alone", 2)), norms)


def test_extending_keeps_what_is_there(tmp_path: Path, bert: Path) -> None:
    """Layers and contexts added later have the bytes that they would have had at once."""
    corpus = long_corpus(2)
    extract(tmp_path / "a", corpus, loaded(bert), Request("t", [0], ["alone"], dtype="int8"))
    before = tree(tmp_path / "a")
    both = Request("t", [0, 2], ["alone", "both:4"], dtype="int8")
    extract(tmp_path / "a", corpus, loaded(bert), both)
    extract(tmp_path / "b", corpus, loaded(bert), both)
    a, b = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    assert a.views == b.views and len(a.views) == 4
    for view in a.views:
        assert np.array_equal(
            a.gather(a.utterance_ids, [view]).states[view], b.gather(a.utterance_ids, [view]).states[view]
        )
    after = tree(tmp_path / "a")
    assert all(
        after[k] == v for k, v in before.items() if "/c/" in k and ("hidden" in k or "scale" in k or "norm" in k)
    )
    with pytest.raises(StaleError, match="the stored dtype"):
        extract(tmp_path / "a", corpus, loaded(bert), Request("t", [0], ["alone"]))


def check_kills(folder: Path, bert: Path, dtype: str, phases: list[str]) -> None:
    """Kill writers of a store in turn at these phases. The last one has to leave the bytes of an undisturbed run."""
    from stillhouse.data.manifest import write_manifest

    corpus = long_corpus()
    write_manifest(folder / "corpus.jsonl", corpus.utterances)
    extract(folder / "calm", corpus, loaded(bert), Request("t", [0, 2], ["alone", "both:4"], dtype=dtype))
    driver = Path(__file__).parents[1] / "pipeline" / "crash_child.py"
    command = [sys.executable, str(driver), str(folder / "corpus.jsonl"), str(folder / "s"), str(bert)]
    done = subprocess.run(
        [*command, "alone,both:4", *phases], env=ENV | {"STILLHOUSE_TEST_DTYPE": dtype},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["killed"] for entry in log] == [9] * len(phases) + [0]
    assert tree(folder / "s") == tree(folder / "calm")
    assert verify(Store.open(folder / "s")) == []


def test_killed_at_every_phase(tmp_path: Path, bert: Path) -> None:
    """Also before and after the norms are committed: writers that come later agree on one set of them."""
    phases = [
        "before_link:1", "after_link:1", "mid_write:3", "before_rename:1", "mid_rename:1", "before_link:1",
        "after_link:2",
    ]  # fmt: skip
    check_kills(tmp_path, bert, "int8", phases)


def test_values_that_no_float16_holds_and_values_that_are_none(tmp_path: Path, bert: Path) -> None:
    """int8 standardises, so large states fit; an infinity is an error that names view and utterance."""
    teacher = load_teacher(str(bert), device="cpu")
    teacher.model.embeddings.LayerNorm.weight.mul_(1e7)
    extract(tmp_path / "a", make_corpus(), teacher, Request("t", [0], ["alone"], dtype="int8"))
    store = Store.open(tmp_path / "a")
    states = store.gather(store.utterance_ids, store.views).states[store.views[0]]
    assert np.isfinite(states).all() and np.abs(states).max() > 65504
    loss = store.loss(store.views[0])
    assert loss is not None and loss.relative < 0.01
    teacher.model.embeddings.word_embeddings.weight[7:] = np.inf
    with pytest.raises(StoreError, match=r"u\d+: a value of t/alone/0 is not finite"):
        extract(tmp_path / "b", make_corpus(), teacher, Request("t", [0], ["alone"], dtype="int8"))


def test_a_state_that_is_not_finite_outside_of_the_sample(tmp_path: Path, bert: Path, monkeypatch) -> None:
    from stillhouse.extract.pipeline import norms

    monkeypatch.setattr(norms, "sample_rows", lambda lengths: np.array([0]))
    teacher = load_teacher(str(bert), device="cpu")
    seen = teacher.tokeniser.encode(["they went"], "none").ids
    teacher.model.embeddings.word_embeddings.weight[int(seen[-1])] = np.nan
    corpus = make_corpus(["we", "we", "they went", "we"], per_session=1)
    with pytest.raises(StoreError, match=r"u2: a value of t/alone/1 is not finite in int8"):
        extract(tmp_path / "b", corpus, teacher, Request("t", [1], ["alone"], dtype="int8"))


def test_it_needs_neither_torch_nor_numba_to_open(int8_store: Path) -> None:
    code = (
        "import sys; from stillhouse.extract.store import Store\n"
        f"s = Store.open({str(int8_store)!r}); s.views\n"
        "assert not {'torch', 'numba', 'zarr'} & set(sys.modules)\n"
        "s.gather(s.utterance_ids[:3], s.views)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_uncommitted_int8_rows_are_never_returned(int8_store: Path, tmp_path: Path) -> None:
    from stillhouse.data.errors import NoStoreError

    root = shutil.copytree(int8_store, tmp_path / "s")
    Paths(root).commit("bert", "alone", 0, 0).unlink()
    store = Store.open(root)
    assert store.views == VIEWS[3:] and store.norm(VIEWS[0])[0].shape == (16,)
    with pytest.raises(NoStoreError, match="not extracted yet"):
        store.gather(["u1"], VIEWS[:1])

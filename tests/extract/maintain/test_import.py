"""States that other programs saved become views that open, read and train like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from stillhouse.data.errors import StoreError, UsageError
from stillhouse.data.manifest import write_manifest
from stillhouse.distill.targets import TargetReader
from stillhouse.extract.commands.store import store as group
from stillhouse.extract.maintain.import_states import GivenTokens, ImportCache, UnknownTeacher, import_states
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.verify.verify import verify

from ..conftest import TEXTS, loaded, make_corpus

LAYERS = [0, 2]
VIEWS = [View("t", "alone", k) for k in LAYERS]
CORPUS = make_corpus(TEXTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> tuple[Store, dict[str, np.ndarray]]:
    """A store of the teacher itself, and each utterance's states [2, 1 + N + 1, 16] with those of [CLS] and [SEP]."""
    root = tmp_path_factory.mktemp("made") / "s"
    extract(root, CORPUS, loaded(bert), Request("t", LAYERS, ["alone"], dtype="float32"))
    store, dump = Store.open(root), {}
    for u in CORPUS.utterances:
        if u.text:
            states = store.gather([u.id], VIEWS).states
            dump[u.id] = np.stack([np.pad(states[v], ((1, 1), (0, 0)), constant_values=9) for v in VIEWS])
    return store, dump


def npy_a_layer(folder: Path, dump: dict[str, np.ndarray]) -> dict[str, Any]:
    for i, states in dump.items():
        for k, layer in zip(LAYERS, states):
            (folder / str(k)).mkdir(exist_ok=True, parents=True)
            np.save(folder / str(k) / f"utt_{i}.npy", layer)
    return {"source": folder, "file": "{layer}/utt_{id}.npy"}


def npz_of_layers(folder: Path, dump: dict[str, np.ndarray]) -> dict[str, Any]:
    folder.mkdir()
    for i, states in dump.items():
        np.savez(folder / f"{i}.npz", allow_pickle=False, **{f"layer_{k}": s for k, s in zip(LAYERS, states)})
    return {"source": folder, "file": "{id}.npz", "key": "layer_{layer}"}


def safetensors_stacked(folder: Path, dump: dict[str, np.ndarray]) -> dict[str, Any]:
    """Layers on the middle axis."""
    folder.mkdir()
    for i, states in dump.items():
        save_file({"states": np.ascontiguousarray(states.transpose(1, 0, 2))}, folder / f"{i}.safetensors")
    return {"source": folder, "file": "{id}.safetensors", "layer_axis": 1}


def one_hdf5(folder: Path, dump: dict[str, np.ndarray]) -> dict[str, Any]:
    """One dataset for each utterance, under other names."""
    folder.mkdir()
    with h5py.File(folder / "dump.h5", "w") as f:
        for i, states in dump.items():
            f[f"feats/{i}-x"] = states
    names = {i: f"{i}-x" for i in dump}
    return {"source": folder / "dump.h5", "key": "feats/{id}", "layer_axis": 0, "names": names}


@pytest.mark.parametrize("style", [npy_a_layer, npz_of_layers, safetensors_stacked, one_hdf5])
def test_a_cache_becomes_the_store_it_was_made_from(style: Any, made: tuple, bert: Path, tmp_path: Path) -> None:
    store, dump = made
    cache = ImportCache(layers=LAYERS, drop=(1, 1), **style(tmp_path / "dump", dump))
    request = Request("t", LAYERS, ["alone"], dtype="float32")
    summary = import_states(tmp_path / "s", CORPUS, cache, loaded(bert), request)
    assert summary.views == ["t/alone/0", "t/alone/2"]
    ours = Store.open(tmp_path / "s", checksums=True)
    assert verify(ours) == [] and ours.utterance_ids == store.utterance_ids
    got, want = (s.gather(s.utterance_ids, VIEWS) for s in (ours, store))
    for view in VIEWS:
        assert np.array_equal(got.states[view], want.states[view])
        assert np.array_equal(ours.norm(view), store.norm(view))
        assert np.array_equal(ours.input_hash(ours.utterance_ids, view), store.input_hash(ours.utterance_ids, view))
    assert np.array_equal(got.span["t"], want.span["t"]) and np.array_equal(got.token_id["t"], want.token_id["t"])
    assert all(np.array_equal(a, b) for a, b in zip(ours.embedding("t"), store.embedding("t")))
    assert import_states(tmp_path / "s", CORPUS, cache, loaded(bert), request).units_done_now == 0
    extract(tmp_path / "s", CORPUS, loaded(bert), Request("t", [1], ["alone"], dtype="float32"))  # adds a layer
    assert len(Store.open(tmp_path / "s").views) == 3


def test_int8_without_the_model(made: tuple, bert: Path, tmp_path: Path) -> None:
    """Only the tokenizer is known. Targets are read as from any store, and the static control is refused."""
    store, dump = made
    cache = ImportCache(layers=LAYERS, drop=(1, 1), **one_hdf5(tmp_path / "dump", dump))
    teacher = UnknownTeacher(loaded(bert).tokeniser, "gone", 16, 2)
    import_states(tmp_path / "s", CORPUS, cache, teacher, Request("t", LAYERS, ["alone"], dtype="int8"))
    ours = Store.open(tmp_path / "s")
    ids = [u.id for u in CORPUS.utterances if u.text]
    texts = [u.text for u in CORPUS.utterances if u.text]
    got, want = (TargetReader([(s, VIEWS)], position="word").read(ids, texts).targets for s in (ours, store))
    for name in want:
        assert float((got[name] - want[name]).norm() / want[name].norm()) < 0.02
    with pytest.raises(StoreError, match="not finite"):
        TargetReader([(ours, VIEWS)], control="static").read(ids, texts)


def test_tokens_that_are_given(made: tuple, tmp_path: Path) -> None:
    store, _ = made
    with h5py.File(tmp_path / "dump.h5", "w") as f:
        for u in CORPUS.utterances:
            if u.text:
                g = store.gather([u.id], VIEWS[1:])
                f[f"{u.id}/states"], f[f"{u.id}/ids"] = g.states[VIEWS[1]], g.token_id["t"]
                f[f"{u.id}/spans"] = g.span["t"]
    cache = ImportCache(tmp_path / "dump.h5", [2], key="{id}/states")
    tokens = GivenTokens(cache, CORPUS, "{id}/ids", "{id}/spans")
    teacher = UnknownTeacher(tokens, "dump", 16, 2)
    import_states(tmp_path / "s", CORPUS, cache, teacher, Request("t", [2], ["alone"], dtype="float32"))
    ours = Store.open(tmp_path / "s")
    got, want = (s.gather(s.utterance_ids, VIEWS[1:]) for s in (ours, store))
    assert np.array_equal(got.states[VIEWS[1]], want.states[VIEWS[1]]) and np.array_equal(got.span["t"], want.span["t"])


def test_arrays_that_do_not_fit_are_named(made: tuple, bert: Path, tmp_path: Path) -> None:
    _, dump = made
    request = Request("t", LAYERS, ["alone"])
    options = npz_of_layers(tmp_path / "a", dump)

    def run(**other: Any) -> None:
        import_states(tmp_path / "s", CORPUS, ImportCache(**({"layers": LAYERS, "drop": (1, 1)} | options | other)),
                      loaded(bert), request)  # fmt: skip

    n = dump["u0"].shape[1]
    with pytest.raises(StoreError, match=rf"u0: layer 0 has {n} states for {n - 2} tokens.*--drop"):
        run(drop=(0, 0))
    with pytest.raises(StoreError, match=r"u0: .*no array 'x_0'"):
        run(key="x_{layer}")
    with pytest.raises(StoreError, match=r"u0: .*three axes, 2 layers along axis 0"):
        run(key="layer_0", layer_axis=0)
    with pytest.raises(StoreError, match=r"u0: no states of it: .*u0-b.npz does not exist"):
        run(file="{id}-b.npz")
    with pytest.raises(StoreError, match=r"u0: its file would lie outside"):
        run(file="../{id}.npz")
    assert not (tmp_path / "s").exists()
    (tmp_path / "a" / "u7.npz").unlink()
    cache = tmp_path / "a" / "u7.npz"
    np.savez(cache, layer_0=np.array([{}], dtype=object), layer_2=dump["u7"][1])
    with pytest.raises(StoreError, match=r"u7: .*[Oo]bject array|pickle"):
        run()
    np.savez(cache, layer_0=dump["u7"][0], layer_2=dump["u7"][1])
    run()
    assert verify(Store.open(tmp_path / "s")) == []


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name in ("{id}.pt", "{id}.pkl"):
        with pytest.raises(UsageError, match=r"pickled files are not read.*safetensors"):
            ImportCache(tmp_path, [1], name)
    with pytest.raises(UsageError, match="nothing says which is which"):
        ImportCache(tmp_path, [1, 2], "{id}.npy")


def test_the_command(made: tuple, bert: Path, tmp_path: Path) -> None:
    store, dump = made
    npy_a_layer(tmp_path / "dump", dump)
    names = tmp_path / "names.tsv"
    names.write_text("".join(f"{i}\tutt_{i}\n" for i in dump))
    write_manifest(tmp_path / "corpus.jsonl", CORPUS.utterances)
    asked = ["import", tmp_path / "corpus.jsonl", tmp_path / "s", "--from", tmp_path / "dump", "--layers", "0,-1"]
    asked += ["--file", "{layer}/{id}.npy", "--map", names, "--drop", "1,1", "--name", "t", "--json"]

    def run(*more: object) -> Any:
        return CliRunner().invoke(group, [str(a) for a in (*asked, *more)], catch_exceptions=False)

    done = run("--teacher", bert, "--dtype", "int8")
    assert json.loads(done.stdout)["views"] == ["t/alone/0", "t/alone/2"]
    got, want = (s.gather(["u5"], VIEWS, "float32").states[VIEWS[1]] for s in (Store.open(tmp_path / "s"), store))
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)
    with pytest.raises(UsageError, match="source of the tokens"):
        run()

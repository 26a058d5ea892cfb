"""Files that inspect writes: exports that other libraries read, and pictures that open."""

from __future__ import annotations

import csv
import json
import struct

import numpy as np
import pytest

from stillhouse.data.errors import NoStoreError, UsageError
from stillhouse.extract.inspect.facts import export as exporting
from stillhouse.extract.inspect.numbers import word_map as occurrences
from stillhouse.extract.store import Store, View

VIEWS = [View("known", "alone", 2), View("known", "both:8", 4)]


@pytest.fixture(scope="module")
def int8_store(known, tmp_path_factory):
    return known.build(tmp_path_factory.mktemp("int8"), dtype="int8")


def test_npz_holds_what_gather_gives(store, tmp_path):
    path = tmp_path / "states.npz"
    found = exporting.export(store, VIEWS, path)
    ids = [i for i in store.utterance_ids if i != "s01-0004"]  # it has no tokens
    assert (found.utterances, found.left_out, found.tokens) == (5, 1, {"known": 26})
    expected = store.gather(ids, VIEWS)
    with np.load(path, allow_pickle=False) as written:
        assert written["utterance"].tolist() == ids
        for view in VIEWS:
            np.testing.assert_array_equal(written[view.address], expected.states[view])
        np.testing.assert_array_equal(written["known/length"], expected.lengths["known"])
        np.testing.assert_array_equal(written["known/span"], expected.span["known"])
        assert written["known/piece"].tolist()[:3] == [
            store.pieces("known")[np.searchsorted(store.embedding("known")[0], t)]
            for t in expected.token_id["known"][:3]
        ]
    assert [p.name for p in tmp_path.iterdir()] == ["states.npz"]


def test_safetensors(store, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "states.safetensors"
    exporting.export(store, VIEWS, path, rows=store.rows(["s00-0001"]), float32=True)
    expected = store.gather(["s00-0001"], VIEWS)
    with safe_open(path, "np") as written:
        assert json.loads(written.metadata()["utterance"]) == ["s00-0001"]
        assert json.loads(written.metadata()["known/piece"]) == ["he", "sat", "on", "the", "bank"]
        states = written.get_tensor("known/both:8/4")
        assert states.dtype == np.float32
        np.testing.assert_array_equal(states, expected.states[VIEWS[1]].astype(np.float32))


def test_hdf5(store, tmp_path):
    import h5py

    path = tmp_path / "states.h5"
    exporting.export(store, VIEWS, path)
    ids = [i for i in store.utterance_ids if i != "s01-0004"]
    with h5py.File(path) as written:
        assert written["utterance"].asstr()[:].tolist() == ids
        u = ids.index("s00-0001")
        at, n = written["known/offset"][u], written["known/length"][u]
        expected = store.gather(["s00-0001"], VIEWS)
        for view in VIEWS:
            np.testing.assert_array_equal(written[view.address][at : at + n], expected.states[view])
        assert written["known/piece"].asstr()[at : at + n].tolist() == ["he", "sat", "on", "the", "bank"]
        np.testing.assert_array_equal(written["known/span"][at : at + n], expected.span["known"])


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".safetensors"])
def test_int8_is_exported_as_floats(int8_store, tmp_path, suffix):
    """int8 states are exported as float16, or as float32 with the option. info and stats show the error of int8."""
    view = int8_store.views[-1]
    expected = int8_store.gather(int8_store.utterance_ids, [view]).states[view]
    assert expected.dtype == np.float32
    for float32, dtype in ((False, np.float16), (True, np.float32)):
        path = tmp_path / f"{dtype.__name__}{suffix}"
        exporting.export(int8_store, [view], path, float32=float32)
        got = load(path, view.address)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected.astype(dtype))


def load(path, name):
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as f:
            return f[name][:]
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)[name]
    return np.load(path, allow_pickle=False)[name]


def test_the_error_of_int8_is_shown(int8_store, store, stillhouse):
    facts = json.loads(stillhouse("inspect", "info", int8_store.path, "--json").out)
    stats = json.loads(stillhouse("inspect", "stats", int8_store.path, "--json").out)
    errors = [v["int8_error"] for v in stats["views"]]
    assert all(0 < e < 0.01 for e in errors) and facts["teachers"][0]["int8_error"] == max(errors)
    assert f"(error {max(errors):.2%} at most)" in stillhouse("inspect", "info", int8_store.path).out
    assert "int8 error: " in stillhouse("inspect", "stats", int8_store.path).out
    plain = json.loads(stillhouse("inspect", "stats", store.path, "--json").out)
    assert {v["int8_error"] for v in plain["views"]} == {None}


def test_csv_is_a_line_a_token_and_view(store, tmp_path, stillhouse):
    path = tmp_path / "states.csv"
    done = stillhouse("inspect", "export", store.path, path, "s01-*", "--view", "known/*/4", "--json")
    assert done.code == 0 and json.loads(done.out)["tokens"] == {"known": 12}
    with open(path, encoding="utf-8", newline="") as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == 24
    line = next(x for x in lines if x["utterance"] == "s01-0005" and x["piece"] == "😀" and "both" in x["view"])
    assert (line["token"], line["begin"], line["end"]) == ("5", "21", "22")
    state = store.gather(["s01-0005"], [VIEWS[1]]).states[VIEWS[1]][5]
    np.testing.assert_allclose([float(line[f"d{i}"]) for i in range(12)], state, rtol=1e-5)


def test_an_existing_file_stays_without_force(store, tmp_path, stillhouse):
    path = tmp_path / "a.npz"
    path.write_text("mine")
    refused = stillhouse("inspect", "export", store.path, path)
    assert refused.code == 2 and "exists already" in refused.err and path.read_text() == "mine"
    assert stillhouse("inspect", "export", store.path, path, "--force").code == 0
    assert stillhouse("inspect", "export", store.path, tmp_path / "a.pkl").code == 2
    drawn = stillhouse("inspect", "plot", store.path, path)
    assert drawn.code == 2 and "cannot write .npz" in drawn.err


def test_too_much_for_one_file_is_refused_before_it_is_read(store, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "MOST_BYTES", 26 * 12 * 4 * 2 - 1)
    monkeypatch.setattr(Store, "gather", lambda *_: pytest.fail("read"))
    with pytest.raises(UsageError, match="name fewer views or utterances"):
        exporting.export(store, VIEWS, tmp_path / "a.npz")


def test_a_partial_view_is_exported_as_far_as_it_goes(partial, tmp_path, stillhouse):
    done = stillhouse("inspect", "export", partial.path, tmp_path / "a.npz", "--view", "known/both:8/0", "--json")
    found = json.loads(done.out)
    held = int(partial.available(partial.planned_views[-1]).sum())
    assert 0 < held < 450 and (found["utterances"], found["left_out"]) == (held, 450 - held)


def test_occurrences_of_a_word(store):
    places = occurrences.occurrences(store, "known", "BANK", np.arange(6))
    assert [(store.index.id(r), t) for r, t in places] == sorted(
        [("s00-0000", 2), ("s00-0001", 4), ("s01-0003", 1), ("s01-0005", 3)],
        key=lambda p: store.rows([p[0]])[0],
    )


def test_a_word_map_is_the_plane_of_its_states(store):
    views = [View("known", "alone", 4), View("known", "both:8", 4)]
    found = occurrences.word_map(store, views, "bank")
    assert (found.found, found.shown, len(found.points)) == (4, 4, 8)
    states = np.concatenate(
        [store.gather([p.utterance], [v]).states[v][p.token][None] for v in views for p in found.points[:4]]
    ).astype(np.float64)
    states -= states.mean(0)
    plane = np.array([[p.x, p.y] for p in found.points])
    full = ((states[:, None] - states[None]) ** 2).sum(-1)
    drawn = ((plane[:, None] - plane[None]) ** 2).sum(-1)
    assert (drawn <= full + 1e-2).all()
    assert drawn.sum() / full.sum() == pytest.approx(sum(found.explained), abs=1e-3)
    assert all(p.sentence[p.begin : p.end] == "bank" for p in found.points)
    with pytest.raises(NoStoreError, match="'wharf' occurs 0 times"):
        occurrences.word_map(store, views, "wharf")
    few = occurrences.word_map(store, views, "bank", most=2)
    assert (few.found, few.shown, len(few.points)) == (4, 2, 4)


@pytest.mark.parametrize("kind", [["similarity"], ["norms"], ["word", "--word", "bank"]])
def test_pictures(store, tmp_path, stillhouse, kind):
    for suffix in ("png", "svg"):
        path = tmp_path / f"{kind[0]}.{suffix}"
        done = stillhouse("inspect", "plot", store.path, path, "--kind", *kind)
        assert done.code == 0 and done.out.strip() == str(path)
        data = path.read_bytes()
        if suffix == "png":
            assert data[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", data[16:24])
            assert width > 500 and height > 300
        else:
            assert b"known/both:8" in data or b"<text" not in data
            assert data.startswith(b"<?xml")
    assert stillhouse("inspect", "plot", store.path, tmp_path / "a.png", "--kind", "word").code == 2

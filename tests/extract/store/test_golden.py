"""A store of version 1, made once and never again: every later version must read it as it was meant.

Its states can be worked out by hand: for token i of layer k in a window, [i, i · k, sum of the window's ids / 8,
position / 4]; windows begin with 0 and end with 1; utterance n's tokens count up from 10 + 3n.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from stillhouse.extract.store import Store, View
from stillhouse.extract.store.verify.verify import verify

LENGTHS = [3, 0, 5, 2, 70, 4]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden") / "store"
    zipfile.ZipFile(Path(__file__).parent / "golden" / "store-v1.zip").extractall(root)
    return root


def test_what_it_holds(golden: Path) -> None:
    store = Store.open(golden, checksums=True)
    assert [v.address for v in store.views] == ["made/alone/0", "made/alone/2", "made/both:4/0", "made/both:4/2"]
    assert sorted(store.utterance_ids) == [f"séance-{n}" for n in range(6)]
    assert verify(store) == []
    names = [f"séance-{n}" for n in range(6)]
    g = store.gather(names, store.views)
    assert g.lengths["made"].tolist() == LENGTHS
    assert g.token_id["made"].tolist() == [10 + 3 * n + j for n, m in enumerate(LENGTHS) for j in range(m)]
    assert store.gather(["séance-3"], store.views).span["made"].tolist() == [[0, 1], [2, 3]]


def test_its_states_by_hand(golden: Path) -> None:
    store = Store.open(golden)
    # séance-3 is the tokens 19 and 20; with its session after it, séance-4 (22 … 91) and séance-5 (25 … 28)
    ids = np.array([0, 19, 20, *range(22, 92), *range(25, 29), 1])
    for context, window in (("alone", np.array([0, 19, 20, 1])), ("both:4", ids)):
        for layer in (0, 2):
            view = View("made", context, layer)
            want = [[i, i * layer, window.sum() / 8, (k + 1) / 4] for k, i in enumerate((19, 20))]
            assert np.array_equal(store.gather(["séance-3"], [view]).states[view], np.array(want, np.float16))
    left, right = store.context_seen(["séance-3", "séance-5"], View("made", "both:4", 0))
    assert (left.tolist(), right.tolist()) == ([0, 72], [74, 0])


def test_its_hashes(golden: Path) -> None:
    """The hashes that other stores and trainers compare with must not drift."""
    store = Store.open(golden)
    digest = hashlib.blake2b(b"text\x0019 20", digest_size=8).digest()
    assert int(store.text_hash(["séance-3"])[0]) == int.from_bytes(digest, "little") == 0x6D9D716B264ED211
    view = View("made", "alone", 0)
    assert [hex(int(h)) for h in store.input_hash(["séance-3", "séance-0"], view)] == [
        "0xe5db900499f7801",
        "0x89c4527e6d7cde15",
    ]


def test_zarr_reads_it(golden: Path) -> None:
    array = zarr.open_array(golden / "data.zarr" / "made" / "hidden", mode="r")
    assert array.shape == (2, 2, 2048, 4) and array.dtype == np.float16
    store = Store.open(golden)
    view = View("made", "both:4", 2)
    everything = store.gather(store.utterance_ids, [view]).states[view]
    assert np.array_equal(array[1, 1, : sum(LENGTHS)], everything) and np.isnan(array[1, 1, sum(LENGTHS) :]).all()

"""Generations: more layers, more contexts and another teacher in a store that exists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from stillhouse.data.errors import StaleError
from stillhouse.extract.pipeline.estimate import size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from ..conftest import TEXTS, loaded, make_corpus
from .test_crash import tree


def everything(store: Store) -> dict[str, np.ndarray]:
    g = store.gather(store.utterance_ids, store.views)
    return {v.address: s for v, s in g.states.items()}


def test_more_layers_and_contexts(bert: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), Request("t", [2], ["alone"]))
    first, before = everything(Store.open(root)), tree(root)
    size = size_up(root, corpus, loaded(bert), Request("t", [0, 2], ["both:4", "alone"]), measure=False)
    assert sorted(size.bytes_per_view) == ["t/alone/0", "t/both:4/0", "t/both:4/2"]
    assert tree(root) == before
    done = extract(root, corpus, loaded(bert), Request("t", [0, 2], ["both:4", "alone"]))
    assert done.views == ["t/alone/0", "t/alone/2", "t/both:4/0", "t/both:4/2"]
    extract(root, corpus, loaded(bert), Request("t", [1], ["past:6"]))
    store = Store.open(root, checksums=True)
    assert [v.address for v in store.views] == [*done.views, "t/past:6/1"]
    assert status(root).complete and verify(store) == []
    after = tree(root)
    assert all(after[k] == v for k, v in before.items() if not k.endswith("zarr.json"))  # nothing was rewritten
    extract(tmp_path / "one", corpus, loaded(bert), Request("t", [0, 1, 2], ["alone", "both:4", "past:6"]))
    at_once = everything(Store.open(tmp_path / "one"))
    grown = everything(store)
    assert np.array_equal(grown["t/alone/2"], first["t/alone/2"])
    for address, states in grown.items():
        assert np.array_equal(states, at_once[address]), address
    for view in store.views:
        assert np.array_equal(store.norm(view), Store.open(tmp_path / "one").norm(view))
    array = zarr.open_array(root / "data.zarr" / "t" / "hidden", mode="r")
    assert array.shape[:2] == (3, 3)
    assert np.isnan(array[2, 0]).all()  # past:6 of layer 2 was never asked for: no files, NaN


def test_another_teacher(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "s", make_corpus()
    extract(root, corpus, loaded(bert), Request("bert", [2], ["alone"]))
    extract(root, corpus, loaded(gpt2), Request("gpt2", [1, 3], ["alone", "past:8"], dtype="bfloat16"))
    store = Store.open(root)
    assert [v.address for v in store.views] == [
        "bert/alone/2", "gpt2/alone/1", "gpt2/alone/3", "gpt2/past:8/1", "gpt2/past:8/3",
    ]  # fmt: skip
    assert verify(store) == [] and status(root).complete
    extract(tmp_path / "own", corpus, loaded(gpt2), Request("gpt2", [1, 3], ["alone", "past:8"], dtype="bfloat16"))
    alone = everything(Store.open(tmp_path / "own"))
    both = everything(store)
    assert Store.open(tmp_path / "own").utterance_ids == store.utterance_ids
    assert all(np.array_equal(both[address], states) for address, states in alone.items())
    g = store.gather(["u1", "u5"], store.views)
    assert set(g.lengths) == {"bert", "gpt2"} and (g.lengths["bert"] != g.lengths["gpt2"]).any()


def test_a_store_cannot_grow_by_other_settings_or_texts(bert: Path, tmp_path: Path) -> None:
    extract(tmp_path / "s", make_corpus(TEXTS), loaded(bert), Request("t", [2], ["alone"]))
    with pytest.raises(StaleError, match="the text transform"):
        extract(tmp_path / "s", make_corpus(TEXTS), loaded(bert), Request("t", [1], ["alone"], transform="upper"))
    with pytest.raises(StaleError, match="1 utterances of the store are not in the corpus: u9; "):
        extract(tmp_path / "s", make_corpus(TEXTS[:-1]), loaded(bert), Request("t", [1], ["alone"]))

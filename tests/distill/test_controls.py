"""Controls: who gives to whom, and that all but the targets stays."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.errors import ConfigError
from stillhouse.distill import TargetReader
from stillhouse.distill.controls import donors

TEXTS = [" ".join(f"w{(i * 5 + j * 3) % 40}" for j in range(2 + i % 4)) for i in range(24)] + [
    "w1 w2 w3 w4 w5 w6 w7 w8",
    "",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = Path(__file__).parent.parent / "inspect" / "conftest.py"
    spec = importlib.util.spec_from_file_location("stores", path)
    stores = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stores)
    return stores.build(tmp_path_factory.mktemp("controls"), TEXTS)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 5))
def test_donors(lengths, seed):
    lengths = np.array(lengths, np.int32)
    found = donors(lengths, seed)
    for u, (n, donor) in enumerate(zip(lengths, found)):
        same = (lengths == n).sum()
        if n == 0:
            assert donor == u
        elif same > 1:
            assert donor != u and lengths[donor] == n
        elif (lengths > n).any():
            assert lengths[donor] == lengths[lengths > n].min()
        else:
            assert donor == -1
    assert np.array_equal(found, donors(lengths, seed))
    # in a ring nobody gives twice
    rings = [d for u, d in enumerate(found) if lengths[u] and (lengths == lengths[u]).sum() > 1]
    assert len(set(rings)) == len(rings)


def test_another_seed_is_another_shuffle():
    lengths = np.full(50, 3)
    assert not np.array_equal(donors(lengths, 1), donors(lengths, 2))


@pytest.mark.parametrize("position", ["token", "word"])
def test_shuffled_keeps_everything_but_the_targets(store, position):
    views = store.resolve("known/both:8/2,4")
    ids = [i for i in store.utterance_ids if i != "s08-0024"]
    texts = [TEXTS[int(i.split("-")[1])] for i in ids]
    plain = TargetReader([(store, views)], position=position).read(ids, texts)
    reader = TargetReader([(store, views)], position=position, control="shuffled", seed=3)
    found = reader.read(ids, texts)
    for name, value in vars(plain.positions["known"]).items():
        other = getattr(found.positions["known"], name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    lengths = store.lengths("known")
    giver = donors(lengths, 3)
    at = 0
    for i in ids:
        row = int(store.rows([i])[0])
        n = int(lengths[row])
        donor = store.gather([store.index.id(int(giver[row]))], views)
        for view in views:
            mean, std = store.norm(view)
            expected = (donor.states[view][:n].astype(np.float32) - mean) / std
            np.testing.assert_allclose(found.targets[view.address][at : at + n], expected, rtol=1e-5, atol=1e-5)
        at += n
    assert not torch.equal(found.targets[views[0].address], plain.targets[views[0].address])
    # what one utterance gets does not depend on its batch
    alone = reader.read(ids[4:5], texts[4:5])
    begin = int(lengths[store.rows(ids[:4])].sum())
    for address, target in alone.targets.items():
        assert torch.equal(target, found.targets[address][begin : begin + len(target)])


def test_the_longest_utterance_is_left_out_of_a_shuffle(store):
    batch = TargetReader([(store, store.views)], control="shuffled").read(["s08-0024"], [TEXTS[24]])
    assert batch.skipped == 1 and batch.positions["known"].kept == 0


def test_static_targets_are_the_input_embeddings(store):
    reader = TargetReader([(store, store.views)], control="static")
    assert [v.address for v in reader.views] == ["known/static"]
    batch = reader.read(["s00-0000", "s08-0025"], [TEXTS[0], ""])
    table = reader.embeddings["known"].float()
    standard = (table - table.mean(0)) / table.std(0, correction=0).clamp_min(1e-3)
    torch.testing.assert_close(batch.targets["known/static"], standard[batch.positions["known"].query_row])
    words = TargetReader([(store, store.views)], "word", control="static").read(["s00-0000"], [TEXTS[0]])
    torch.testing.assert_close(words.targets["known/static"], batch.targets["known/static"])


def test_unknown_control(store):
    with pytest.raises(ConfigError, match="no control 'random'"):
        TargetReader([(store, store.views)], control="random")

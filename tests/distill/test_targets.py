"""What the reader hands to the loss, against the store's own numbers laid out by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from stillhouse.data.errors import ConfigError, NoStoreError, StaleError, StoreError
from stillhouse.distill import TargetReader

IDS = ["b", "d", "a", "c"]


@pytest.fixture
def texts(store):
    return [store.texts[i] for i in IDS]


@pytest.fixture
def units(store, fakes):
    return [fakes.characters(store.texts[i]) for i in IDS]


def standard(store, view, i):
    mean, std = store.norm(view)
    return (store.states[view, i].astype(np.float32) - mean) / std


def test_token_positions_are_the_teachers_own_tokens_standardised(store, texts, units):
    reader = TargetReader([(store, store.views)])
    batch = reader.read(IDS, texts, units)
    assert [v.address for v in reader.views] == [
        "pieces/alone/3", "pieces/alone/6", "words/alone/2", "words/both:8/2",
    ]  # fmt: skip
    for view in store.views:
        expected = np.concatenate([standard(store, view, i) for i in IDS])
        np.testing.assert_allclose(batch.targets[view.address].numpy(), expected, rtol=1e-6)
        assert batch.targets[view.address].dtype == torch.float32
    p = batch.positions["pieces"]
    assert p.lengths.tolist() == [3, 0, 4, 1] and p.grid == 4 and p.masked == 0
    assert p.row.tolist() == [0, 1, 2, 8, 9, 10, 11, 12]
    assert p.key.tolist() == [5, 2, 3, 1, 2, 3, 4, 9]
    vocabulary, table = store.embedding("pieces")
    assert vocabulary[p.query_row.numpy()].tolist() == p.key.tolist()
    np.testing.assert_array_equal(reader.embeddings["pieces"].numpy(), table)
    assert p.place.tolist() == pytest.approx([0.1, 0.6, 0.9, 1.5 / 11, 5 / 11, 6.5 / 11, 9.5 / 11, 0.5])
    # "a cat": units a, c, a, t; the pieces "a", "ca", "t"
    np.testing.assert_allclose(p.unit_weight[0, :, :4], [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert p.unit_weight[1].sum() == 0
    # "..." is units too; all tokens but none is left out
    assert p.unit_rows.tolist() == list(range(8))
    assert batch.utterances == 4 and batch.skipped == 0


def test_word_positions_pool_tokens_and_mask_what_no_token_overlaps(store, texts, units):
    store.teachers["pieces"].tokens["b"] = [(5, 0, 1)]  # "cat" is lost
    for view in store.views[:2]:
        store.states[view, "b"] = store.states[view, "b"][:1]
    batch = TargetReader([(store, store.views)], position="word").read(IDS, texts, units)
    p = batch.positions["pieces"]
    assert p.lengths.tolist() == [2, 0, 3, 0] and p.grid == 3 and p.masked == 1
    assert p.row.tolist() == [0, 6, 7, 8]  # "a" | the, cat, sat
    view = store.views[0]
    a, b = standard(store, view, "a"), standard(store, view, "b")
    expected = [b[0], a[0], (2 * a[1] + a[2]) / 3, a[3]]
    np.testing.assert_allclose(batch.targets[view.address].numpy(), expected, rtol=1e-5)
    assert p.query_start.tolist() == [0, 1, 2, 4]
    np.testing.assert_allclose(p.query_weight, [1, 1, 2 / 3, 1 / 3, 1], rtol=1e-6)
    # "cat" of both utterances is the same word for the other teacher, which still has it
    q = batch.positions["words"]
    assert q.masked == 0 and len(set(q.key.tolist())) == 4 and q.key[1] == q.key[3]


def test_unit_positions(store, texts, units):
    batch = TargetReader([(store, store.views)], position="unit").read(IDS, texts, units)
    p = batch.positions["pieces"]
    assert p.lengths.tolist() == [4, 0, 9, 3] and p.masked == 0
    view = store.views[1]
    b, c = standard(store, view, "b"), standard(store, view, "c")
    found = batch.targets[view.address].numpy()
    np.testing.assert_allclose(found[:4], b[[0, 1, 1, 2]], rtol=1e-6)
    np.testing.assert_allclose(found[-3:], c[[0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(p.unit_weight[0, :4, :4], np.eye(4))


def test_an_utterance_gets_in_a_batch_what_it_gets_alone(store, texts, units):
    for position in ("token", "word", "unit"):
        reader = TargetReader([(store, store.views)], position=position)
        whole = reader.read(IDS, texts, units)
        alone = [reader.read([i], [t], [u]) for i, t, u in zip(IDS, texts, units)]
        for address, found in whole.targets.items():
            assert torch.equal(found, torch.cat([x.targets[address] for x in alone]))


def test_changed_transcripts_are_refused_by_name(store, texts, units):
    reader = TargetReader([(store, store.views)])
    texts[0] = "a bat"
    with pytest.raises(StaleError, match=r"changed transcripts of b; .*--refresh") as e:
        reader.read(IDS, texts, units)
    assert e.value.exit_code == 12
    skipping = TargetReader([(store, store.views)], on_missing="skip").read(IDS, texts, units)
    assert skipping.skipped == 1 and skipping.positions["words"].lengths.tolist() == [0, 0, 3, 1]


def test_missing_utterances_are_named_or_counted(store, texts, units):
    del store.teachers["words"].tokens["a"]
    with pytest.raises(NoStoreError, match="words: no states of a; extract"):
        TargetReader([(store, store.views)]).read(IDS, texts, units)
    batch = TargetReader([(store, store.views)], on_missing="skip").read(IDS, texts, units)
    assert batch.skipped == 1
    # the other teacher keeps it
    assert batch.positions["pieces"].lengths.tolist() == [3, 0, 4, 1]
    assert batch.positions["words"].lengths.tolist() == [2, 0, 0, 1]
    ids = [f"n{i}" for i in range(7)]
    with pytest.raises(NoStoreError, match="no states of n0, n1, n2, n3, n4 and 2 more"):
        TargetReader([(store, store.views)]).read(ids, [""] * 7)


def test_a_batch_that_no_store_holds_is_empty_and_whole(store):
    batch = TargetReader([(store, store.views)], on_missing="skip").read(["x"], ["text"], [np.array([[0, 1]])])
    assert batch.skipped == 1 and batch.positions["words"].grid == 1
    assert batch.targets["words/alone/2"].shape == (0, 4)
    assert batch.positions["words"].unit_weight.shape == (1, 1, 1)


def test_states_that_are_not_finite_name_utterance_and_view(store, texts, units):
    store.states[store.views[1], "c"][0, 2] = np.nan
    with pytest.raises(StoreError, match=r"pieces/alone/6: states that are not finite for c;"):
        TargetReader([(store, store.views)]).read(IDS, texts, units)


@pytest.mark.parametrize("position", ["token", "word", "unit"])
def test_damaged_utterances_are_skipped_and_counted(store, texts, units, position, monkeypatch):
    store.states[store.views[1], "b"][0, 2] = np.nan
    gather = type(store).gather

    def torn(self, ids, views):
        if "a" in ids and any(v.teacher == "words" for v in views):
            raise StoreError("stored bytes are damaged", where="words/alone/2 a")
        return gather(self, ids, views)

    monkeypatch.setattr(type(store), "gather", torn)
    with pytest.raises(StoreError):
        TargetReader([(store, store.views)], position).read(IDS, texts, units)
    batch = TargetReader([(store, store.views)], position, on_missing="skip").read(IDS, texts, units)
    assert batch.skipped == 2
    pieces, words = batch.positions["pieces"].lengths.tolist(), batch.positions["words"].lengths.tolist()
    assert pieces[0] == 0 < pieces[2] and words[2] == 0 < words[0]
    assert all(target.isfinite().all() for target in batch.targets.values())


def test_bfloat16_is_read_by_its_bits(store, texts, units):
    expected = TargetReader([(store, store.views)]).read(IDS, texts, units)
    store.teachers["words"].dtype = "bfloat16"
    for (view, i), states in store.states.items():
        if view.teacher == "words":
            bits = torch.from_numpy(states).bfloat16().view(torch.uint16)
            store.states[view, i] = bits.numpy()
    found = TargetReader([(store, store.views)]).read(IDS, texts, units)
    for address in found.targets:
        torch.testing.assert_close(found.targets[address], expected.targets[address], rtol=0.02, atol=0.1)


def test_two_stores_with_a_teacher_of_the_same_name(store, texts, units, fakes):
    other = fakes.small_store(seed=5)
    reader = TargetReader([(store, store.views[:1]), (other, other.views[:1])])
    assert [v.address for v in reader.views] == ["pieces/alone/3", "pieces@2/alone/3"]
    batch = reader.read(IDS, texts, units)
    np.testing.assert_allclose(
        batch.targets["pieces@2/alone/3"][:3].numpy(), standard(other, other.views[0], "b"), rtol=1e-6
    )


def test_sample_reads_only_what_it_draws_and_depends_on_the_step_alone(store, texts, units):
    reader = TargetReader([(store, store.views)], sample=1, seed=3)
    drawn = [tuple(reader.read(IDS, texts, units, step=s).targets) for s in range(40)]
    assert all(len(d) == 1 for d in drawn) and len(set(drawn)) == 4
    assert drawn[7] == tuple(pickle.loads(pickle.dumps(reader)).read(IDS, texts, units, step=7).targets)
    with pytest.raises(ConfigError, match="cannot sample 9 of 4"):
        TargetReader([(store, store.views)], sample=9)


def test_settings_that_cannot_be_meant(store, texts):
    with pytest.raises(ConfigError, match="no position 'syllable'"):
        TargetReader([(store, store.views)], position="syllable")
    with pytest.raises(ConfigError, match="on_missing"):
        TargetReader([(store, store.views)], on_missing="ignore")
    with pytest.raises(ConfigError, match="no views"):
        TargetReader([(store, [])])
    with pytest.raises(ConfigError, match="needs the spans"):
        TargetReader([(store, store.views)], position="unit").read(IDS, texts)


def test_moving_a_batch_keeps_it(store, texts, units):
    batch = TargetReader([(store, store.views)], position="word").read(IDS, texts, units)
    moved = batch.to("meta")
    assert moved.targets["words/alone/2"].is_meta and moved.positions["words"].unit_weight.is_meta
    assert moved.positions["pieces"].grid == batch.positions["pieces"].grid

"""Stores for other libraries: ids, Lhotse cuts, xarray, torch datasets, and whole batches."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from stillhouse.data.errors import NoStoreError, UsageError
from stillhouse.extract.adapters import attach, cut_ids, original, store_ids
from stillhouse.extract.store import Store
from stillhouse.extract.store.batches import batches


@pytest.mark.parametrize(
    ("copy", "utterance"),
    [
        ("84-121123-0001", "84-121123-0001"),
        ("84-121123-0001_sp0.9", "84-121123-0001"),
        ("84-121123-0001-sp1.1", "84-121123-0001"),
        ("sp0.9-84-121123-0001", "84-121123-0001"),
        ("utt_sp0.9_vp1.25_rvb", "utt"),
        ("utt_tp1.1_ln-23.0", "utt"),
        ("sp1.1-utt_vp2", "utt"),
        ("asp0.9", "asp0.9"),
        ("sp0.9", "sp0.9"),
        ("_sp0.9", "_sp0.9"),
        ("utt_spoken", "utt_spoken"),
        ("utt_sp0.9b", "utt_sp0.9b"),
    ],
)
def test_affixes_of_augmentation(copy, utterance):
    assert original(copy) == utterance


def test_ids_of_a_batch(store):
    assert store_ids(store, ["s00-0001_sp0.9", "s01-0003", "sp1.1-s00-0000"]) == ["s00-0001", "s01-0003", "s00-0000"]
    assert store_ids(store, []) == []
    with pytest.raises(NoStoreError, match=r"gone_sp0\.9"):
        store_ids(store, ["s00-0001", "gone_sp0.9"])
    assert store_ids(store, ["s00-0001_sp0.9", "gone_sp0.9"], on_missing="keep") == ["s00-0001", "gone_sp0.9"]
    with pytest.raises(UsageError):
        store_ids(store, [], on_missing="ignore")


def test_an_utterance_that_is_called_like_a_copy_is_itself(known, tmp_path):
    from stillhouse.data.manifest import Corpus, Utterance, write_manifest
    from stillhouse.extract.pipeline.extract import extract
    from stillhouse.extract.pipeline.request import Request

    utterances = [Utterance(id=i, text="A BANK", session="s") for i in ("a", "a_sp0.9", "b")]
    write_manifest(tmp_path / "c.jsonl", utterances)
    request = Request("known", (0,), ("alone",))
    extract(tmp_path / "s.zarr", Corpus(tmp_path / "c.jsonl", utterances), known.Teacher(), request)
    opened = Store.open(tmp_path / "s.zarr")
    assert store_ids(opened, ["a_sp0.9", "b_sp0.9", "a_sp1.1"]) == ["a_sp0.9", "b", "a"]


@pytest.fixture(scope="module")
def cuts(known):
    """A cut of one supervision, and one of two."""
    pytest.importorskip("lhotse", reason="no lhotse: pip install 'stillhouse[lhotse]'")
    from lhotse import CutSet, MonoCut, SupervisionSegment
    from lhotse.testing.dummies import dummy_recording

    def supervision(utterance: str, start: float) -> SupervisionSegment:
        text = known.TEXTS[int(utterance[-4:])]
        return SupervisionSegment(utterance, "dummy", start, 1.0, text=text, custom={"loud": True})

    def cut(name: str, *utterances: str) -> MonoCut:
        supervised = [supervision(u, float(k)) for k, u in enumerate(utterances)]
        return MonoCut(name, 0.0, float(len(utterances)), 0, supervised, recording=dummy_recording(0, duration=5.0))

    return CutSet.from_cuts([cut("one", "s00-0001"), cut("two", "s00-0002", "s01-0003")])


def test_cuts_are_looked_up_by_supervision(store, cuts, known):
    ids, texts = cut_ids(store, cuts)
    assert ids == ["s00-0001", "s00-0002", "s01-0003"] and texts == known.TEXTS[1:4]
    store.check_texts(ids, texts)
    # As K2SpeechRecognitionDataset lists them, and as it would list the same cut twice
    one, two = cuts
    assert cut_ids(store, [one, two, two])[0] == ids
    assert cut_ids(store, [one, one, two, two])[0] == ["s00-0001", *ids]


@pytest.mark.parametrize("attached", [False, True])
def test_copies_lead_to_what_they_were_made_of(store, cuts, attached):
    own = attach(cuts, store) if attached else cuts
    expected = ["s00-0001", "s00-0002", "s01-0003"]
    for copies in (own.perturb_speed(0.9), own.perturb_tempo(1.1), own.perturb_volume(2.0).perturb_speed(1.1)):
        renamed = [s.id for cut in copies for s in cut.supervisions]
        assert renamed[0] != "s00-0001"
        assert cut_ids(store, copies)[0] == expected
    padded = own.pad(duration=5.0)
    assert cut_ids(store, padded)[0] == expected


def test_the_field_outlives_a_new_name(store, cuts):
    attached = attach(cuts, store, field="teacher").map_supervisions(renamed)
    with pytest.raises(NoStoreError):
        cut_ids(store, attached)
    assert cut_ids(store, attached, field="teacher")[0] == ["s00-0001", "s00-0002", "s01-0003"]
    first = next(iter(attached)).supervisions[0]
    assert first.custom == {"loud": True, "teacher": "s00-0001"}
    assert next(iter(cuts)).supervisions[0].custom == {"loud": True}, "the cuts given are as they were"


def test_a_field_of_the_cut_serves_a_supervision_that_is_alone(store, cuts):
    """NeMo's Lhotse loader uses paths as ids, and puts other keys of a line into the cut."""
    from dataclasses import replace

    one, two = cuts.map_supervisions(renamed)
    one = replace(one, custom={"stillhouse_id": "s00-0001"})
    assert cut_ids(store, [one])[0] == ["s00-0001"]
    assert cut_ids(store, [one.perturb_speed(0.9)])[0] == ["s00-0001"]
    assert cut_ids(store, [one.pad(duration=5.0)])[0] == ["s00-0001"]
    with pytest.raises(NoStoreError):  # whose it would be, of two, nobody knows
        cut_ids(store, [replace(two, custom={"stillhouse_id": "s00-0001"})])


def renamed(supervision):
    from dataclasses import replace

    return replace(supervision, id=f"x{supervision.id}")


def test_attaching_is_lazy_and_pickles(store, cuts, tmp_path):
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    from lhotse import CutSet

    lazy = attach(CutSet.from_jsonl_lazy(tmp_path / "cuts.jsonl.gz"), store)
    again = pickle.loads(pickle.dumps(lazy))
    assert cut_ids(store, again)[0] == ["s00-0001", "s00-0002", "s01-0003"]


def test_a_transfer_from_cuts(store, cuts):
    """Use a batch as an icefall recipe does."""
    from stillhouse.distill import TargetReader

    reader = TargetReader([(store, store.resolve("known/*/4"))], position="word")
    plain = reader.read(*cut_ids(store, cuts))
    fast = reader.read(*cut_ids(store, attach(cuts, store).perturb_speed(1.1)))
    for a, b in zip(plain.targets.values(), fast.targets.values()):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_xarray(store):
    pytest.importorskip("xarray", reason="no xarray: pip install 'stillhouse[xarray]'")
    from stillhouse.extract.adapters.labelled import to_xarray

    views = store.resolve("known/*/0,4")
    found = to_xarray(store, ["s00-0001", "s01-0003"], views)
    assert found.hidden.dims == ("view", "token", "dimension") and found.hidden.dtype == np.float32
    one = found.hidden.sel(view="known/both:8/4")[(found.utterance == "s01-0003").values]
    expected = store.gather(["s01-0003"], views).states[views[3]]
    assert np.array_equal(one.values, expected.astype(np.float32))
    assert found.position.values.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert found.begin.values[:2].tolist() == [0, 3] and found.context.values.tolist() == ["alone"] * 2 + ["both:8"] * 2
    mean = found.hidden.groupby("utterance").mean()
    assert mean.sizes == {"view": 4, "utterance": 2, "dimension": 12}
    with pytest.raises(UsageError):
        to_xarray(store, ["s00-0001"], [])


def test_the_whole_store_opens_in_xarray_with_names(store):
    xarray = pytest.importorskip("xarray", reason="no xarray: pip install 'stillhouse[xarray]'")
    whole = xarray.open_zarr(store.path / "data.zarr", group="known", consolidated=False)
    assert whole.hidden.dims == ("context", "layer", "token", "dimension")
    first = int(whole.start[0]), int(whole.start[0] + whole.length[0])
    view = store.resolve("known/alone/2")[0]
    c, k = whole.attrs["stillhouse"]["contexts"].index("alone"), whole.attrs["stillhouse"]["layers"].index(2)
    states = whole.hidden[c, k].isel(token=slice(*first)).values
    assert np.array_equal(states, store.gather(store.utterance_ids[:1], [view]).states[view])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_dataset(store, workers):
    from torch.utils.data import DataLoader, Dataset

    from stillhouse.extract.adapters.dataset import States

    views = store.resolve("known/both:8/2,4")
    data = States(store, views, ["s00-0001", "s01-0003", "s00-0002"])
    assert isinstance(data, Dataset) and len(data) == 3
    (first, last) = DataLoader(data, batch_size=2, collate_fn=data.collate, num_workers=workers)
    assert first["id"] == ["s00-0001", "s01-0003"] and last["id"] == ["s00-0002"]
    for row, utterance in enumerate(first["id"]):
        alone = store.gather([utterance], views)
        n = len(alone.token_id["known"])
        assert int(first["lengths"]["known"][row]) == n
        for view in views:
            padded = first["states"][view.address][row].numpy()
            assert np.array_equal(padded[:n], alone.states[view].astype(np.float32)) and not padded[n:].any()
        assert first["span"]["known"][row].tolist()[:n] == alone.span["known"].tolist()
    assert data[2]["id"] == "s00-0002"
    assert len(States(store, views)) == 6


def test_batches_are_the_store(partial):
    views = partial.resolve("known/alone/0,4", partial.planned_views)
    seen = []
    for ids, batch in batches(partial, views, tokens=500):
        assert batch.lengths["known"].sum() <= 520
        assert np.array_equal(batch.states[views[1]], partial.gather(ids, views).states[views[1]])
        seen += ids
    assert seen == partial.utterance_ids
    unfinished = partial.resolve("known/both:8/0", partial.planned_views)
    few = [i for ids, _ in batches(partial, unfinished) for i in ids]
    assert 0 < len(few) < len(seen) and partial.has(few, unfinished[0]).all()
    asked = [ids for ids, _ in batches(partial, views, seen[:3], tokens=1, dtype="float32")]
    assert asked == [[i] for i in seen[:3]]


def test_neither_store_nor_adapters_import_torch():
    program = (
        "import sys, stillhouse.extract.store.batches, stillhouse.extract.adapters; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

"""The whole way with a store that the real extraction wrote: views by address, targets, loss, threads, pickling."""

from __future__ import annotations

import pickle
import threading

import known_store
import numpy as np
import pytest
import torch

from stillhouse.data.errors import StaleError
from stillhouse.distill import TargetReader, Transfer
from stillhouse.extract.store import Store, View


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return known_store.build(tmp_path_factory.mktemp("real")), known_store.TEXTS


def test_targets_are_the_standardised_states_of_the_store(store):
    store, raw = store
    views = store.resolve(["known/*/2", "known/alone/last"])
    assert [v.address for v in views] == ["known/alone/2", "known/both:8/2", "known/alone/4"]
    ids = store.utterance_ids
    texts = [raw[int(i.split("-")[1])] for i in ids]
    reader = TargetReader([(store, views)], position="word")
    # spans of words are spans of the raw, upper-case text; each is one token of this teacher, and 😀 is no word
    batch = reader.read(ids, texts)
    gathered = store.gather(ids, views)
    kept = gathered.token_id["known"] != store.embedding("known")[0][store.pieces("known").index("😀")]
    for view in views:
        mean, std = store.norm(view)
        expected = (gathered.states[view].astype(np.float32) - mean) / std
        np.testing.assert_allclose(batch.targets[view.address], expected[kept], rtol=1e-5, atol=1e-5)
        # the whole corpus is the sample of the norms, so what they standardise is standard
        tokens = TargetReader([(store, [view])]).read(ids, texts).targets[view.address]
        assert tokens.mean(0).abs().max() < 1e-3
        spread = std > 0.01  # one dimension is constant
        np.testing.assert_allclose(tokens.std(0, correction=0)[spread], 1, atol=2e-3)
    assert batch.positions["known"].masked == 0
    transfer = Transfer(reader.views, 16, aligner="attention", embeddings=reader.embeddings)
    loss = transfer(torch.randn(len(ids), 3, 16), torch.tensor([3] * len(ids)), batch).loss
    loss.backward()
    assert loss.isfinite()


def test_a_changed_transcript_is_refused(store):
    store, raw = store
    reader = TargetReader([(store, store.views)])
    with pytest.raises(StaleError, match="s00-0001"):
        reader.read(["s00-0000", "s00-0001"], [raw[0], raw[1] + "S"])


def test_one_reader_in_two_threads_and_after_a_pickle(store):
    store, raw = store
    ids = ["s00-0002", "s01-0005", "s00-0000"]
    texts = [raw[2], raw[5], raw[0]]
    reader = TargetReader([(Store.open(store.path), [View("known", "both:8", 4)])])
    expected = reader.read(ids, texts).targets["known/both:8/4"]
    found = []

    def read():
        found.extend(reader.read(ids, texts).targets["known/both:8/4"] for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(pickle.loads(pickle.dumps(reader)).read(ids, texts).targets["known/both:8/4"])
    assert len(found) == 41 and all(torch.equal(f, expected) for f in found)

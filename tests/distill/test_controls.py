"""Controls: who gives to whom, and that all but the targets stays."""

from __future__ import annotations

import json

import known_store
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.cli import cli
from stillhouse.data.errors import ConfigError
from stillhouse.data.manifest import read_manifest
from stillhouse.distill import TargetReader
from stillhouse.distill.controls import punctuation_ids, shuffled_partners, vocabulary, word_codes, word_numbers
from stillhouse.extract.store import Store

TEXTS = [" ".join(f"w{(i * 5 + j * 3) % 40}" for j in range(2 + i % 4)) for i in range(24)] + [
    "w1 w2 w3 w4 w5 w6 w7 w8",
    "",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return known_store.build(tmp_path_factory.mktemp("controls"), TEXTS)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=30), st.integers(0, 5), st.booleans())
def test_donors(utterances, seed, texts_differ):
    """Texts of equal length only, as those of a store: the text's number has the length in it."""
    lengths = np.array([n for n, _ in utterances], np.int32)
    texts = np.arange(len(lengths)) if texts_differ else np.array([10 * n + t for n, t in utterances], np.uint64)
    found = shuffled_partners(lengths, seed, texts)
    for u, (n, donor) in enumerate(zip(lengths, found)):
        alike = lengths == n
        most = max(np.sum(texts[alike] == t) for t in texts[alike])
        if n == 0:
            assert donor == u
        elif 2 * most <= alike.sum():
            assert texts[donor] != texts[u] and lengths[donor] == n
        elif (lengths > n).any():
            assert lengths[donor] == lengths[lengths > n].min()
        else:
            assert donor == -1
    assert np.array_equal(found, shuffled_partners(lengths, seed, texts))
    if texts_differ:
        assert np.array_equal(found, shuffled_partners(lengths, seed))
    # in a ring nobody gives twice
    rings = [d for u, d in enumerate(found) if lengths[u] and d >= 0 and lengths[d] == lengths[u]]
    assert len(set(rings)) == len(rings)


def test_a_text_that_others_read_too_is_no_donor():
    """Five readings of each of eight sentences of one length, as in the demo's corpus."""
    texts = np.repeat(np.arange(8), 5)
    found = shuffled_partners(np.full(40, 7), 1, texts)
    assert (texts[found] != texts).all() and sorted(found) == list(range(40))


def test_another_seed_is_another_shuffle():
    lengths = np.full(50, 3)
    assert not np.array_equal(shuffled_partners(lengths, 1), shuffled_partners(lengths, 2))


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
    giver = shuffled_partners(lengths, 3, store.index.text_hash)
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


def test_the_number_of_a_word():
    """Tokens 5 and 6 that touch are a word; alone, or the other way round, they are others; batches change nothing."""
    span = np.array([[0, 2], [2, 4], [5, 7], [8, 9], [0, 2], [2, 4], [0, 2], [2, 3]])
    token_id, lengths = np.array([5, 6, 5, 6, 5, 6, 6, 5]), np.array([4, 0, 2, 2])
    numbers = word_numbers(token_id, span, lengths)
    assert numbers.dtype == np.uint64 and np.unique(numbers, return_inverse=True)[1].max() == 3
    assert len({*numbers[[0, 2, 3, 6]].tolist()}) == 4
    assert (numbers[[1, 4, 5]] == numbers[0]).all() and numbers[6] == numbers[7]
    np.testing.assert_array_equal(word_numbers(token_id[4:6], span[4:6], np.array([2])), numbers[4:6])
    assert word_numbers(token_id[:0], span[:0], np.array([0, 0])).shape == (0,)
    many = word_numbers(np.arange(4000), np.stack([np.arange(4000) * 2, np.arange(4000) * 2 + 1], 1), np.array([4000]))
    assert len(np.unique(many)) == 4000


def test_punctuation_is_no_part_of_a_word():
    """Tokens: " sea . " | sea | don ' t: 9, 8 and 7 are silent; a mark on its own is a word of no token."""
    token_id = np.array([9, 1, 8, 9, 1, 2, 7, 3, 8, 2, 3])
    span = np.array([[0, 1], [1, 4], [4, 5], [5, 6], [0, 3], [4, 7], [7, 8], [8, 9], [10, 11], [12, 15], [15, 16]])
    lengths, texts = np.array([4, 7]), ['"sea."', "sea don't - dont"]
    silent = punctuation_ids(token_id, span, lengths, texts)
    assert silent.tolist() == [7, 8, 9]
    numbers = word_numbers(token_id, span, lengths, silent)
    assert (numbers[:5] == numbers[4]).all()
    assert (numbers[5:8] == numbers[9]).all() and numbers[9] == numbers[10] != numbers[4]
    assert numbers[8] == 0
    np.testing.assert_array_equal(word_numbers(token_id[4:5], span[4:5], np.array([1])), numbers[4:5])
    heard = word_numbers(token_id, span, lengths)
    assert heard[0] != heard[4]


def test_codes_are_one_hot_and_rare_words_share_the_last():
    numbers = np.array([30, 10, 30, 20, 10, 30, 40], np.uint64)
    words = vocabulary(numbers)
    assert words.tolist() == [10, 20, 30, 40]
    codes = word_codes(numbers, words)
    assert codes.shape == (7, 5) and codes.argmax(1).tolist() == [2, 0, 2, 1, 0, 2, 3]
    np.testing.assert_array_equal(codes.sum(1), 1)
    few = vocabulary(numbers, 2)
    assert few.tolist() == [10, 30]
    assert word_codes(np.array([5, 10, 20, 30, 40], np.uint64), few).argmax(1).tolist() == [2, 0, 2, 1, 2]
    assert word_codes(numbers[:0], words).shape == (0, 5)


def test_a_word_is_one_with_and_without_punctuation(tmp_path, minilm):
    """With the tokens of a real teacher, whose marks touch the words that they stand by."""
    texts = ["The sea was cold.", '"The sea!" he said, "the cold sea."']
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"u{k}", "text": t}) + "\n" for k, t in enumerate(texts)))
    request = ["--teacher", str(minilm), "--name", "minilm", "--layers", "1", "--context", "alone"]
    cli(["extract", str(corpus), str(tmp_path / "s.zarr"), *request], standalone_mode=False)
    store = Store.open(tmp_path / "s.zarr")
    reader = TargetReader([(store, store.views)], "word", control="words", corpus=read_manifest(corpus))
    batch = reader.read(["u0", "u1"], texts)
    codes = batch.targets["minilm/words"].argmax(1).tolist()
    the, sea, was, cold, he, said = codes[:4] + codes[6:8]
    assert codes == [the, sea, was, cold, the, sea, he, said, the, cold, sea]
    assert len({the, sea, was, cold, he, said}) == 6
    np.testing.assert_array_equal(batch.targets["minilm/words"].max(1).values, 1)


@pytest.mark.parametrize("position", ["token", "word"])
def test_planted_words(store, position):
    """A word has its own code in every batch; shuffled, it has the code of the donor's word at its place."""
    views = store.resolve("known/both:8/2,4")
    ids = [i for i in store.utterance_ids if i != "s08-0024"]
    texts = [TEXTS[int(i.split("-")[1])] for i in ids]
    batches = {
        control: TargetReader([(store, views)], position, control=control, seed=3).read(ids, texts)
        for control in ("words", "words-shuffled")
    }
    words = [word for text in texts for word in text.split()]
    rows, places = batches["words"].targets["known/words"], batches["words"].positions["known"].place
    assert len(rows) == len(words) and torch.equal(places, batches["words-shuffled"].positions["known"].place)
    code = {word: row for word, row in zip(words, rows, strict=True)}
    assert all(torch.equal(code[word], row) for word, row in zip(words, rows, strict=True))
    assert len(torch.unique(rows, dim=0)) == len(set(words))
    lengths = store.lengths("known")
    giver = shuffled_partners(lengths, 3, store.index.text_hash)
    expected = []
    for i in ids:
        row = int(store.rows([i])[0])
        donor = store.index.id(int(giver[row]))
        expected += TEXTS[int(donor.split("-")[1])].split()[: int(lengths[row])]
    for word, row in zip(expected, batches["words-shuffled"].targets["known/words"], strict=True):
        assert torch.equal(code.get(word, row), row)
    assert expected != words


def test_unknown_control(store):
    with pytest.raises(ConfigError, match="no control 'random'"):
        TargetReader([(store, store.views)], control="random")

"""Span matrices: literals worked by hand for every kind of tokeniser, and the general case against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from stillhouse.distill.spans import expand, identity, overlaps, pack, places, word_spans


def one(positions, pieces) -> np.ndarray:
    """The matrix of a single utterance."""
    p, n = np.array(positions, np.int32).reshape(-1, 2), np.array(pieces, np.int32).reshape(-1, 2)
    return overlaps(p, np.array([len(p)]), n, np.array([len(n)])).dense()


def spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    return tokenizer.encode(text, add_special_tokens=False).offsets


def byte_bpe(merges: list[tuple[str, str]]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_byte_level_bpe_words_take_the_share_of_each_piece():
    tokenizer = byte_bpe([("c", "a"), ("Ġ", "ca")])
    text = "a cats"
    assert spans(tokenizer, text) == [(0, 1), (1, 4), (4, 5), (5, 6)]  # a, Ġca (with the space), t, s
    # "cats" [2, 6): two of its characters lie under " ca", one each under "t" and "s"
    expected = [[1, 0, 0, 0], [0, 0.5, 0.25, 0.25]]
    np.testing.assert_allclose(one(word_spans(text), spans(tokenizer, text)), expected)


def test_byte_level_bpe_shares_an_emoji_among_its_bytes():
    text = "hi 😀 é"
    pieces = spans(byte_bpe([]), text)
    # h, i, space, four bytes of one code point, space, two bytes of é
    assert pieces == [(0, 1), (1, 2), (2, 3), *[(3, 4)] * 4, (4, 5), *[(5, 6)] * 2]
    matrix = one([(0, 2), (3, 4), (5, 6)], pieces)
    expected = np.zeros((3, 10))
    expected[0, :2], expected[1, 3:7], expected[2, 8:] = 1 / 2, 1 / 4, 1 / 2
    np.testing.assert_allclose(matrix, expected)
    # and the other way round: every byte lies under the one unit that the emoji is
    np.testing.assert_allclose(one(pieces[3:7], [(0, 2), (3, 4)]), [[0, 1]] * 4)


def test_wordpiece():
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "chess": 3, ".": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text = "playing chess."
    assert spans(tokenizer, text) == [(0, 4), (4, 7), (8, 13), (13, 14)]
    # seven characters of "playing": four and three; the full stop is nobody's word
    np.testing.assert_allclose(
        one(word_spans(text), spans(tokenizer, text)), [[4 / 7, 3 / 7, 0, 0], [0, 0, 1, 0]], rtol=1e-6
    )


def test_sentencepiece_and_a_position_that_nothing_overlaps():
    vocabulary = [("<unk>", 0.0), ("▁", -3.0), ("▁so", -1.0), ("ap", -1.0), ("▁is", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    text = "soap is"
    pieces = spans(tokenizer, text)
    assert pieces == [(0, 2), (2, 4), (4, 7)]
    np.testing.assert_allclose(one(word_spans(text), pieces), [[0.5, 0.5, 0], [0, 0, 1]])
    # units "so", "ap", " " (a lone ▁), "is" against pieces "▁so" and "is" without the rest
    matrix = overlaps(
        np.array([(0, 2), (2, 4), (4, 5), (5, 7)]), np.array([4]), np.array([(0, 2), (5, 7)]), np.array([2])
    )
    assert matrix.covered.tolist() == [True, False, False, True]
    np.testing.assert_allclose(matrix.dense(), [[1, 0], [0, 0], [0, 0], [0, 1]])


def test_chinese_characters_are_words_and_share_a_token():
    text = "我喜欢猫 ok。"
    assert word_spans(text).tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [5, 7]]
    tokens = [(0, 1), (1, 3), (3, 4), (4, 7), (7, 8)]  # 我, 喜欢, 猫, " ok", 。
    matrix = one(word_spans(text), tokens)
    np.testing.assert_allclose(
        matrix, [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" … — ! ", []),
        ("😀", []),
        ("'tis the cat's “tail”, co-op.", ["tis", "the", "cat's", "tail", "co-op"]),
        ("naïve cafe\u0301!", ["naïve", "cafe\u0301"]),
        ("MR. 42%", ["MR", "42"]),
        ("東京tower", ["東", "京", "tower"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
    ],
)
def test_words(text, words):
    assert [text[a:b] for a, b in word_spans(text)] == words


def test_empty_pieces_overlap_nothing_and_unsorted_pieces_are_found():
    np.testing.assert_allclose(
        one([(0, 4), (4, 6)], [(4, 6), (2, 2), (0, 2), (1, 4)]), [[0, 0, 0.4, 0.6], [1, 0, 0, 0]]
    )


span_lists = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(span_lists, span_lists), max_size=4))
def test_against_brute_force(utterances):
    positions, position_lengths = pack([np.array([(b, b + n) for b, n in p]).reshape(-1, 2) for p, _ in utterances])
    pieces, piece_lengths = pack([np.array([(b, b + n) for b, n in q]).reshape(-1, 2) for _, q in utterances])
    found = overlaps(positions, position_lengths, pieces, piece_lengths)
    expected = np.zeros((len(positions), len(pieces)))
    for i, (b, p) in enumerate(zip(places(position_lengths)[0], positions)):
        for j, (c, q) in enumerate(zip(places(piece_lengths)[0], pieces)):
            if b == c:
                expected[i, j] = len(set(range(*p)) & set(range(*q)))
    total = expected.sum(1, keepdims=True)
    np.testing.assert_array_equal(found.covered, total[:, 0] > 0)
    np.testing.assert_allclose(found.dense(), expected / np.maximum(total, 1), rtol=1e-6)
    values = np.random.default_rng(0).normal(size=(len(pieces), 3)).astype(np.float16)
    np.testing.assert_allclose(found.pool(values), found.dense() @ values.astype(np.float32), atol=1e-5)
    kept = np.flatnonzero(found.covered)[::-1]
    np.testing.assert_array_equal(found.select(kept).dense(), found.dense()[kept])
    padded = found.padded(position_lengths, piece_lengths)
    for b in range(len(utterances)):
        block = found.dense()[places(position_lengths)[0] == b][:, places(piece_lengths)[0] == b]
        np.testing.assert_array_equal(padded[b, : block.shape[0], : block.shape[1]], block)
        assert padded[b].sum() == pytest.approx(block.sum())


def test_expand_and_places():
    assert expand(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    batch, index = places(np.array([2, 0, 1]))
    assert (batch.tolist(), index.tolist()) == ([0, 0, 2], [0, 1, 0])
    assert identity(0).dense().shape == (0, 0)

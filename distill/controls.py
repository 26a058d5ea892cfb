"""The study's controls: targets that a teacher's knowledge cannot explain.

`shuffled`: each utterance gets the states of another one of equal length, own queries and spans kept: what
helps then is not what the states say. `static`: the teacher's input embeddings: an auxiliary task on the
words' identities. `words`: a planted signal, one-hot codes of the words, which a transfer that works must be
able to use; `words-shuffled`: the same codes from another utterance's words.

Invariant: who gives to whom depends on the store and the seed alone, never on batches or on what is missing.
Exercised by: pytest tests/distill/test_controls.py; `stillhouse train CONFIG --set transfer.control=…`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONTROLS = ("shuffled", "static", "words", "words-shuffled")
MOST_WORDS = 4095  # that have a place of their own in a code
LEAST_STD = 1e-3  # as the store's norms


def shuffled_partners(lengths: np.ndarray, seed: int, texts: np.ndarray | None = None) -> np.ndarray:
    """For each utterance (lengths int [U]) another one with another text, int64 [U]: of equal length, or the next
    longer one, whose end is cut off.

    texts [U] has equal numbers for equal texts; None: all differ. Utterances of equal length give in a ring, unless
    half of them or more have one text: those take from the next longer ones. -1: the longest, where there is no other.
    Utterances without tokens need nobody: themselves.
    """
    rng = np.random.default_rng(seed)
    text = np.arange(len(lengths)) if texts is None else np.unique(texts, return_inverse=True)[1].reshape(-1)
    place = rng.permutation(int(text.max(initial=-1)) + 1)[text]  # of its text among the texts of its length
    order = np.lexsort((rng.random(len(lengths)), place, lengths))
    _, first, count = np.unique(lengths[order], return_index=True, return_counts=True)
    found = np.full(len(lengths), -1, np.int64)
    for k, (begin, size) in enumerate(zip(first.tolist(), count.tolist(), strict=True)):
        mine = order[begin : begin + size]
        # Equal texts lie side by side, at most `most` of them, so whoever is that far away has another one
        most = int(np.bincount(place[mine] - place[mine].min()).max())
        if 2 * most <= size:
            found[mine] = np.roll(mine, -most)
        elif k + 1 < len(first):
            longer = order[begin + size : begin + size + count[k + 1]]
            found[mine] = longer[np.arange(size) % len(longer)]
    return np.where(lengths == 0, np.arange(len(lengths)), found)


def table_norm(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of an embedding table [K, D] by dimension, over the vocabulary: float32 [D], std ≥
    1e-3.
    """
    table = table.astype(np.float32)
    return table.mean(0), np.maximum(table.std(0), LEAST_STD)


def punctuation_ids(token_id: np.ndarray, span: np.ndarray, lengths: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Packed tokens of B utterances (int [ΣN], [ΣN, 2], [B]) and their texts -> the ids of punctuation, sorted: tokens
    whose first occurrence spans no letter and no digit.
    """
    found, first = np.unique(token_id, return_index=True)
    of = np.searchsorted(np.cumsum(lengths), first, side="right")
    places = zip(of.tolist(), span[first].tolist(), strict=True)
    return found[[not any(c.isalnum() for c in texts[b][i:j]) for b, (i, j) in places]]


def word_numbers(
    token_id: np.ndarray, span: np.ndarray, lengths: np.ndarray, silent: np.ndarray | None = None
) -> np.ndarray:
    """Packed tokens of B utterances (int [ΣN], [ΣN, 2], [B]) -> uint64 [ΣN]: a number of each token's word. Equal words
    have equal numbers in every batch, run and store of the teacher; that others do not is as good as certain.

    A word is a run of tokens whose spans touch: what white space parts, and tokens that the transform has parted.
    Token ids in `silent` are no part of it: "sea" and "sea." sound alike, and a recogniser has no other way to know.
    """
    if not len(token_id):
        return np.zeros(0, np.uint64)
    first = np.ones(len(token_id), bool)
    first[1:] = span[1:, 0] > span[:-1, 1]
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    word = np.cumsum(first) - 1
    heard = np.ones(len(token_id), bool) if silent is None else ~np.isin(token_id, silent)
    before = np.cumsum(heard) - heard
    place = before - before[np.flatnonzero(first)][word]
    number = np.zeros(word[-1] + 1, np.uint64)
    with np.errstate(over="ignore"):
        codes = _scatter(token_id.astype(np.uint64) + _scatter(place.astype(np.uint64) + _ODD))
        np.add.at(number, word[heard], codes[heard])
    return number[word]


def vocabulary(numbers: np.ndarray, most: int = MOST_WORDS) -> np.ndarray:
    """The words with a code of their own, uint64 [≤ most], sorted: all of `numbers`, or the `most` frequent."""
    words, count = np.unique(numbers, return_counts=True)
    if len(words) > most:
        words = np.sort(words[np.lexsort((words, -count))[:most]])
    return words


def word_codes(numbers: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Words by number [N] -> one-hot codes float32 [N, len(words) + 1]; the last place is of words not in `words`."""
    place = np.searchsorted(words, numbers)
    known = place < len(words)
    known[known] = words[place[known]] == numbers[known]
    codes = np.zeros((len(numbers), len(words) + 1), np.float32)
    codes[np.arange(len(numbers)), np.where(known, place, len(words))] = 1
    return codes


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _scatter(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 without a visible pattern: splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

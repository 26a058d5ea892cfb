"""The study's controls: targets that a teacher's knowledge cannot explain.

`shuffled` gives each utterance the states of another one of equal length, with its own queries and spans. If it helps,
the content of the states is not the reason. `static` takes the teacher's input embeddings, which is an auxiliary task
on the identity of words. `words` plants a signal: one-hot codes of the words, which a working transfer must be able to
use. `words-shuffled` takes the same codes from another utterance's words.
Guarantees: partners depend on the store and the seed alone, never on batches or on what is missing.
Try: `pytest tests/distill/test_controls.py`, or `stillhouse train CONFIG --set transfer.control=…`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONTROLS = ("shuffled", "static", "words", "words-shuffled")
MOST_WORDS = 4095  # words that have a place of their own in a code
LEAST_STD = 1e-3  # the same as in the store's norms


def shuffled_partners(lengths: np.ndarray, seed: int, texts: np.ndarray | None = None) -> np.ndarray:
    """Return for each utterance another one with another text, int64 [U], of equal length if possible.

    Utterances of equal length form a ring, unless more than half of them have one text. Those take from the next longer
    ones, whose ends are cut off. The result is -1 for the longest ones without another text. Utterances without tokens
    get themselves.

    Arguments:
        lengths: int [U], tokens of each utterance.
        texts: [U], equal numbers for equal texts. None: all differ.
    """
    rng = np.random.default_rng(seed)
    text = np.arange(len(lengths)) if texts is None else np.unique(texts, return_inverse=True)[1].reshape(-1)
    place = rng.permutation(int(text.max(initial=-1)) + 1)[text]  # the place of each text in a random order
    order = np.lexsort((rng.random(len(lengths)), place, lengths))
    _, first, count = np.unique(lengths[order], return_index=True, return_counts=True)
    partners = np.full(len(lengths), -1, np.int64)
    for k, (begin, size) in enumerate(zip(first.tolist(), count.tolist(), strict=True)):
        equal = order[begin : begin + size]
        # Equal texts are side by side, at most `most` of them, so the utterance that far away has another text.
        most = int(np.bincount(place[equal] - place[equal].min()).max())
        if 2 * most <= size:
            partners[equal] = np.roll(equal, -most)
        elif k + 1 < len(first):
            longer = order[begin + size : begin + size + count[k + 1]]
            partners[equal] = longer[np.arange(size) % len(longer)]
    return np.where(lengths == 0, np.arange(len(lengths)), partners)


def table_norm(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (≥ 1e-3) of an embedding table [K, D] over its rows, each float32 [D]."""
    table = table.astype(np.float32)
    return table.mean(0), np.maximum(table.std(0), LEAST_STD)


def punctuation_ids(token_id: np.ndarray, span: np.ndarray, lengths: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return the ids of punctuation, sorted: tokens whose first occurrence spans no letter and no digit.

    Arguments:
        token_id, span, lengths: packed tokens of B utterances, int [ΣN], [ΣN, 2] and [B].
        texts: the raw transcripts of the utterances.
    """
    ids, first = np.unique(token_id, return_index=True)
    utterance = np.searchsorted(np.cumsum(lengths), first, side="right")
    occurrences = zip(utterance.tolist(), span[first].tolist(), strict=True)
    return ids[[not any(c.isalnum() for c in texts[b][i:j]) for b, (i, j) in occurrences]]


def word_numbers(
    token_id: np.ndarray, span: np.ndarray, lengths: np.ndarray, punctuation: np.ndarray | None = None
) -> np.ndarray:
    """Return a number of each token's word, uint64 [ΣN].

    Equal words have equal numbers in each batch, run and store of the teacher. Other words have others, as good as
    certain. A word is a run of tokens whose spans touch, so white space and the transform separate words.

    Arguments:
        token_id, span, lengths: packed tokens of B utterances, int [ΣN], [ΣN, 2] and [B].
        punctuation: ids that are no part of a word, since "sea" and "sea." sound alike to a recogniser.
    """
    if not len(token_id):
        return np.zeros(0, np.uint64)
    first = np.ones(len(token_id), bool)
    first[1:] = span[1:, 0] > span[:-1, 1]
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    word = np.cumsum(first) - 1
    spoken = np.ones(len(token_id), bool) if punctuation is None else ~np.isin(token_id, punctuation)
    before = np.cumsum(spoken) - spoken
    place = before - before[np.flatnonzero(first)][word]
    number = np.zeros(word[-1] + 1, np.uint64)
    with np.errstate(over="ignore"):
        codes = scatter(token_id.astype(np.uint64) + scatter(place.astype(np.uint64) + _ODD))
        np.add.at(number, word[spoken], codes[spoken])
    return number[word]


def vocabulary(numbers: np.ndarray, most: int = MOST_WORDS) -> np.ndarray:
    """Return the words with a code of their own, uint64 [≤ most], sorted: the `most` frequent of `numbers`."""
    words, count = np.unique(numbers, return_counts=True)
    if len(words) > most:
        words = np.sort(words[np.lexsort((words, -count))[:most]])
    return words


def word_codes(numbers: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return one-hot codes float32 [N, len(words) + 1] of word numbers [N]. Unknown words share the last place."""
    place = np.searchsorted(words, numbers)
    known = place < len(words)
    known[known] = words[place[known]] == numbers[known]
    codes = np.zeros((len(numbers), len(words) + 1), np.float32)
    codes[np.arange(len(numbers)), np.where(known, place, len(words))] = 1
    return codes


_ODD = np.uint64(0x9E3779B97F4A7C15)


def scatter(x: np.ndarray) -> np.ndarray:
    """Return uint64 hashes of uint64 numbers, by splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

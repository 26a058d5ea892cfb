"""The study's controls: targets that a teacher's knowledge cannot explain.

`shuffled`: each utterance gets the states of another one of equal length, own queries and spans kept: what
helps then is not what the states say. `static`: the teacher's input embeddings: an auxiliary task on the
words' identities. `words`: a planted signal, each word's own random code, which a transfer that works must be
able to use; `words-shuffled`: the same codes from another utterance's words.

Invariant: who gives to whom depends on the store and the seed alone, never on batches or on what is missing.
Exercised by: pytest tests/distill/test_controls.py; `stillhouse train CONFIG --set transfer.control=…`.
"""

from __future__ import annotations

import numpy as np

CONTROLS = ("shuffled", "static", "words", "words-shuffled")
CODE_WIDTH = 128
LEAST_STD = 1e-3  # as the store's norms


def donors(lengths: np.ndarray, seed: int, texts: np.ndarray | None = None) -> np.ndarray:
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


def word_codes(token_id: np.ndarray, span: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Packed tokens of B utterances (int [ΣN], [ΣN, 2], [B]) -> float32 [ΣN, 128] of 1 and -1: the code of each token's
    word. Equal words have equal codes in every batch, run and store of the teacher; others differ in half of the signs.

    A word is a run of tokens whose spans touch: what white space parts, and tokens that the transform has parted.
    """
    if not len(token_id):
        return np.zeros((0, CODE_WIDTH), np.float32)
    first = np.ones(len(token_id), bool)
    first[1:] = span[1:, 0] > span[:-1, 1]
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    word = np.cumsum(first) - 1
    place = np.arange(len(token_id)) - np.flatnonzero(first)[word]
    with np.errstate(over="ignore"):
        number = np.zeros(word[-1] + 1, np.uint64)
        np.add.at(number, word, _scatter(token_id.astype(np.uint64) + _scatter(place.astype(np.uint64) + _ODD)))
        bits = _scatter(number[:, None] + np.arange(1, CODE_WIDTH + 1, dtype=np.uint64) * _ODD) >> np.uint64(63)
    return (1 - 2 * bits.astype(np.float32))[word]


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _scatter(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 without a visible pattern: splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

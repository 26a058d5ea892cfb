"""Spans: from the pieces of one tokeniser to the positions of another, and from frames of audio to encoder states.

Spans [begin, end) count Unicode code points of the raw transcript. Teacher tokens, words and ASR units all cut the same
text, so their spans can be compared. No pair of tokenisers needs code of its own, nor do scripts without spaces.
Spans of audio count microseconds (see frames.py).
Guarantees: each row of an `Overlaps` sums to 1, or is empty and not `covered`. Nothing is divided by zero.
Try: `pytest tests/distill/test_spans.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# In scripts without spaces whose characters are words or syllables, each character counts as a word.
_CHARACTER_SCRIPTS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_RUN = re.compile(r"\S+")


@dataclass(frozen=True)
class Overlaps:
    """A sparse row-stochastic matrix [P, N]: the share of position p's characters, or of its time, that piece n covers.

    Row p holds the entries `start[p] : start[p + 1]` of `column` and `weight`.
    """

    start: np.ndarray  # int64 [P + 1]
    column: np.ndarray  # int64 [E]
    weight: np.ndarray  # float32 [E]
    columns: int  # N

    @property
    def rows(self) -> int:
        return len(self.start) - 1

    @property
    def covered(self) -> np.ndarray:
        """Positions that at least one piece overlaps, bool [P]."""
        return self.start[1:] > self.start[:-1]

    @property
    def row(self) -> np.ndarray:
        """The row of each entry, int64 [E]."""
        return np.repeat(np.arange(self.rows), np.diff(self.start))

    def select(self, rows: np.ndarray) -> Overlaps:
        """Return the matrix of these rows int64 [M] alone, in this order."""
        counts = np.diff(self.start)[rows]
        entries = expand(self.start[rows], counts)
        start = np.concatenate([[0], np.cumsum(counts)])
        return Overlaps(start, self.column[entries], self.weight[entries], self.columns)

    def pool(self, values: np.ndarray) -> np.ndarray:
        """Return weighted means float32 [P, D] of `values` float [N, D]. Rows that nothing covers are 0."""
        out = np.zeros((self.rows, values.shape[1]), np.float32)
        counts = np.diff(self.start)
        # Add the first entry of each row, then the second of those that have one, …. Most rows have one or two.
        for k in range(int(counts.max(initial=0))):
            rows = np.flatnonzero(counts > k)
            entry = self.start[rows] + k
            out[rows] += values[self.column[entry]].astype(np.float32, copy=False) * self.weight[entry, None]
        return out

    def listed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pieces of each row, int64 [P, K], and their weights, float32 [P, K]. Padding weighs 0."""
        counts = np.diff(self.start)
        inside = np.arange(max(1, int(counts.max(initial=0)))) < counts[:, None]
        column, weight = np.zeros(inside.shape, np.int64), np.zeros(inside.shape, np.float32)
        column[inside], weight[inside] = self.column, self.weight
        return column, weight

    def dense(self) -> np.ndarray:
        """Return the whole matrix, float32 [P, N], for tests and small matrices."""
        out = np.zeros((self.rows, self.columns), np.float32)
        np.add.at(out, (self.row, self.column), self.weight)
        return out

    def padded(self, row_lengths: np.ndarray, column_lengths: np.ndarray) -> np.ndarray:
        """Return the diagonal's blocks, one for each utterance: float32 [B, max rows, max columns], padded with 0."""
        shape = (len(row_lengths), int(row_lengths.max(initial=0)), int(column_lengths.max(initial=0)))
        out = np.zeros(shape, np.float32)
        row, (batch_of, row_in), (_, column_in) = self.row, places(row_lengths), places(column_lengths)
        out[batch_of[row], row_in[row], column_in[self.column]] = self.weight
        return out


def expand(start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return start[0], start[0] + 1, …, counts[0] numbers, then the same for start[1], …: int64 [Σcounts]."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(start - (ends - counts), counts)


def places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the utterance of each of Σlengths packed items, and its index in it, each int64 [Σ]."""
    batch = np.repeat(np.arange(len(lengths)), lengths)
    return batch, expand(np.zeros(len(lengths), np.int64), lengths)


def overlaps(
    positions: np.ndarray, position_lengths: np.ndarray, pieces: np.ndarray, piece_lengths: np.ndarray
) -> Overlaps:
    """Return how packed positions overlap, in characters or in time, with packed pieces of the same B utterances.

    Arguments:
        positions, pieces: spans, int [ΣP, 2] and int [ΣN, 2]. Pieces of one utterance may share characters, as the
            bytes of one emoji do. An empty piece overlaps nothing. Sorted spans are fastest.
        position_lengths, piece_lengths: int [B], positions and pieces of each utterance.
    """
    n_positions, n_pieces = len(positions), len(pieces)
    if not n_positions or not n_pieces:
        empty = np.zeros(0, np.int64)
        return Overlaps(np.zeros(n_positions + 1, np.int64), empty, empty.astype(np.float32), n_pieces)
    batch = len(position_lengths)
    position_of, piece_of = (np.repeat(np.arange(batch), n) for n in (position_lengths, piece_lengths))
    # All utterances are on one axis of characters, one behind the other, so one search is enough for the batch.
    stretch = np.zeros(batch, np.int64)
    np.maximum.at(stretch, position_of, positions[:, 1])
    np.maximum.at(stretch, piece_of, pieces[:, 1])
    origin = np.concatenate([[0], np.cumsum(stretch)[:-1]])
    p = positions.astype(np.int64) + origin[position_of][:, None]
    n = pieces.astype(np.int64) + origin[piece_of][:, None]
    # The pieces that may overlap a position are a run: from the first that ends behind its beginning to the last that
    # begins before its end. The running extremes keep that true for pieces that are out of order.
    first = np.searchsorted(np.maximum.accumulate(n[:, 1]), p[:, 0], side="right")
    last = np.searchsorted(np.minimum.accumulate(n[::-1, 0])[::-1], p[:, 1], side="left")
    counts = np.maximum(last - first, 0)
    row, column = np.repeat(np.arange(n_positions), counts), expand(first, counts)
    shared = np.minimum(p[row, 1], n[column, 1]) - np.maximum(p[row, 0], n[column, 0])
    keep = shared > 0
    row, column, shared = row[keep], column[keep], shared[keep]
    total = np.bincount(row, weights=shared, minlength=n_positions)
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_positions))])
    return Overlaps(start, column, (shared / total[row]).astype(np.float32), n_pieces)


def identity(count: int) -> Overlaps:
    """Return the matrix of positions that are the pieces themselves."""
    every = np.arange(count)
    return Overlaps(np.arange(count + 1), every, np.ones(count, np.float32), count)


@lru_cache(maxsize=1 << 16)
def word_spans(text: str) -> np.ndarray:
    """Return words as spans, int32 [W, 2]: runs without white space, less the punctuation and symbols at their ends.

    A Chinese or Japanese character is a word by itself. A Thai sentence without spaces is one word. Punctuation and
    symbols alone are no word. The array is shared between calls and read-only.
    """
    words: list[tuple[int, int]] = []
    for run in _RUN.finditer(text):
        begin = run.start()
        for character in _CHARACTER_SCRIPTS.finditer(text, run.start(), run.end()):
            _add_word(words, text, begin, character.start())
            words.append(character.span())
            begin = character.end()
        _add_word(words, text, begin, run.end())
    spans = np.array(words, np.int32).reshape(-1, 2)
    spans.setflags(write=False)
    return spans


def _add_word(words: list[tuple[int, int]], text: str, begin: int, end: int) -> None:
    while begin < end and unicodedata.category(text[begin])[0] in "PSC":
        begin += 1
    while begin < end and unicodedata.category(text[end - 1])[0] in "PSC":
        end -= 1
    if begin < end:
        words.append((begin, end))


def pack(spans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return spans int32 [Σn, 2] and their numbers int64 [B] of a list of spans int [n, 2], one for each utterance."""
    lengths = np.array([len(s) for s in spans], np.int64)
    empty = np.zeros((0, 2), np.int32)
    return np.concatenate([empty, *(np.asarray(s, np.int32).reshape(-1, 2) for s in spans)]), lengths

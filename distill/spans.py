"""Character spans: from the pieces of one tokeniser to the positions of another.

Spans [begin, end) count Unicode code points of the raw transcript. Whatever cuts the same text (teacher
tokens, words, ASR units) is thereby comparable, so no pair of tokenisers needs code of its own, nor do
scripts without spaces.

Invariant: every row of an `Overlaps` sums to 1, or is empty and `covered` says so; nothing is divided by
zero.
Exercised by: pytest tests/distill/test_spans.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Scripts written without spaces, whose characters are words or syllables: each character is a word.
_CHARACTER_SCRIPTS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_RUN = re.compile(r"\S+")


@dataclass(frozen=True)
class Overlaps:
    """A sparse row-stochastic matrix [P, N]: how much of position p lies under piece n, by characters.

    Row p holds the entries `start[p] : start[p + 1]` of `column` (int64) and `weight` (float32).
    """

    start: np.ndarray
    column: np.ndarray
    weight: np.ndarray
    columns: int

    @property
    def rows(self) -> int:
        return len(self.start) - 1

    @property
    def covered(self) -> np.ndarray:
        """bool [P]: positions that at least one piece overlaps."""
        return self.start[1:] > self.start[:-1]

    @property
    def row(self) -> np.ndarray:
        """int64 [E]: the row of every entry."""
        return np.repeat(np.arange(self.rows), np.diff(self.start))

    def select(self, rows: np.ndarray) -> Overlaps:
        """The matrix of those rows alone, in that order; rows int64 [M]."""
        counts = np.diff(self.start)[rows]
        entries = expand(self.start[rows], counts)
        start = np.concatenate([[0], np.cumsum(counts)])
        return Overlaps(start, self.column[entries], self.weight[entries], self.columns)

    def pool(self, values: np.ndarray) -> np.ndarray:
        """Weighted means of `values` float [N, D] -> float32 [P, D]; rows that nothing covers are 0."""
        out = np.zeros((self.rows, values.shape[1]), np.float32)
        counts = np.diff(self.start)
        # The first entry of every row, then the second of those that have one, …: most rows have one or two
        for k in range(int(counts.max(initial=0))):
            rows = np.flatnonzero(counts > k)
            entry = self.start[rows] + k
            out[rows] += values[self.column[entry]].astype(np.float32, copy=False) * self.weight[entry, None]
        return out

    def dense(self) -> np.ndarray:
        """float32 [P, N]; for tests and small matrices."""
        out = np.zeros((self.rows, self.columns), np.float32)
        np.add.at(out, (self.row, self.column), self.weight)
        return out

    def padded(self, row_lengths: np.ndarray, column_lengths: np.ndarray) -> np.ndarray:
        """The blocks on the diagonal, one an utterance: float32 [B, max rows, max columns], padded with 0."""
        shape = (len(row_lengths), int(row_lengths.max(initial=0)), int(column_lengths.max(initial=0)))
        out = np.zeros(shape, np.float32)
        row, (batch_of, row_in), (_, column_in) = self.row, places(row_lengths), places(column_lengths)
        out[batch_of[row], row_in[row], column_in[self.column]] = self.weight
        return out


def expand(start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [Σcounts]: start[0], start[0] + 1, … counts[0] times, then the same for start[1], …"""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(start - (ends - counts), counts)


def places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of Σlengths packed items sits: (utterance int64 [Σ], index inside it int64 [Σ])."""
    batch = np.repeat(np.arange(len(lengths)), lengths)
    return batch, expand(np.zeros(len(lengths), np.int64), lengths)


def overlaps(
    positions: np.ndarray, position_lengths: np.ndarray, pieces: np.ndarray, piece_lengths: np.ndarray
) -> Overlaps:
    """Overlap in characters of packed positions with packed pieces of the same B utterances, rows normalised.

    positions int [ΣP, 2] and pieces int [ΣN, 2] are spans; the lengths int [B] say whose they are. Pieces of
    one utterance may share characters (the bytes of one emoji do) and may be empty (a piece that stands for
    no character overlaps nothing). They need not be sorted, but are read fastest when they are.
    """
    n_positions, n_pieces = len(positions), len(pieces)
    if not n_positions or not n_pieces:
        empty = np.zeros(0, np.int64)
        return Overlaps(np.zeros(n_positions + 1, np.int64), empty, empty.astype(np.float32), n_pieces)
    batch = len(position_lengths)
    position_of, piece_of = (
        np.repeat(np.arange(batch), position_lengths),
        np.repeat(np.arange(batch), piece_lengths),
    )
    # All utterances on one axis of characters, each in its own stretch: one search serves the whole batch.
    stretch = np.zeros(batch, np.int64)
    np.maximum.at(stretch, position_of, positions[:, 1])
    np.maximum.at(stretch, piece_of, pieces[:, 1])
    origin = np.concatenate([[0], np.cumsum(stretch)[:-1]])
    p = positions.astype(np.int64) + origin[position_of][:, None]
    n = pieces.astype(np.int64) + origin[piece_of][:, None]
    # The pieces that may overlap a position are a run: from the first whose end, and to the last whose
    # beginning, does not rule it out. The running extremes keep that true for pieces that are out of order.
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
    """Positions that are the pieces themselves."""
    every = np.arange(count)
    return Overlaps(np.arange(count + 1), every, np.ones(count, np.float32), count)


@lru_cache(maxsize=1 << 16)
def word_spans(text: str) -> np.ndarray:
    """Words as spans, int32 [W, 2]: runs without white space, less the punctuation and symbols at their ends.

    A Chinese or Japanese character is a word by itself; a Thai sentence without spaces is one word. What is
    only punctuation or symbols is nobody's word. The array is shared between calls and read-only.
    """
    found: list[tuple[int, int]] = []
    for run in _RUN.finditer(text):
        begin = run.start()
        for character in _CHARACTER_SCRIPTS.finditer(text, run.start(), run.end()):
            _add_word(found, text, begin, character.start())
            found.append(character.span())
            begin = character.end()
        _add_word(found, text, begin, run.end())
    spans = np.array(found, np.int32).reshape(-1, 2)
    spans.setflags(write=False)
    return spans


def _add_word(found: list[tuple[int, int]], text: str, begin: int, end: int) -> None:
    while begin < end and unicodedata.category(text[begin])[0] in "PSC":
        begin += 1
    while begin < end and unicodedata.category(text[end - 1])[0] in "PSC":
        end -= 1
    if begin < end:
        found.append((begin, end))


def pack(spans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A list of spans int [n, 2], one an utterance -> (packed int32 [Σn, 2], lengths int64 [B])."""
    lengths = np.array([len(s) for s in spans], np.int64)
    empty = np.zeros((0, 2), np.int32)
    return np.concatenate([empty, *(np.asarray(s, np.int32).reshape(-1, 2) for s in spans)]), lengths

"""Word and character error rates with bootstrap intervals.

Invariant: the rate is errors over reference words of the whole set; the interval resamples utterances with a fixed
seed, so the same hypotheses give the same figures. Exercised by `stillhouse score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from .hypotheses import read_hypotheses

__all__ = ["Rate", "Score", "counts", "rate", "read_hypotheses", "resampled", "score"]


@dataclass(frozen=True)
class Rate:
    """Errors over reference tokens; `low` and `high` bound the 95 % bootstrap interval over utterances."""

    rate: float
    low: float
    high: float
    substitutions: int
    deletions: int
    insertions: int
    reference: int


@dataclass(frozen=True)
class Score:
    utterances: int
    wer: Rate
    cer: Rate


def counts(references: Sequence[str], hypotheses: Sequence[str], *, characters: bool = False) -> np.ndarray:
    """int64 [utterances, 4]: substitutions, deletions, insertions, reference tokens of each pair."""
    table = np.zeros((len(references), 4), dtype=np.int64)
    process = jiwer.process_characters if characters else jiwer.process_words
    for row, reference, hypothesis in zip(table, references, hypotheses):
        reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
        if not reference:  # jiwer refuses an empty reference; all that was heard is inserted
            row[2] = len(hypothesis) if characters else len(hypothesis.split())
            continue
        found = process(reference, hypothesis)
        row[:] = (
            found.substitutions,
            found.deletions,
            found.insertions,
            found.substitutions + found.deletions + found.hits,
        )
    return table


def resampled(values: np.ndarray, *, resamples: int = 1_000, seed: int = 0) -> np.ndarray:
    """Sums over bootstrap samples of the rows of values [utterances, K]: float64 [resamples, K].

    The same draws for the same number of utterances and the same seed, so that what is compared is paired.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    found = np.empty((resamples, values.shape[1]))
    for first in range(0, resamples, 64):
        chosen = rng.integers(count, size=(min(64, resamples - first), count))
        weights = np.stack([np.bincount(row, minlength=count) for row in chosen])
        found[first : first + 64] = weights @ values
    return found


def rate(table: np.ndarray, *, resamples: int = 1_000, seed: int = 0) -> Rate:
    """The error rate of a table of `counts`; rates are 0 where there is no reference token."""
    errors, reference = table[:, :3].sum(axis=1), table[:, 3]
    low = high = point = float(errors.sum() / max(1, reference.sum()))
    if len(table) > 1:
        sums = resampled(np.stack([errors, reference], axis=1), resamples=resamples, seed=seed)
        low, high = (float(x) for x in np.quantile(sums[:, 0] / np.maximum(1, sums[:, 1]), [0.025, 0.975]))
    substitutions, deletions, insertions, total = (int(x) for x in table.sum(axis=0))
    return Rate(point, low, high, substitutions, deletions, insertions, total)


def score(references: Sequence[str], hypotheses: Sequence[str]) -> Score:
    return Score(
        len(references),
        rate(counts(references, hypotheses)),
        rate(counts(references, hypotheses, characters=True)),
    )

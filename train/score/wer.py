"""Word and character error rates with bootstrap intervals.

Guarantees: a rate is the errors over the reference words of the whole set. The interval resamples utterances with a
fixed seed, so the same hypotheses give the same figures.
Try: `stillhouse score HYP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np


@dataclass(frozen=True)
class Rate:
    """Errors over reference tokens. `low` and `high` bound the 95 % bootstrap interval over utterances."""

    rate: float
    low: float
    high: float
    substitutions: int
    deletions: int
    insertions: int
    reference: int


@dataclass(frozen=True)
class Score:
    """Error rates of a set of utterances, by word and by character."""

    utterances: int
    wer: Rate
    cer: Rate


def error_counts(references: Sequence[str], hypotheses: Sequence[str], *, characters: bool = False) -> np.ndarray:
    """Return int64 [utterances, 4]: substitutions, deletions, insertions and reference tokens."""
    table = np.zeros((len(references), 4), dtype=np.int64)
    process = jiwer.process_characters if characters else jiwer.process_words
    for row, reference, hypothesis in zip(table, references, hypotheses):
        reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
        if not reference:  # jiwer refuses an empty reference. All that was recognised is inserted.
            row[2] = len(hypothesis) if characters else len(hypothesis.split())
            continue
        o = process(reference, hypothesis)
        row[:] = o.substitutions, o.deletions, o.insertions, o.substitutions + o.deletions + o.hits
    return table


def bootstrap_sums(values: np.ndarray, *, resamples: int = 1_000, seed: int = 0) -> np.ndarray:
    """Return float64 [resamples, K]: sums of values [utterances, K] over bootstrap samples of the utterances.

    Equal seeds and numbers of utterances give the same draws, so that comparisons are paired.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    sums = np.empty((resamples, values.shape[1]))
    for first in range(0, resamples, 64):
        drawn = rng.integers(count, size=(min(64, resamples - first), count))
        weights = np.stack([np.bincount(row, minlength=count) for row in drawn])
        sums[first : first + 64] = weights @ values
    return sums


def rate(table: np.ndarray, *, resamples: int = 1_000, seed: int = 0) -> Rate:
    """Return the error rate of a table of `error_counts`, which is 0 without reference tokens."""
    errors, reference = table[:, :3].sum(axis=1), table[:, 3]
    low = high = point = float(errors.sum() / max(1, reference.sum()))
    if len(table) > 1:
        sums = bootstrap_sums(np.stack([errors, reference], axis=1), resamples=resamples, seed=seed)
        low, high = (float(x) for x in np.quantile(sums[:, 0] / np.maximum(1, sums[:, 1]), [0.025, 0.975]))
    return Rate(point, low, high, *(int(x) for x in table.sum(axis=0)))


def score(references: Sequence[str], hypotheses: Sequence[str]) -> Score:
    """Return the error rates of hypotheses, each paired with its reference."""
    words, characters = error_counts(references, hypotheses), error_counts(references, hypotheses, characters=True)
    return Score(len(references), rate(words), rate(characters))

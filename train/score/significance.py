"""Test whether two sets of hypotheses of the same utterances differ by more than chance.

Two tests answer the same question. The bootstrap resamples utterances, for both sets alike. In the matched-pairs test,
segments between words that both sets have right are independent trials (Gillick and Cox, ICASSP 1989). NIST's sclite
calls it MAPSSWE.

Guarantees: swapping the sets changes signs and nothing else.
Try: `stillhouse score A --against B`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import CorpusError
from .alignment import INSERTED, RIGHT, AlignedPair, align_words
from .wer import bootstrap_sums, error_counts

GOOD_WORDS = 2  # This many words in a row that both sets have right end a segment.


@dataclass(frozen=True)
class SystemComparison:
    """How the word errors of two sets differ.

    difference: error rate of the first set minus that of the second: below 0 if the first is better.
    low, high: bounds of the 95 % paired bootstrap interval of the difference.
    p_bootstrap, p_matched_pairs: two-sided. The latter is None if fewer than two segments have errors, or if all
        segments differ alike.
    stretches: number of segments with errors.
    better, worse: number of utterances in which the first set has fewer or more errors.
    """

    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_matched_pairs: float | None
    stretches: int
    better: int
    worse: int


def compare_systems(
    references: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    second_references: Sequence[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> SystemComparison:
    """Compare the word errors of two hypotheses of each utterance.

    `second_references`: what the second is compared with, where a reference has alternatives.
    """
    others = references if second_references is None else second_references
    a, b = error_counts(references, first), error_counts(others, second)
    words = np.maximum(a[:, 3].sum(), 1)
    gap = a[:, :3].sum(axis=1) - b[:, :3].sum(axis=1)
    sums = bootstrap_sums(np.stack([gap, a[:, 3]], axis=1), resamples=resamples, seed=seed)
    drawn = sums[:, 0] / np.maximum(1, sums[:, 1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    # One draw is added on either side, because p is never 0 with finitely many draws.
    side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    gaps = [
        x - y
        for ref, other, one, two in zip(references, others, first, second, strict=True)
        for x, y in segments(align_words(ref, one), align_words(other, two), whole=ref != other)
    ]
    return SystemComparison(
        difference=float(gap.sum() / words),
        low=float(low),
        high=float(high),
        p_bootstrap=min(1.0, 2 * (side + 1) / (resamples + 1)),
        p_matched_pairs=_normal_p(np.array(gaps, np.float64)),
        stretches=len(gaps),
        better=int((gap < 0).sum()),
        worse=int((gap > 0).sum()),
    )


def segments(
    first: Sequence[AlignedPair], second: Sequence[AlignedPair], *, whole: bool = False
) -> list[tuple[int, int]]:
    """Return the errors of both sets in each segment of an utterance where one of them has errors.

    `whole`: the utterance is one segment, because the sets have different readings of its reference.

    Raises CorpusError if the alignments have different reference words.
    """
    a, b = _errors_by_word(first), _errors_by_word(second)
    if whole:
        x, y = (sum(inserted + wrong for inserted, wrong in counts) for counts in (a, b))
        return [(x, y)] if x or y else []
    if len(a) != len(b):
        raise CorpusError("the two alignments have different reference words")
    result: list[tuple[int, int]] = []
    x, y, good = 0, 0, 0
    for (inserted_a, wrong_a), (inserted_b, wrong_b) in zip(a, b, strict=True):
        if inserted_a or inserted_b:
            good = 0
        good = 0 if wrong_a or wrong_b else good + 1
        x, y = x + inserted_a + wrong_a, y + inserted_b + wrong_b
        if good >= GOOD_WORDS and (x or y):
            result.append((x, y))
            x, y = 0, 0
    return [*result, (x, y)] if x or y else result


def _errors_by_word(pairs: Sequence[AlignedPair]) -> list[tuple[int, int]]:
    """Return (words inserted before it, 1 if it is wrong) of each reference word, then what is inserted at the end."""
    counts, inserted = [], 0
    for p in pairs:
        if p.kind == INSERTED:
            inserted += 1
        else:
            counts.append((inserted, int(p.kind != RIGHT)))
            inserted = 0
    return [*counts, (inserted, 0)]


def _normal_p(gaps: np.ndarray) -> float | None:
    if len(gaps) < 2 or (spread := gaps.std(ddof=1)) == 0:
        return None
    z = gaps.mean() / (spread / math.sqrt(len(gaps)))
    return math.erfc(abs(z) / math.sqrt(2))


def same_utterances(
    first: Sequence[tuple[str, str, str]], second: Sequence[tuple[str, str, str]], where: object
) -> list[str]:
    """Return the hypotheses of the second set of (id, reference, hypothesis) in the order of the first.

    Raises CorpusError if the sets have different utterances or transcripts.
    """
    others = {id: (ref, hyp) for id, ref, hyp in second}
    expected = "hypotheses of the same utterances"
    if len(first) != len(second) or len(others) != len(second):
        raise CorpusError(f"the file has {len(others)} utterances, not {len(first)}", where=where, expected=expected)
    for id, ref, _ in first:
        if id not in others or others[id][0] != ref:
            problem = "another transcript" if id in others else "no hypothesis"
            raise CorpusError(f"the file has {problem} of {id}", where=where, expected=expected)
    return [others[id][1] for id, _, _ in first]

"""Whether two sets of hypotheses of the same utterances differ by more than chance.

Two tests of the same question. Bootstrap: utterances are drawn anew, for both sets alike. Matched pairs: stretches
between words that both have right are independent trials (Gillick and Cox, ICASSP 1989; the test that NIST's sclite
calls MAPSSWE). Invariant: swapping the sets changes signs and nothing else. Exercised by
`stillhouse score A --against B`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import CorpusError
from .alignment import INSERTED, RIGHT, AlignedPair, aligned
from .wer import counts, resampled

GOOD_WORDS = 2  # so many words that both have right end a stretch


@dataclass(frozen=True)
class SystemComparison:
    """difference: error rate of the first minus that of the second, so below 0 where the first is better.

    low, high: its 95 % paired bootstrap interval; p_bootstrap, p_matched_pairs: two-sided; the latter is None where
    fewer than two stretches have errors or all differ alike. better, worse: utterances.
    """

    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_matched_pairs: float | None
    stretches: int
    better: int
    worse: int


def compare(
    references: Sequence[str], first: Sequence[str], second: Sequence[str], *, resamples: int = 10_000, seed: int = 0
) -> SystemComparison:
    """Compare word errors of two hypotheses of each utterance."""
    a, b = counts(references, first), counts(references, second)
    mine, theirs, words = a[:, :3].sum(axis=1), b[:, :3].sum(axis=1), np.maximum(a[:, 3].sum(), 1)
    gap = mine - theirs
    sums = resampled(np.stack([gap, a[:, 3]], axis=1), resamples=resamples, seed=seed)
    drawn = sums[:, 0] / np.maximum(1, sums[:, 1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    # One more on either side: with finite draws no p is 0.
    side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    gaps = [
        x - y
        for ref, one, two in zip(references, first, second, strict=True)
        for x, y in stretches(aligned(ref, one), aligned(ref, two))
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


def stretches(first: Sequence[AlignedPair], second: Sequence[AlignedPair]) -> list[tuple[int, int]]:
    """Errors of both in every stretch of an utterance where either has some."""
    a, b = _by_word(first), _by_word(second)
    if len(a) != len(b):
        raise CorpusError("the two alignments have other reference words")
    found: list[tuple[int, int]] = []
    current, good = [0, 0], 0
    for x, y in zip(a, b, strict=True):
        # (errors before the word, error of the word); the last item has no word
        if x[0] or y[0]:
            good = 0
            current = [current[0] + x[0], current[1] + y[0]]
        if x[1] or y[1]:
            good = 0
            current = [current[0] + x[1], current[1] + y[1]]
        else:
            good += 1
        if good >= GOOD_WORDS and any(current):
            found.append((current[0], current[1]))
            current = [0, 0]
    if any(current):
        found.append((current[0], current[1]))
    return found


def _by_word(pairs: Sequence[AlignedPair]) -> list[tuple[int, int]]:
    """(words inserted before it, whether it is wrong) of every reference word, and what is inserted at the end."""
    out, inserted = [], 0
    for p in pairs:
        if p.kind == INSERTED:
            inserted += 1
        else:
            out.append((inserted, int(p.kind != RIGHT)))
            inserted = 0
    return [*out, (inserted, 0)]


def _normal_p(gaps: np.ndarray) -> float | None:
    if len(gaps) < 2 or (spread := gaps.std(ddof=1)) == 0:
        return None
    z = gaps.mean() / (spread / math.sqrt(len(gaps)))
    return math.erfc(abs(z) / math.sqrt(2))


def same_utterances(
    first: Sequence[tuple[str, str, str]], second: Sequence[tuple[str, str, str]], where: object
) -> list[str]:
    """The second file's hypotheses in the order of the first; CorpusError unless both have the same transcripts."""
    others = {id: (ref, hyp) for id, ref, hyp in second}
    if len(first) != len(second) or len(others) != len(second):
        raise CorpusError(f"{len(others)} utterances, not {len(first)}", where=where, expected="the same utterances")
    for id, ref, _ in first:
        if id not in others or others[id][0] != ref:
            what = "another transcript" if id in others else "no hypothesis"
            raise CorpusError(f"{what} of {id}", where=where, expected="hypotheses of the same utterances")
    return [others[id][1] for id, _, _ in first]

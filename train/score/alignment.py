"""Align hypotheses with references: which words are right, substituted, deleted or inserted.

Guarantees: an alignment has as many errors as `wer.error_counts` counts.
Try: `stillhouse score HYP --errors 20`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import jiwer

RIGHT, SUBSTITUTED, DELETED, INSERTED = "=", "S", "D", "I"
KINDS = {"equal": RIGHT, "substitute": SUBSTITUTED, "delete": DELETED, "insert": INSERTED}  # as jiwer calls them


@dataclass(frozen=True, slots=True)
class AlignedPair:
    """A column of an alignment. `ref` is empty for an inserted word, `hyp` for a deleted one."""

    kind: str
    ref: str
    hyp: str


@dataclass(frozen=True)
class AlignedUtterance:
    """An utterance with its alignment. wer = errors / number of reference words, which counts as 1 at least."""

    id: str
    pairs: list[AlignedPair]
    errors: int
    wer: float


def align_words(reference: str, hypothesis: str) -> list[AlignedPair]:
    """Return the columns of an alignment with the fewest errors, in order."""
    ref, hyp = reference.split(), hypothesis.split()
    if not ref or not hyp:  # jiwer refuses an empty reference.
        return [AlignedPair(DELETED, w, "") for w in ref] + [AlignedPair(INSERTED, "", w) for w in hyp]
    pairs = []
    for chunk in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0]:
        left, right = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        pairs += [AlignedPair(KINDS[chunk.type], a, b) for a, b in zip_longest(left, right, fillvalue="")]
    return pairs


def align_utterance(id: str, reference: str, hypothesis: str) -> AlignedUtterance:
    """Return the alignment of one utterance, and its errors."""
    pairs = align_words(reference, hypothesis)
    errors = sum(p.kind != RIGHT for p in pairs)
    return AlignedUtterance(id, pairs, errors, errors / max(1, len(reference.split())))


def frequent_errors(alignments: Iterable[Sequence[AlignedPair]], most: int = 20) -> dict[str, list[tuple[str, int]]]:
    """Return {kind: [("ref → hyp", count)]}, the most frequent errors first, equally frequent ones by alphabet."""
    counters: dict[str, Counter[str]] = {SUBSTITUTED: Counter(), DELETED: Counter(), INSERTED: Counter()}
    for p in chain.from_iterable(alignments):
        if p.kind != RIGHT:
            counters[p.kind][f"{p.ref} → {p.hyp}" if p.kind == SUBSTITUTED else p.ref or p.hyp] += 1
    return {kind: sorted(c.items(), key=lambda item: (-item[1], item[0]))[:most] for kind, c in counters.items()}


def as_text(pairs: Sequence[AlignedPair], width: int = 100) -> str:
    """Return three lines (reference, hypothesis, marks) for each `width` characters. A missing word is a "·"."""
    blocks: list[list[tuple[str, str, str]]] = [[]]
    used = 0
    for p in pairs:
        ref, hyp, mark = p.ref or "·", p.hyp or "·", "" if p.kind == RIGHT else p.kind
        size = max(len(ref), len(hyp))
        if used + size + 1 > width and blocks[-1]:
            blocks.append([])
            used = 0
        blocks[-1].append((ref.ljust(size), hyp.ljust(size), mark.ljust(size)))
        used += size + 1
    lines = [
        f"  {name} " + " ".join(column[k] for column in block).rstrip()
        for block in blocks
        for k, name in enumerate(("ref", "hyp", "   "))
    ]
    return "\n".join(line for line in lines if line.strip())

"""Which words were right, substituted, deleted, inserted: the alignment behind a word error rate.

Invariant: the errors of an alignment are those that `score.counts` counts. Exercised by
`stillhouse score HYP --errors 20`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jiwer

RIGHT, SUBSTITUTED, DELETED, INSERTED = "=", "S", "D", "I"


@dataclass(frozen=True, slots=True)
class AlignedPair:
    """One column of an alignment; ref is "" where a word was inserted, hyp where one was deleted."""

    kind: str
    ref: str
    hyp: str


def aligned(reference: str, hypothesis: str) -> list[AlignedPair]:
    """The columns of one utterance, in order."""
    ref, hyp = reference.split(), hypothesis.split()
    if not ref or not hyp:  # jiwer refuses an empty reference
        return [AlignedPair(DELETED, w, "") for w in ref] + [AlignedPair(INSERTED, "", w) for w in hyp]
    pairs = []
    for chunk in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0]:
        left, right = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "delete":
            pairs += [AlignedPair(DELETED, w, "") for w in left]
        elif chunk.type == "insert":
            pairs += [AlignedPair(INSERTED, "", w) for w in right]
        else:
            kind = RIGHT if chunk.type == "equal" else SUBSTITUTED
            pairs += [AlignedPair(kind, a, b) for a, b in zip(left, right, strict=True)]
    return pairs


def errors(pairs: Iterable[AlignedPair]) -> int:
    return sum(p.kind != RIGHT for p in pairs)


def frequent(alignments: Iterable[Sequence[AlignedPair]], most: int = 20) -> dict[str, list[tuple[str, int]]]:
    """The most frequent errors of each kind, as ("ref → hyp", count); equally frequent ones by alphabet."""
    found: dict[str, Counter[str]] = {SUBSTITUTED: Counter(), DELETED: Counter(), INSERTED: Counter()}
    for pairs in alignments:
        for p in pairs:
            if p.kind != RIGHT:
                found[p.kind][f"{p.ref} → {p.hyp}" if p.kind == SUBSTITUTED else p.ref or p.hyp] += 1
    return {
        kind: sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:most] for kind, counter in found.items()
    }


def as_text(pairs: Sequence[AlignedPair], width: int = 100) -> str:
    """Three lines (reference, hypothesis, marks) as often as the width asks for; "·" stands for no word."""
    columns = []
    for p in pairs:
        ref, hyp, mark = p.ref or "·", p.hyp or "·", "" if p.kind == RIGHT else p.kind
        size = max(len(ref), len(hyp))
        columns.append((ref.ljust(size), hyp.ljust(size), mark.ljust(size)))
    blocks: list[list[tuple[str, str, str]]] = [[]]
    used = 0
    for column in columns:
        if used + len(column[0]) + 1 > width and blocks[-1]:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += len(column[0]) + 1
    lines = []
    for block in blocks:
        for name, k in (("ref", 0), ("hyp", 1), ("   ", 2)):
            lines.append(f"  {name} " + " ".join(column[k] for column in block).rstrip())
    return "\n".join(line for line in lines if line.strip())

"""Hypotheses as lines: JSON, NIST's trn and ctm, Kaldi's text.

Invariant: what is written here `stillhouse score` reads back, id and words unchanged; an id that a format cannot
hold is refused before anything is decoded. Exercised by `stillhouse decode --format ctm`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ...data.errors import UsageError
from ..score.hypotheses import NOTHING
from .align import Alignment, Word, ctm_lines
from .decode import Hypothesis, ScoredText
from .stream import StreamResult

FORMATS = ("jsonl", "trn", "ctm", "text")


def check_ids(ids: Iterable[str], kind: str) -> None:
    """UsageError for the first id that lines of this kind cannot hold."""
    if kind == "jsonl":
        return
    for id in ids:
        why = None
        if not id or any(c.isspace() for c in id):
            why = "white space"
        elif kind == "trn" and ("(" in id or ")" in id):
            why = "a parenthesis"
        elif kind == "ctm" and id.startswith(";;"):
            why = ";;, a comment's mark, in front"
        if why:
            raise UsageError(f"the id {id!r} has {why}, which {kind} cannot hold", remedy="use --format jsonl")


def as_lines(found: Hypothesis, kind: str, nbest: int = 1) -> list[str]:
    """One line, in ctm one a word, or a comment where nothing was heard."""
    if kind == "jsonl":
        return [json.dumps(record(found, nbest), ensure_ascii=False)]
    if kind == "trn":
        return [f"{' '.join(found.hyp.split())} ({found.id})".lstrip()]
    if kind == "text":
        return [f"{found.id} {' '.join(found.hyp.split())}".rstrip()]
    lines = list(ctm_lines(Alignment(found.id, 0.0, found.ranked[0].words if found.ranked else [])))
    return lines or [f";; {found.id}{NOTHING}"]


def live_lines(heard: StreamResult, kind: str, name: str, segmented: bool, nbest: int = 1) -> list[str]:
    """Of a sound called `name`. Segments are NAME-0001 and on, except in ctm, whose times count from the beginning."""
    id = f"{name}-{heard.segment + 1:04d}" if segmented and kind != "ctm" else name
    found = heard.as_hypothesis(id)
    if kind != "jsonl":
        return as_lines(found, kind)
    facts: dict[str, Any] = {"id": id, "hyp": heard.hyp, "final": heard.final}
    facts |= {"start_s": round(heard.start_s, 3), "end_s": round(heard.end_s, 3)}
    facts |= {key: value for key, value in record(found, nbest).items() if key not in ("id", "hyp", "ref")}
    return [json.dumps(facts, ensure_ascii=False)]


def record(found: Hypothesis, nbest: int = 1) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": found.id, "hyp": found.hyp, "ref": found.ref}
    if found.ranked:
        facts |= {"score": round(found.ranked[0].score, 4), "words": words(found.ranked[0].words)}
    if nbest > 1:
        facts["nbest"] = [_ranked(r) for r in found.ranked]
    return facts


def words(found: Iterable[Word]) -> list[dict[str, Any]]:
    return [
        {
            "word": w.text,
            "start_s": round(w.start_s, 3),
            "end_s": round(w.end_s, 3),
            "confidence": round(w.confidence, 4),
        }
        for w in found
    ]


def _ranked(r: ScoredText) -> dict[str, Any]:
    scores = {"score": r.score, "acoustic": r.acoustic, "fused": r.fused}
    return {"hyp": r.hyp, **{name: round(value, 4) for name, value in scores.items()}, "words": words(r.words)}

"""Write hypotheses and alignments: JSON lines, NIST's trn and ctm, Kaldi's text, Praat's TextGrid.

Guarantees: `stillhouse score` reads every hypothesis back, id and words unchanged. `check_ids` refuses an id that a
format cannot hold before anything is decoded.
Try: `stillhouse decode RUN CORPUS FEATURES --format ctm`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...data.errors import UsageError
from ..score.formats import NOTHING
from .align import Alignment
from .decode import Hypothesis
from .emissions import Word
from .stream import StreamResult

GRID_HEAD = 'File type = "ooTextFile"\nObject class = "TextGrid"\n'
FORMATS = ("jsonl", "trn", "ctm", "text")


def check_ids(ids: Iterable[str], kind: str) -> None:
    """Raise UsageError for the first id that lines of a format cannot hold."""
    if kind == "jsonl":
        return
    for id in ids:
        if not id or any(c.isspace() for c in id):
            why = "is empty or has white space"
        elif kind == "trn" and ("(" in id or ")" in id):
            why = "has a parenthesis"
        elif kind == "ctm" and id.startswith(";;"):
            why = "starts with ;;, which marks a comment"
        else:
            continue
        raise UsageError(f"the id {id!r} {why}, so {kind} cannot hold it", remedy="use --format jsonl")


def hypothesis_lines(
    hypothesis: Hypothesis, kind: str, nbest: int = 1, facts: Mapping[str, Any] | None = None
) -> list[str]:
    """Return a hypothesis as lines of a format, without line ends: in ctm one a word, otherwise one.

    JSON holds all of `ranked` if nbest is above 1, no score and no words if it is empty, and `facts` instead of the
    reference, if given.
    """
    id, text = hypothesis.id, " ".join(hypothesis.hyp.split())
    if kind == "trn":
        return [f"{text} ({id})".lstrip()]
    if kind == "text":
        return [f"{id} {text}".rstrip()]
    ranked = hypothesis.ranked
    if kind == "ctm":
        return list(ctm_lines(id, ranked[0].words if ranked else [])) or [f";; {id}{NOTHING}"]
    record = {"id": id, "hyp": hypothesis.hyp, **({"ref": hypothesis.ref} if facts is None else facts)}
    if ranked:
        record |= {"score": round(ranked[0].score, 4), "words": _words(ranked[0].words)}
    if nbest > 1:
        names = ("score", "acoustic", "fused")
        record["nbest"] = [
            {"hyp": t.hyp, **{n: round(getattr(t, n), 4) for n in names}, "words": _words(t.words)} for t in ranked
        ]
    return [json.dumps(record, ensure_ascii=False)]


def stream_lines(result: StreamResult, kind: str, name: str, segmented: bool, nbest: int = 1) -> list[str]:
    """Return a result of the audio called `name` as lines of a format.

    Segments are called NAME-0001, NAME-0002 and so on, except in ctm, whose times count from the start of the audio.
    """
    id = f"{name}-{result.segment + 1:04d}" if segmented and kind != "ctm" else name
    facts = {"final": result.final, "start_s": round(result.start_s, 3), "end_s": round(result.end_s, 3)}
    return hypothesis_lines(result.as_hypothesis(id), kind, nbest, facts)


def ctm_lines(id: str, words: Iterable[Word]) -> Iterator[str]:
    """Yield lines of NIST's CTM: utterance, channel, start, duration, word, confidence.

    Times count from the start of the utterance.
    """
    for word in words:
        length_s = word.end_s - word.start_s
        digits = 2 if length_s >= 0.01 else 5  # more words than frames
        yield f"{id} 1 {word.start_s:.{digits}f} {length_s:.{digits}f} {word.text} {word.confidence:.3f}"


def textgrid(alignment: Alignment) -> str:
    """Return a Praat TextGrid with one tier, `words`. The gaps between words are empty intervals."""
    intervals: list[tuple[float, float, str]] = []
    end_s = 0.0
    for word in alignment.words:
        if word.start_s > end_s:
            intervals.append((end_s, word.start_s, ""))
        intervals.append((word.start_s, word.end_s, word.text.replace('"', '""')))
        end_s = word.end_s
    if end_s < alignment.duration_s or not intervals:
        intervals.append((end_s, alignment.duration_s, ""))
    lines = [
        GRID_HEAD,
        f"xmin = 0\nxmax = {alignment.duration_s:.4f}\ntiers? <exists>\nsize = 1\nitem []:\n    item [1]:",
        '        class = "IntervalTier"\n        name = "words"\n        xmin = 0',
        f"        xmax = {alignment.duration_s:.4f}\n        intervals: size = {len(intervals)}",
    ]
    for number, (begin, end, text) in enumerate(intervals, 1):
        lines.append(f"        intervals [{number}]:\n            xmin = {begin:.4f}")
        lines.append(f'            xmax = {end:.4f}\n            text = "{text}"')
    return "\n".join(lines) + "\n"


def is_textgrid(head: bytes) -> bool:
    """Return whether a file begins as `textgrid` begins it. Praat would write spaces at the ends of lines."""
    pattern = rf"{re.escape(GRID_HEAD)}\nxmin = 0\nxmax = [0-9.]+\n"
    return re.match(pattern, head.decode("utf-8", "replace")) is not None


def _words(words: Iterable[Word]) -> list[dict[str, Any]]:
    digits = {"start_s": 3, "end_s": 3, "confidence": 4}
    return [{"word": w.text, **{key: round(getattr(w, key), n) for key, n in digits.items()}} for w in words]

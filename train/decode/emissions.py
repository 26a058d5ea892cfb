"""What a decoder found in an utterance: its units, when each was emitted, how sure the model was.

Invariant: units, frames and probabilities are of one length, and frames never run backwards. Everything that is
written about a hypothesis (text, word times, confidence) follows from them and the vocabulary.
Exercised by `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...data.text import SPACE_MARK
from ...data.units import UNKNOWN, UNKNOWN_TEXT, Units
from .align import Word, words_of


@dataclass(frozen=True)
class Emissions:
    """units [U]; frames [U], the encoder frame of each emission; sure [U], P(unit | the frame emits a unit).

    acoustic: log-probability by the transducer (of the path when greedy, of the units over all alignments in a beam);
    fused: what a language model and other terms added. A hypothesis is ranked by their sum.
    """

    units: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)
    acoustic: float = 0.0
    fused: float = 0.0

    @property
    def score(self) -> float:
        return self.acoustic + self.fused


def text_and_spans(units: Units, ids: Sequence[int]) -> tuple[str, np.ndarray]:
    """The text of some units as `Units.decode` gives it, and int64 [U, 2]: the characters of each."""
    ends, parts = [0], []
    for k in ids:
        part = "" if k == 0 else UNKNOWN_TEXT if k == UNKNOWN else units.pieces[k].replace(SPACE_MARK, " ")
        parts.append(part)
        ends.append(ends[-1] + len(part))
    whole = "".join(parts)
    text = units.decode(ids)
    spans = np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64).reshape(-1, 2)
    return text, np.maximum(spans - (len(whole) - len(text)), 0)


def timed_words(units: Units, found: Emissions, frame_s: float, duration_s: float) -> tuple[str, list[Word]]:
    """The text and its words with times in steps of an encoder frame; a word is as sure as all its units together."""
    text, spans = text_and_spans(units, found.units)
    frames, sure = np.array(found.frames, np.int64), np.array(found.sure, np.float64)
    return text, words_of(text, spans, frames, sure, frame_s, duration_s, together=np.prod)

"""What a search returns for an utterance: units, their frames and confidences, and the words that they spell.

Guarantees: units, frames and confidences have one length, and frames never decrease.
Try: `stillhouse decode RUN CORPUS FEATURES --split test`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...data.text import SPACE_MARK
from ...data.units import UNKNOWN, UNKNOWN_TEXT, Units
from .times import FRAME_S, word_times


@dataclass(frozen=True)
class Emissions:
    """The units of one hypothesis.

    units: [U] unit ids.
    frames: [U] encoder frame in which each unit was emitted.
    confidence: [U] P(unit | the frame emits a unit).
    acoustic: log-probability by the transducer: of the greedy path, or in a beam of all alignments of the units.
    fused: what the language model and other terms added. The score ranks hypotheses.
    """

    units: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    acoustic: float = 0.0
    fused: float = 0.0

    @property
    def score(self) -> float:
        return self.acoustic + self.fused


@dataclass(frozen=True)
class Word:
    """A word with its times.

    In an alignment, its confidence is the mean occupancy of its units on their frames. In a hypothesis, it is the
    product of P(unit | the frame emits a unit) over its units.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float


def text_and_spans(units: Units, ids: Sequence[int]) -> tuple[str, np.ndarray]:
    """Return the text of some units, as `Units.decode` does, and int64 [U, 2]: the characters of each unit."""
    parts = ["" if k == 0 else UNKNOWN_TEXT if k == UNKNOWN else units.pieces[k].replace(SPACE_MARK, " ") for k in ids]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    text = units.decode(ids)
    return text, np.maximum(np.stack([ends[:-1], ends[1:]], axis=1) - (ends[-1] - len(text)), 0)


def timed_words(
    units: Units, emissions: Emissions, subsampling: float, loud: np.ndarray, delay_s: float = 0.0
) -> tuple[str, list[Word]]:
    """Return the text of a hypothesis and its words, with times by `words_of`.

    An encoder frame lasts as long as `subsampling` frames of the loudness.
    """
    text, spans = text_and_spans(units, emissions.units)
    frames, confidence = np.array(emissions.frames, np.float64), np.array(emissions.confidence, np.float64)
    return text, words_of(text, spans, frames * subsampling, confidence, loud, delay_s, combine=np.prod)


def words_of(
    text: str,
    spans: np.ndarray,
    frames: np.ndarray,
    confidence: np.ndarray,
    loud: np.ndarray,
    delay_s: float = 0.0,
    combine: Callable[[np.ndarray], Any] = np.mean,
) -> list[Word]:
    """Return the words of a text with times by `word_times`, in an utterance of loudness [F].

    Unit u has the characters spans [U, 2] of `text`, is emitted in the feature frame frames [U], delay_s after its
    sound, and has confidence [U], of which `combine` makes a word's. A word without units, because their transform
    drops its characters, has no time and is left out.
    """
    found = words_and_units(text, spans)
    first, last = (np.array([frames[own[end]] for _, own in found]) for end in (0, -1))
    times = word_times(first, last, loud, delay_s / FRAME_S) * FRAME_S
    return [
        Word(word, start_s, end_s, float(combine(confidence[own])))
        for (word, own), (start_s, end_s) in zip(found, times.tolist())
    ]


def words_and_units(text: str, spans: np.ndarray) -> list[tuple[str, list[int]]]:
    """Return the words of a text, each with the units, of characters spans [U, 2], that begin in it. None has none."""
    visible = []  # (first character that is not white space, unit)
    for unit, (begin, end) in enumerate(spans.tolist()):
        if shown := text[begin:end].lstrip():
            visible.append((begin + len(text[begin:end]) - len(shown), unit))
    starts = [start for start, _ in visible]
    found = []
    for match in re.finditer(r"\S+", text):
        own = [unit for _, unit in visible[bisect_left(starts, match.start()) : bisect_left(starts, match.end())]]
        if own:
            found.append((match.group(), own))
    return found

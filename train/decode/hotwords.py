"""Hotwords: phrases that a beam search prefers, as a trie of units with failure links (Aho and Corasick 1975).

The scores are those of sherpa-onnx. Each unit that continues a phrase adds the phrase's score. A hypothesis that leaves
a phrase before its end, or ends inside it, gives the scores back. After the last unit of a phrase they are kept, and
the match starts again. Of two phrases that end at the same unit, the longer one counts. A phrase that holds another one
therefore ends where the other one does.

A phrase begins at the start of a word. Characters have the space as a unit, so that it is the first one of a phrase, as
in sherpa-onnx with `modeling_unit="bpe"`. The start of an utterance counts as a space.

Guarantees: over a whole hypothesis, its end included, the sum is that of the phrases that ended in it.
Try: `stillhouse decode RUN CORPUS FEATURES --beam 8 --hotwords hotwords.txt`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.errors import CorpusError, first_few
from ...data.files.lines import scan_lines
from ...data.text import SPACE_MARK
from ...data.units import BLANK, UNKNOWN, Units

SCORE = 1.5  # of a unit, as in sherpa-onnx


@dataclass(frozen=True)
class Phrase:
    """A line of a file of hotwords. `score` is that of each unit, a natural logarithm."""

    text: str
    units: tuple[int, ...]
    score: float
    line: int


def read_hotwords(path: Path, units: Units, score: float = SCORE) -> list[Phrase]:
    """Read a file with one phrase a line. ` :SCORE` behind a phrase replaces `score`.

    Phrases are spelled as transcripts are, by the transform of the units, with a space in front if spaces are units.
    They have no spaces if the units have none. Raises CorpusError, which names file and line, if a score is not a
    positive number, if a line has a comment, if the units cannot write a phrase, or if there is none.
    """
    phrases: list[Phrase] = []
    unwritten: list[Phrase] = []
    for number, line in scan_lines(path):
        if isinstance(line, CorpusError):
            raise line
        where, words = f"{path}:{number}", line.split()
        own = score
        if words[-1].startswith(":"):
            own = _score(words.pop()[1:], where)
        if not words:
            raise CorpusError("a score without a phrase", where=where, expected="PHRASE :SCORE")
        if what := _no_word(words, units):
            raise CorpusError(what, where=where, expected="PHRASE :SCORE")
        text = " ".join(words)
        phrase = Phrase(text, _spelled(text, units), own, number)
        (unwritten if UNKNOWN in phrase.units or not phrase.units else phrases).append(phrase)
    if unwritten:
        raise _cannot_write(path, unwritten, units)
    if not phrases:
        raise CorpusError("the file holds no phrase", where=path, expected="one phrase a line, with or without :SCORE")
    return phrases


def _no_word(words: list[str], units: Units) -> str | None:
    """Return what is wrong with the words of a phrase, which a transform without punctuation would hide."""
    for word in words:
        if word.startswith(":"):
            return f"{word!r} is not the last word, but a colon starts the score"
        if word[0] in "#@" and not any(word[0] in piece for piece in units.pieces):
            return f"{word!r} is no word, and a file of hotwords has no comments, thresholds or names of phrases"
    if re.fullmatch(r".*[^\d:]:\d*\.?\d+", words[-1]):
        return f"{words[-1]!r} has no space in front of its score"
    return None


def _score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise CorpusError(f"the score is {text!r}", where=where, expected="a positive number, such as :2.5")
    return value


def _spelled(text: str, units: Units) -> tuple[int, ...]:
    space = space_unit(units)
    if space is None and units.kind == "characters":
        text = text.replace(" ", "")
    ids = units.encode(text).ids.tolist()
    return (*([space] if ids and space is not None else []), *ids)


def space_unit(units: Units) -> int | None:
    """Return the unit that stands between words, if the units are characters that have one."""
    return units.pieces.index(SPACE_MARK) if units.kind == "characters" and SPACE_MARK in units.pieces else None


def _cannot_write(path: Path, phrases: list[Phrase], units: Units) -> CorpusError:
    """Return the error of phrases with unknown symbols, or of which the transform leaves nothing."""
    phrase = phrases[0]
    encoded = units.encode(phrase.text)
    unknown = [phrase.text[begin:end] for begin, end in encoded.spans[encoded.ids == UNKNOWN].tolist()]
    why = f"they have no unit for {first_few(list(dict.fromkeys(map(repr, unknown))))}"
    if not unknown:
        why = f"their transform ({units.transform}) leaves nothing of it"
    what = f"the model's units cannot write {phrase.text!r}: {why}"
    if len(phrases) > 1:
        lines = first_few([str(other.line) for other in phrases[1:]])
        what += f". It is the same with line{'s' * (len(phrases) > 2)} {lines}"
    remedy = "delete the line, or spell it as the transcripts of the training do"
    for letters, other in (("capital", phrase.text.upper()), ("small", phrase.text.lower())):
        if unknown and UNKNOWN not in units.encode(other).ids:
            remedy = f"write it in {letters} letters, as the units are: {other}"
    return CorpusError(what, where=f"{path}:{phrase.line}", remedy=remedy)


class Hotwords:
    """A Fusion (see beam.py) that adds the scores of phrases. States are nodes of the trie, and 0 is its root.

    Phrases with the same first units share them, with the largest of their scores. `size` is the number of units. The
    start of an utterance counts as the unit `space`, if there is one.
    """

    def __init__(self, phrases: Sequence[Phrase], size: int, space: int | None = None) -> None:
        self._children: list[dict[int, int]] = [{}]
        gain, ending = [0.0], [False]
        for phrase in phrases:
            node = 0
            for unit in phrase.units:
                if unit not in self._children[node]:
                    self._children[node][unit] = len(self._children)
                    self._children.append({})
                    gain.append(0.0)
                    ending.append(False)
                node = self._children[node][unit]
                gain[node] = max(gain[node], phrase.score)
            ending[node] = True
        # The scores up to a node, the longest end of its units that is another node, and where a match goes on.
        self._scores, self._fails = [0.0] * len(gain), [0] * len(gain)
        self._after: list[tuple[float, int]] = [(0.0, 0)] * len(gain)  # (score that a node leads to, state)
        ended = [-1] * len(gain)  # the longest phrase that ends in a node
        queue = [0]
        for node in queue:
            for unit, child in self._children[node].items():
                self._scores[child] = self._scores[node] + gain[child]
                self._fails[child] = fail = self._next(self._fails[node], unit) if node else 0
                ended[child] = child if ending[child] else ended[fail]
                done = ended[child] >= 0
                self._after[child] = (self._scores[ended[child]], 0) if done else (self._scores[child], child)
                queue.append(child)
        self._root = np.zeros(size)
        for unit, child in self._children[0].items():
            self._root[unit] = self._after[child][0]
        self.start = 0
        if space is not None and space in self._children[0]:
            # One node more, with the ends of the space, and without its score.
            self.start = len(self._children)
            self._children.append({})
            self._scores.append(0.0)
            self._fails.append(self._children[0][space])
        # Phrases that end before their last unit, because they hold another one.
        self.cut_short = [p for p in phrases if not all(self._walk(p.units[:-1]))]

    def row(self, state: int) -> np.ndarray:
        row, chain = self._root.copy(), []
        node = state
        while node:
            chain.append(node)
            node = self._fails[node]
        for node in reversed(chain):
            for unit, child in self._children[node].items():
                row[unit] = self._after[child][0]
        row -= self._scores[state]
        row[BLANK] = 0.0
        return row.astype(np.float32)

    def advance(self, state: int, unit: int) -> int:
        return self._after[self._next(state, unit)][1]

    def final(self, state: int) -> float:
        return -self._scores[state]

    def reset(self) -> None:
        """Do nothing, because the states are those of the trie."""

    def _next(self, node: int, unit: int) -> int:
        """Return the longest end of a node's units and one more that is a node."""
        while node and unit not in self._children[node]:
            node = self._fails[node]
        return self._children[node].get(unit, 0)

    def _walk(self, units: Sequence[int]) -> list[int]:
        """Return the states along some units."""
        states, state = [], 0
        for unit in units:
            state = self.advance(state, unit)
            states.append(state)
        return states

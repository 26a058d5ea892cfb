"""Shallow fusion: what an n-gram model of units, or of words, adds to each unit of a hypothesis.

A model of words scores a word before it is complete. The partial word counts as the likeliest word with that
beginning, by its 1-gram (look-ahead). When the word ends, its own probability in its context replaces the look-ahead.

Guarantees: over a whole hypothesis, its end included, the sum is weight * log P(hypothesis) of the n-gram model, less
the cost of its unknown words.
Try: `stillhouse decode RUN CORPUS FEATURES --beam 8 --lm words.arpa --lm-unit word`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import UsageError
from ...data.text import SPACE_MARK
from ...data.units import BLANK, UNKNOWN, UNKNOWN_TEXT, Units
from .beam import Fusion
from .ngram import NGram

SPACES = (SPACE_MARK, "<space>", "<SPACE>")
CACHED_PREFIXES = 10_000
UNKNOWN_COST = 10.0

Context = tuple[int, ...]


class NumberedStates:
    """What kinds of Fusion (see beam.py) share: the states of a search as small integers."""

    start = 0

    def __init__(self, first: Any) -> None:
        self.first = first
        self.reset()

    def reset(self) -> None:
        self.states: list[Any] = [self.first]
        self.numbers: dict[Any, int] = {self.first: 0}

    def number(self, state: Any) -> int:
        """Return the number of a state, a new one if it is new."""
        if state not in self.numbers:
            self.numbers[state] = len(self.states)
            self.states.append(state)
        return self.numbers[state]


class NGramStates(NumberedStates):
    """What both kinds of n-gram Fusion share."""

    def __init__(self, lm: NGram, weight: float, first: Any) -> None:
        self.lm, self.weight = lm, weight
        super().__init__(first)

    def next_context(self, context: Context, word: int | None) -> Context:
        """Return the context after one more word. After a word that the model cannot know it is empty."""
        word = self.lm.unknown if word is None else word
        return () if word is None else self.lm.shortened((*context, word))


class UnitFusion(NGramStates):
    """A Fusion whose n-grams are of the recogniser's units. A lone ▁ may be written <space>. States: contexts.

    `weight` multiplies all scores. Raises UsageError, which names the model's file `where`, if it has no such unit.
    """

    def __init__(self, lm: NGram, units: Units, weight: float, where: Path | str = "") -> None:
        spellings = (SPACES if piece == SPACE_MARK else (piece,) for piece in units.pieces)
        self.ids = [next((lm.words[name] for name in names if name in lm.words), None) for names in spellings]
        self.ids[BLANK] = self.ids[UNKNOWN] = None
        if not any(id is not None for id in self.ids):
            raise UsageError(
                "none of the recogniser's units is in the language model",
                where=where or None,
                expected=f"n-grams of units such as {', '.join(units.pieces[2:5])}",
                remedy="use --lm-unit word with a model of words",
            )
        self._known = np.array([id is not None for id in self.ids])
        self._columns = np.array([id or 0 for id in self.ids])
        super().__init__(lm, weight, lm.start)

    def row(self, state: int) -> np.ndarray:
        scores = self.lm.row(self.states[state])
        unknown = self.lm.floor if self.lm.unknown is None else scores[self.lm.unknown]
        row = self.weight * np.where(self._known, scores[self._columns], unknown)
        row[BLANK] = 0.0
        return row.astype(np.float32)

    def advance(self, state: int, unit: int) -> int:
        return self.number(self.next_context(self.states[state], self.ids[unit]))

    def final(self, state: int) -> float:
        return self.weight * self.lm.score(self.states[state], self.lm.end) if self.lm.end is not None else 0.0


class WordFusion(NGramStates):
    """A Fusion whose n-grams are of words. States: (context, partial word). The units' transform spells the words.

    `weight` multiplies all scores. An unknown word costs `unknown` beside the model's <unk>, or beside its rarest word.
    That is the probability of all such words together, of which this is one. Raises UsageError, which names the
    model's file `where`, if no word of the model can be spelled with the units.
    """

    def __init__(
        self, lm: NGram, units: Units, weight: float, where: Path | str = "", *, unknown: float = UNKNOWN_COST
    ) -> None:
        super().__init__(lm, weight, (lm.start, ""))
        self.unknown = unknown
        self.spelled = [p.replace(SPACE_MARK, " ") for p in units.pieces]
        self.spelled[BLANK], self.spelled[UNKNOWN] = "", UNKNOWN_TEXT
        self.words: dict[str, int] = {}
        self.prefixes: dict[str, float] = {}  # prefix -> log-probability of the likeliest word with it
        unigrams = lm.tables[0][1]
        special = {lm.begin, lm.end, lm.unknown}
        letters = set("".join(self.spelled[2:]))
        for word, id in lm.words.items():
            text = units.normalise(word).text
            if id in special or not text or not letters.issuperset(text) or " " in text:
                continue
            if text not in self.words or unigrams[id] > unigrams[self.words[text]]:
                self.words[text] = id
            score = float(unigrams[id])
            for k in range(1, len(text) + 1):
                if score > self.prefixes.get(text[:k], -np.inf):
                    self.prefixes[text[:k]] = score
        if not self.words:
            raise UsageError(
                "no word of the language model can be spelled with the recogniser's units",
                where=where or None,
                expected="words of " + " ".join(sorted(letters - {" "})[:12]),
                remedy="use --lm-unit unit with a model of units",
            )
        self.no_word = lm.score((), lm.unknown) - unknown
        # Rows are computed at once for units without a space, and for units with one space, in front.
        self._inside = np.array([" " not in s for s in self.spelled])
        self._begins = np.array([s.startswith(" ") and " " not in s[1:] for s in self.spelled])
        self._begun = np.array([self._lookahead(s[1:]) if b else 0.0 for s, b in zip(self.spelled, self._begins)])
        self._others = np.flatnonzero(~self._inside & ~self._begins).tolist()
        self._rows: dict[str, np.ndarray] = {}

    def row(self, state: int) -> np.ndarray:
        context, partial = self.states[state]
        row = np.where(self._inside, self._longer_prefixes(partial), 0.0)
        row[self._begins] = self._word_score(context, partial) + self._begun[self._begins]
        row -= self._lookahead(partial)
        for unit in self._others:
            row[unit] = self._spell(context, partial, self.spelled[unit])[0]
        row[BLANK] = 0.0
        return (self.weight * row).astype(np.float32)

    def advance(self, state: int, unit: int) -> int:
        context, partial = self.states[state]
        return self.number(self._spell(context, partial, self.spelled[unit])[1:])

    def final(self, state: int) -> float:
        context, partial = self.states[state]
        added, context, _ = self._spell(context, partial, " ")
        return self.weight * (added + (self.lm.score(context, self.lm.end) if self.lm.end is not None else 0.0))

    def _lookahead(self, partial: str) -> float:
        return self.prefixes.get(partial, self.no_word) if partial else 0.0

    def _word_score(self, context: Context, word: str) -> float:
        if not word:
            return 0.0
        id = self.words.get(word)
        return self.lm.score(context, self.lm.unknown) - self.unknown if id is None else self.lm.score(context, id)

    def _longer_prefixes(self, partial: str) -> np.ndarray:
        """Return float64 [V]: the look-ahead of `partial` followed by each unit."""
        if partial not in self._rows:
            if len(self._rows) >= CACHED_PREFIXES:
                self._rows.clear()
            prefixes, no_word = self.prefixes, self.no_word
            self._rows[partial] = np.array([prefixes.get(partial + s, no_word) for s in self.spelled])
        return self._rows[partial]

    def _spell(self, context: Context, partial: str, text: str) -> tuple[float, Context, str]:
        """Return the log-probability that `text` adds, the context after it and the partial word."""
        added = 0.0
        for k, part in enumerate(text.split(" ")):
            if k and partial:
                added += self._word_score(context, partial) - self._lookahead(partial)
                context, partial = self.next_context(context, self.words.get(partial)), ""
            added += self._lookahead(partial + part) - self._lookahead(partial)
            partial += part
        return added, context, partial


class SumFusion(NumberedStates):
    """A Fusion that adds up others. States: one state of each."""

    def __init__(self, parts: Sequence[Fusion]) -> None:
        self.parts = parts
        super().__init__(tuple(part.start for part in parts))

    def reset(self) -> None:
        for part in self.parts:
            part.reset()
        super().reset()

    def row(self, state: int) -> np.ndarray:
        return np.stack([part.row(own) for part, own in zip(self.parts, self.states[state])]).sum(axis=0)

    def advance(self, state: int, unit: int) -> int:
        return self.number(tuple(part.advance(own, unit) for part, own in zip(self.parts, self.states[state])))

    def final(self, state: int) -> float:
        return sum(part.final(own) for part, own in zip(self.parts, self.states[state]))

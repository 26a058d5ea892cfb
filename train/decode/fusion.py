"""Shallow fusion: what an n-gram model of units, or of words, adds to each unit of a hypothesis.

A model of words speaks before a word is whole: the partial word counts as the likeliest word that begins so (by its
1-gram), which is taken back when the word ends and its own probability, in its context, takes the place.

Invariant: what is added over a whole hypothesis, its end included, is weight · log P(hypothesis) of the n-gram model,
less what its unknown words cost.
Exercised by `stillhouse decode RUN CORPUS FEATURES --beam 8 --lm words.arpa --lm-unit word`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...data.errors import UsageError
from ...data.text import SPACE_MARK
from ...data.units import BLANK, UNKNOWN, UNKNOWN_TEXT, Units
from .ngram import NGram

SPACES = (SPACE_MARK, "<space>", "<SPACE>")
CACHED_PREFIXES = 10_000
UNKNOWN_COST = 10.0


class UnitFusion:
    """A model whose words are the recogniser's units; ▁ alone may be written <space>. States: contexts."""

    start = 0

    def __init__(self, lm: NGram, units: Units, weight: float, where: Path | str = "") -> None:
        self.lm, self.weight = lm, weight
        self.ids: list[int | None] = [_unit_id(lm, piece) for piece in units.pieces]
        self.ids[BLANK] = None
        self.ids[UNKNOWN] = None
        if not any(id is not None for id in self.ids):
            raise UsageError(
                "none of the recogniser's units is in the language model",
                where=where or None,
                expected=f"n-grams of units such as {', '.join(units.pieces[2:5])}",
                remedy="a model of words goes with --lm-unit word",
            )
        self._known = np.array([id is not None for id in self.ids])
        self._at = np.array([0 if id is None else id for id in self.ids])
        self.reset()

    def reset(self) -> None:
        self.contexts = [self.lm.start]
        self.numbers = {self.lm.start: 0}

    def row(self, state: int) -> np.ndarray:
        scores = self.lm.row(self.contexts[state])
        unknown = self.lm.floor if self.lm.unknown is None else scores[self.lm.unknown]
        found = self.weight * np.where(self._known, scores[self._at], unknown)
        found[BLANK] = 0.0
        return found.astype(np.float32)

    def advance(self, state: int, unit: int) -> int:
        context = _after(self.lm, self.contexts[state], self.ids[unit])
        if context not in self.numbers:
            self.numbers[context] = len(self.contexts)
            self.contexts.append(context)
        return self.numbers[context]

    def final(self, state: int) -> float:
        return self.weight * self.lm.score(self.contexts[state], self.lm.end) if self.lm.end is not None else 0.0


class WordFusion:
    """A model of words, spelled as the units' transform spells them. States: (context, the word begun).

    `unknown` is what a word that the model does not know costs beside the model's <unk>, or its rarest word: that is
    the probability of all such words, of which this is one.
    """

    start = 0

    def __init__(
        self, lm: NGram, units: Units, weight: float, where: Path | str = "", *, unknown: float = UNKNOWN_COST
    ) -> None:
        self.lm, self.weight, self.unknown = lm, weight, unknown
        self.spelled = [p.replace(SPACE_MARK, " ") for p in units.pieces]
        self.spelled[BLANK], self.spelled[UNKNOWN] = "", UNKNOWN_TEXT
        self.words: dict[str, int] = {}
        self.ahead: dict[str, float] = {}  # prefix -> log-probability of the likeliest word that begins so
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
                if score > self.ahead.get(text[:k], -np.inf):
                    self.ahead[text[:k]] = score
        if not self.words:
            raise UsageError(
                "no word of the language model can be spelled with the recogniser's units",
                where=where or None,
                expected="words of " + " ".join(sorted(letters - {" "})[:12]),
                remedy="a model of units goes with --lm-unit unit",
            )
        self.unseen = lm.score((), lm.unknown) - unknown
        self._plain = np.array([" " not in s for s in self.spelled])
        self._starts = np.array([s.startswith(" ") and " " not in s[1:] for s in self.spelled])
        self._begun = np.array([self._ahead(s[1:]) if b else 0.0 for s, b in zip(self.spelled, self._starts)])
        self._odd = np.flatnonzero(~self._plain & ~self._starts).tolist()
        self._rows: dict[str, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        begin = (self.lm.start, "")
        self.states: list[tuple[tuple[int, ...], str]] = [begin]
        self.numbers = {begin: 0}

    def row(self, state: int) -> np.ndarray:
        context, partial = self.states[state]
        found = np.where(self._plain, self._spelling(partial), 0.0)
        found[self._starts] = self._whole(context, partial) + self._begun[self._starts]
        found -= self._ahead(partial)
        for unit in self._odd:
            found[unit] = self._walk(context, partial, self.spelled[unit])[0]
        found[BLANK] = 0.0
        return (self.weight * found).astype(np.float32)

    def advance(self, state: int, unit: int) -> int:
        _, context, partial = self._walk(*self.states[state], self.spelled[unit])
        reached = context, partial
        if reached not in self.numbers:
            self.numbers[reached] = len(self.states)
            self.states.append(reached)
        return self.numbers[reached]

    def final(self, state: int) -> float:
        added, context, _ = self._walk(*self.states[state], " ")
        return self.weight * (added + (self.lm.score(context, self.lm.end) if self.lm.end is not None else 0.0))

    def _ahead(self, partial: str) -> float:
        return self.ahead.get(partial, self.unseen) if partial else 0.0

    def _whole(self, context: tuple[int, ...], word: str) -> float:
        if not word:
            return 0.0
        id = self.words.get(word)
        return self.lm.score(context, self.lm.unknown) - self.unknown if id is None else self.lm.score(context, id)

    def _spelling(self, partial: str) -> np.ndarray:
        """float64 [V]: what is ahead of `partial` with each unit that has no space."""
        if partial not in self._rows:
            if len(self._rows) >= CACHED_PREFIXES:
                self._rows.clear()
            ahead, unseen = self.ahead, self.unseen
            self._rows[partial] = np.array([ahead.get(partial + s, unseen) for s in self.spelled])
        return self._rows[partial]

    def _walk(self, context: tuple[int, ...], partial: str, text: str) -> tuple[float, tuple[int, ...], str]:
        """(log-probability that `text` adds, the context after it, the word begun)."""
        added = 0.0
        for k, part in enumerate(text.split(" ")):
            if k and partial:
                added += self._whole(context, partial) - self._ahead(partial)
                context, partial = _after(self.lm, context, self.words.get(partial, self.lm.unknown)), ""
            added += self._ahead(partial + part) - self._ahead(partial)
            partial += part
        return added, context, partial


def _unit_id(lm: NGram, piece: str) -> int | None:
    names = SPACES if piece == SPACE_MARK else (piece,)
    return next((lm.words[name] for name in names if name in lm.words), None)


def _after(lm: NGram, context: tuple[int, ...], word: int | None) -> tuple[int, ...]:
    word = lm.unknown if word is None else word
    return () if word is None else lm.shortened((*context, word))

"""Held-out sentences inside training text: whole ones, and those that share their 6-grams with it.

Guarantees: the memory follows the held-out text, not the training text. Case, punctuation and apostrophes do not count.
Try: `stillhouse corpus check corpus.jsonl --no-audio`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..manifest import Utterance
from ..text import APOSTROPHES
from .split import is_held_out

GRAM = 6
SHORTEST = 3  # words. Shorter sentences, such as "Yes, please", are common to all texts.
SHARE = 0.5  # of the 6-grams of a sentence, from which on it counts as part of the training text
BLOCK = 1 << 20  # words of training text that are compared at once
PRIME = np.uint64(0x9E3779B97F4A7C15)
REMEDY = "leave these texts out of the training splits, or accept them with --ignore overlap"
# Thai, Lao, Burmese, Khmer, kana and Han, whose texts have no spaces between words: each character is one.
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])")


class _Compared(dict[int, str]):
    """A table for str.translate: small letters, spaces in the place of punctuation and symbols, and no apostrophes."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        plain = " " if unicodedata.category(char)[0] in "PS" else char.casefold()
        self[code] = "" if char in APOSTROPHES else plain
        return self[code]


_COMPARED = _Compared()


def words_of(text: str) -> list[str]:
    """Return the words of a text as they are compared."""
    plain = text.translate(_COMPARED)
    return (plain if plain.isascii() else _UNSPACED.sub(r" \1 ", plain)).split()


@dataclass
class _Sentence:
    where: str
    u: Utterance
    words: list[str]
    same: str | None = None  # the place of an equal training sentence
    share: float = 0.0  # of its 6-grams that are in the training text
    near: str | None = None  # the place of one of them


@dataclass
class _Grams:
    """The 6-grams of held-out text as hashes, and in which training utterance each is."""

    numbers: dict[str, int] = field(default_factory=dict)  # of the words, from 1
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: in none

    def learn(self, sentences: Iterable[_Sentence]) -> list[np.ndarray]:
        """Take the 6-grams of sentences. Return their rows by sentence."""
        hashed = []
        for s in sentences:
            row = [self.numbers.setdefault(word, len(self.numbers) + 1) for word in s.words]
            hashed.append(_hashes(np.array(row, np.uint64))[1])
        joined = np.concatenate([*hashed, np.zeros(0, np.uint64)])
        self.keys, rows = np.unique(joined, return_inverse=True)
        self.place = np.full(len(self.keys), -1)
        return np.split(rows, np.cumsum([len(h) for h in hashed]))[:-1]

    def see(self, words: Sequence[int], starts: Sequence[int], first: int) -> None:
        """Look for the 6-grams in training text. `words` are numbers, 0 for others, and 0 between utterances.

        Utterance first + k begins at starts[k].
        """
        at, hashes = _hashes(np.array(words, np.uint64))
        row = np.searchsorted(self.keys, hashes)
        row[row == len(self.keys)] = 0
        hit = np.flatnonzero(self.keys[row] == hashes)[::-1]  # so that the first place stays
        new = hit[self.place[row[hit]] < 0]
        self.place[row[new]] = first + np.searchsorted(np.array(starts), at[new], side="right") - 1


def _hashes(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the 6-grams without a 0 begin, and their hashes, uint64 [G]."""
    count = max(0, len(words) - GRAM + 1)
    unknown = np.concatenate([[0], np.cumsum(words == 0)])
    at = np.flatnonzero(unknown[GRAM : GRAM + count] == unknown[:count])
    out = np.zeros(len(at), np.uint64)
    for k in range(GRAM):
        out = (out + words[at + k]) * PRIME
        out ^= out >> np.uint64(29)
    return at, out


def overlap_findings(utterances: Sequence[tuple[str, Utterance]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (kind, where, id, what, remedy) of held-out sentences in training text, given (where, utterance).

    The names of splits say which are held out, see `is_held_out`. All other utterances are training text.
    """
    held = [_Sentence(where, u, words_of(u.text)) for where, u in utterances if is_held_out(u.split)]
    if not held or len(held) == len(utterances):
        return
    grams = _Grams()
    rows = grams.learn(held)
    whole: dict[str, list[_Sentence]] = {}
    for s in held:
        if len(s.words) >= SHORTEST:
            whole.setdefault(" ".join(s.words), []).append(s)
    words: list[int] = []
    starts: list[int] = []
    places: list[str] = []
    number = grams.numbers.get

    def flush() -> None:
        if len(grams.keys):
            grams.see(words, starts, len(places) - len(starts))
        words.clear()
        starts.clear()

    for where, u in utterances:
        if is_held_out(u.split):
            continue
        own = words_of(u.text)
        for s in whole.get(" ".join(own), ()):
            s.same = s.same or f"{u.id} at {where}"
        places.append(where)
        starts.append(len(words))
        words += [number(word, 0) for word in own]
        words.append(0)
        if len(words) >= BLOCK:
            flush()
    flush()
    for s, row in zip(held, rows):
        found = grams.place[row]
        if len(row) and (found >= 0).any():
            s.share, s.near = float((found >= 0).mean()), places[int(found[found >= 0][0])]
    for split in dict.fromkeys(s.u.split for s in held):
        yield from _findings(str(split), [s for s in held if s.u.split == split])


def _findings(split: str, sentences: list[_Sentence]) -> Iterator[tuple[str, str, str, str, str]]:
    same = [s for s in sentences if s.same is not None]
    near = [s for s in sentences if s.same is None and s.share >= SHARE]
    share = f"of the {len(sentences)} sentences of {split}"
    if same:
        what = f"{len(same)} {share} are whole sentences of the training text, for example {_quoted(same[0])}"
        yield "overlap", same[0].where, same[0].u.id, f"{what}, like {same[0].same}", REMEDY
    if near:
        more = "more " if same else ""
        what = f"{len(near)} {more}{share} have half or more of their {GRAM}-grams in the training text, for example"
        yield "overlap", near[0].where, near[0].u.id, f"{what} {_quoted(near[0])}, as at {near[0].near}", REMEDY


def _quoted(s: _Sentence) -> str:
    return repr(" ".join(s.words[:12]) + (" …" if len(s.words) > 12 else ""))

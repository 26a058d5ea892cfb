"""Text transforms that keep, for every character, its place in the raw text.

Guarantees: `source` never runs backwards and never leaves the raw text. A span of a transformed text is therefore a
span of the transcript, in Unicode code points.
Try: `pytest tests/data/test_text.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from .errors import ConfigError

# A step returns a new text and a map. The map has one row for each character of the new text: the range of the old text
# that it came from. None means that both texts have the same length and the map is the identity.
Step = Callable[[str], tuple[str, np.ndarray | None]]

APOSTROPHES = "'\u2019\u02bc\uff07"
# Characters without width or glyph that change no word. U+200C and U+200D do change words, in Persian for example.
INVISIBLE = re.compile("[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
SPACE_MARK = "\u2581"  # the mark of sentencepiece for a space, so that in a transcript it also counts as a space


@dataclass(frozen=True, eq=False)
class MappedText:
    """A transformed text. Row k of `source` is the half-open range of code points of `raw` that became `text[k]`."""

    text: str
    source: np.ndarray  # int32 [len(text), 2]
    raw: str

    def spans(self, ranges: np.ndarray) -> np.ndarray:
        """Return the raw ranges that became ranges of `text`, none of them empty: int [K, 2] -> int32 [K, 2]."""
        ranges = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        return np.stack([self.source[ranges[:, 0], 0], self.source[ranges[:, 1] - 1, 1]], axis=1)


def transform(raw: str, name: str) -> MappedText:
    """Apply the transforms in `name`, with "+" between, from left to right. `NAMES` lists them."""
    text, source = raw, _identity(len(raw))
    for step in _steps(name):
        text, local = step(text)
        if local is None:
            continue
        # An empty local range cannot occur: every step maps a character to the characters that it was made of.
        source = np.stack([source[local[:, 0], 0], source[local[:, 1] - 1, 1]], axis=1).astype(np.int32)
    return MappedText(text, source, raw)


def transformed(raw: str, name: str) -> str:
    """Return the text of `transform` alone, which is faster where no place is needed."""
    for step in _steps(name):
        raw = _SPACE.sub(" ", raw).strip(" ") if step is _squeeze else step(raw)[0]
    return raw


def transform_around(raw: str, name: str, kept: frozenset[str]) -> MappedText:
    """Apply the transforms to the text between the marks of `kept`, which stay as they are, with spaces around."""
    pieces: list[str] = []
    sources = [np.empty((0, 2), np.int32)]
    at = 0
    for match in [*(m for m in MARK.finditer(raw) if m[0] in kept), None]:
        begin, end = match.span() if match else (len(raw), len(raw))
        part = transform(raw[at:begin], name)
        for text, source in ((part.text, part.source + at), (match[0] if match else "", _whole(begin, end))):
            if text and pieces:
                pieces.append(" ")
                last, following = int(sources[-1][-1, 1]), int(source[0, 0])
                sources.append(np.array([[min(last, following - 1), max(last, following)]], np.int32))
            if text:
                pieces.append(text)
                sources.append(source.astype(np.int32))
        at = end
    return MappedText("".join(pieces), np.concatenate(sources), raw)


def _whole(begin: int, end: int) -> np.ndarray:
    """Return the range [begin, end) for each of its characters, because a mark is one unit."""
    return np.full((end - begin, 2), (begin, end), np.int32)


def check_transform(name: str) -> str:
    """Return the same name. Raises ConfigError if it is unknown, so that settings can be checked early."""
    _steps(name)
    return name


def _identity(n: int) -> np.ndarray:
    return _ranges(n) if n > len(_SHORT) else _SHORT[:n]


def _ranges(n: int) -> np.ndarray:
    at = np.arange(n, dtype=np.int32)
    return np.stack([at, at + 1], axis=1)


_SHORT = _ranges(4096)  # All texts of at most this length share it.
_SHORT.flags.writeable = False


@lru_cache(maxsize=64)
def _steps(name: str) -> tuple[Step, ...]:
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in _STEPS:
            expected = "names with + between, out of " + ", ".join(NAMES)
            raise ConfigError(f"unknown text transform {part!r}", where=f"transform {name!r}", expected=expected)
    return tuple(_STEPS[part] for part in names)


def _per_character(whole: Callable[[str], str]) -> Step:
    """A step that maps each character to some characters (lower, upper, casefold)."""

    def step(text: str) -> tuple[str, np.ndarray | None]:
        new = whole(text)
        if len(new) == len(text):  # No character is lost, so each became one.
            return new, None
        # lower() depends on neighbours (the final sigma), but they do not change a length.
        counts = np.array([len(whole(c)) for c in text], dtype=np.int64)
        return new, _identity(len(text))[np.repeat(np.arange(len(text)), counts)]

    return step


class _Punctuation(dict[int, str]):
    """A table for str.translate: punctuation and symbols become a space, and everything else stays."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = " " if unicodedata.category(char)[0] in "PS" else char
        return self[code]


_PUNCTUATION = _Punctuation()
_APOSTROPHE = re.compile(f"[{APOSTROPHES}]")


def _wordlike(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def _no_punct(text: str) -> tuple[str, None]:
    """Punctuation and symbols become spaces. An apostrophe inside a word becomes '."""
    new = text.translate(_PUNCTUATION)
    for match in _APOSTROPHE.finditer(text):
        k = match.start()
        inside = 0 < k < len(text) - 1 and _wordlike(text[k - 1]) and _wordlike(text[k + 1])
        new = new[:k] + ("'" if inside else " ") + new[k + 1 :]
    return new, None


_SPACE = re.compile(f"[\\s{SPACE_MARK}]+")
_NOT_SQUEEZED = re.compile(rf"[^\S ]|{SPACE_MARK}|  |^ | \Z")


def _squeeze(text: str) -> tuple[str, np.ndarray | None]:
    """Runs of white space become one space, and none stays at the ends."""
    if _NOT_SQUEEZED.search(text) is None:
        return text, None
    runs = [m.span() for m in _SPACE.finditer(text)]
    pieces, maps, at = [], [], 0
    ident = _identity(len(text))
    for b, e in [*runs, (len(text), len(text))]:
        pieces.append(text[at:b])
        maps.append(ident[at:b])
        if b > 0 and e < len(text):
            pieces.append(" ")
            maps.append(np.array([[b, e]], np.int32))
        at = e
    return "".join(pieces), np.concatenate(maps)


# How corpora write what is no word: <unk>, [noise], [[cough]], (laughter), ((unclear)), {um}, %hes, ++breath++, !SIL
MARK = re.compile(
    r"<[^<>\s]{1,40}>|\[\[[^\[\]\n]{1,40}\]\]|\[[^\[\]\n]{1,40}\]|\(\([^()\n]{0,80}\)\)|\([^()\s]{1,40}\)"
    r"|\{[^{}\n]{1,40}\}|(?<!\S)%[^\W\d][\w-]*|\+\+[^+\s]{1,40}\+\+|(?<!\S)![A-Z]{2,}(?!\S)|(?<!\S)\*[^*\s]+\*(?!\S)"
)


def _drop_marks(text: str) -> tuple[str, np.ndarray | None]:
    """Marks of noises and the like become spaces."""
    return MARK.sub(lambda match: " " * len(match[0]), text), None


_LONE_I = re.compile(rf"(?<![\w{APOSTROPHES}-])i(?=$|[^\w{APOSTROPHES}-]|[{APOSTROPHES}](?:m|ll|ve|d|s)\b)")

_FIRST = re.compile(r"(?:^|[.!?])[^A-Za-z]*[A-Za-z]")  # up to the first letter of a sentence, in ASCII


def _sentence_case(text: str) -> tuple[str, np.ndarray | None]:
    """An all-upper-case transcript becomes a sentence: first letters and "I" are upper case, the rest lower case.

    A text with any lower-case letter stays as it is.
    """
    plain = text.isascii()
    if text != text.upper() if plain else any(c.islower() for c in text):
        return text, None
    new, local = _lower(text)
    new = _LONE_I.sub("I", new)
    if plain:
        return _FIRST.sub(lambda match: match[0].upper(), new), local
    out, start = [], True
    for char in new:
        upper = char.upper()
        if start and char.isalpha():
            out.append(upper if len(upper) == 1 else char)
            start = False
        else:
            out.append(char)
            start = start or char in ".!?"
    return "".join(out), local


def _normal_form(form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> Step:
    """A Unicode normal form. Characters that compose or decompose together share their range."""
    normal = partial(unicodedata.normalize, form)

    def step(text: str) -> tuple[str, np.ndarray | None]:
        if unicodedata.is_normalized(form, text):
            return text, None

        cuts = [k for k in range(len(text)) if unicodedata.combining(text[k]) == 0 or k == 0]
        pieces: list[str] = []
        maps: list[list[int]] = []
        begin = 0
        for k, cut in enumerate([*cuts[1:], len(text)], start=1):
            following = text[cut : cuts[k + 1] if k + 1 < len(cuts) else len(text)]
            old = text[begin:cut]
            if following and normal(old + following) != normal(old) + normal(following):
                continue  # This starter composes with the one before (Hangul, some Indic vowels).
            new = normal(old)
            pieces.append(new)
            if new == old:
                maps += [[begin + j, begin + j + 1] for j in range(len(old))]
            else:
                maps += [[begin, cut]] * len(new)
            begin = cut
        return "".join(pieces), np.array(maps, np.int32).reshape(-1, 2)

    return step


_lower = _per_character(str.lower)
_STEPS: dict[str, Step] = {
    "none": lambda text: (text, None),
    "lower": _lower,
    "upper": _per_character(str.upper),
    "casefold": _per_character(str.casefold),
    "sentence_case": _sentence_case,
    "no_punct": _no_punct,
    "squeeze": _squeeze,
    "drop_marks": _drop_marks,
    "nfc": _normal_form("NFC"),
    "nfd": _normal_form("NFD"),
    "nfkc": _normal_form("NFKC"),
    "nfkd": _normal_form("NFKD"),
}
NAMES = tuple(_STEPS)

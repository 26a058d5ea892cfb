"""The characters of the raw transcript that each token stands for.

Guarantees: spans never run backwards. Together they cover every character that the tokenizer read, with the marks and
signs that its normaliser joins or removes. A token that is a space added by the tokenizer has an empty span.
Try: `pytest tests/extract/teacher/test_spans.py`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ....data.text import SPACE_MARK, MappedText

Normalise = Callable[[str], str]
_ASCII_VISIBLE = np.array([not chr(c).isspace() for c in range(128)])
_JAMO = range(0x1160, 0x1200)  # Hangul vowels and final consonants compose with what is before them.


def raw_spans(
    offsets: np.ndarray,
    count: np.ndarray,
    mapped: Sequence[MappedText],
    shift: np.ndarray,
    blank: np.ndarray | None = None,
    normalise: Normalise | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Map offsets in tokenised texts to spans in the raw texts: int32 [ΣN, 2], in code points.

    White space at a token's ends is no part of its span. A token of some bytes of a character has its whole span. A
    token of some marks of a letter has the letter with all its marks, if the normaliser changes them.

    Arguments:
        offsets: int64 [ΣN, 2], of all texts together; `count` int [U] of them belong to each text.
        shift: int [U], characters that were put before each text.
        blank: bool [ΣN], tokens that stand for white space. Where the text has none, their spans are empty.
        normalise: what the tokenizer does to a text before it cuts it. None: nothing.

    Returns:
        The spans, and the number of characters of each text that no token stands for, int32 [U].
    """
    size = np.array([len(m.text) for m in mapped], dtype=np.int64)
    last = np.cumsum(size)
    visible = np.concatenate([np.zeros(0, bool), *(_visible(m.text) for m in mapped)])
    if not len(offsets):
        return np.zeros((0, 2), np.int32), _count_unread(visible, np.zeros(len(visible), bool), size)
    low, high = np.repeat(last - size, count), np.repeat(last, count)  # bounds of each token's text
    shift, blank = np.repeat(shift, count), np.zeros(len(low), bool) if blank is None else blank
    begin, end = (np.clip(low + o - shift, low, high) for o in offsets.T)
    where = np.arange(len(visible))
    # following[i]: first visible character at or after i; preceding[i]: one past the last visible one before i
    following = np.minimum.accumulate(np.where(visible, where, len(visible))[::-1])[::-1]
    following = np.append(following, len(visible))
    preceding = np.maximum.accumulate(np.append(0, np.where(visible, where + 1, 0)))
    white = np.append(~visible, False)
    # A space's offset can be empty, and then points behind it.
    behind = blank & (begin >= end) & (begin > low) & white[begin - 1]
    begin = np.where(behind, begin - 1, begin)
    space = blank & (begin < high) & white[begin]
    added = blank & ~space
    end = np.where(space, np.maximum(begin + 1, np.minimum(end, following[begin])), end)
    inner_begin, inner_end = np.minimum(following[begin], high), np.maximum(preceding[end], low)
    solid = ~blank & (inner_begin < inner_end)
    begin, end = np.where(solid, inner_begin, begin), np.where(solid, inner_end, end)
    # An empty offset is a later byte of the character that it points into.
    empty = begin >= end
    begin = np.where(empty & ~added, np.minimum(begin, high - 1), begin)
    end = np.where(empty, begin + 1, end)
    if normalise is not None and not all(m.text.isascii() for m in mapped):
        first, behind_of = _clusters(mapped, normalise)
        begin, end = first[begin], behind_of[end - 1]
    begin, end = np.where(added, np.minimum(begin, high), begin), np.where(added, begin, end)
    unread = visible & ~_covered(begin, end, len(visible))
    if unread.any():
        _take_removed(begin, end, unread, mapped, last, normalise)
        end[added] = begin[added]
    source = np.concatenate([m.source for m in mapped])
    at = np.minimum(begin, high - 1)
    raw = np.stack([source[at, 0], source[np.maximum(end, at + 1) - 1, 1]], axis=1)
    edge = np.where(begin < high, raw[:, 0], raw[:, 1])
    raw[added] = np.stack([edge, edge], axis=1)[added]
    return raw.astype(np.int32), _count_unread(visible, ~unread, size)


def _visible(text: str) -> np.ndarray:
    """bool [len(text)]: which characters are not white space."""
    if text.isascii():
        return _ASCII_VISIBLE[np.frombuffer(text.encode("ascii"), np.uint8)]
    return np.array([not c.isspace() and c != SPACE_MARK for c in text])


def _covered(begin: np.ndarray, end: np.ndarray, size: int) -> np.ndarray:
    """bool [size]: which characters are inside a span."""
    steps = np.bincount(begin, minlength=size + 1) - np.bincount(end, minlength=size + 1)
    return np.cumsum(steps)[:size] > 0


def _count_unread(visible: np.ndarray, read: np.ndarray, size: np.ndarray) -> np.ndarray:
    before = np.append(0, np.cumsum(visible & ~read))
    last = np.cumsum(size)
    return (before[last] - before[last - size]).astype(np.int32)


def _clusters(mapped: Sequence[MappedText], normalise: Normalise) -> tuple[np.ndarray, np.ndarray]:
    """First character and end of what each character is normalised with: itself, or a letter with its marks."""
    # A zero-width space can be white space to the tokenizer, and begins the next word then.
    parts = lru_cache(maxsize=1 << 12)(lambda sign: normalise(f"a{sign}a") == normalise("a a"))
    changes = lru_cache(maxsize=1 << 12)(lambda cluster: normalise(cluster).strip(f" {SPACE_MARK}") != cluster)
    first = np.arange(sum(len(m.text) for m in mapped))
    behind, base = first + 1, 0
    for m in mapped:
        if not m.text.isascii():
            cuts = [k for k, c in enumerate(m.text) if not _joins(c) or k == 0 or m.text[k - 1].isspace() or parts(c)]
            for a, b in zip(cuts, [*cuts[1:], len(m.text)]):
                if b > a + 1 and changes(m.text[a:b]):
                    first[base + a : base + b], behind[base + a : base + b] = base + a, base + b
        base += len(m.text)
    return first, behind


@lru_cache(maxsize=1 << 16)
def _joins(char: str) -> bool:
    """Whether a character belongs to the one before it: a mark, a Hangul vowel or final consonant, a format sign."""
    return unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf") or ord(char) in _JAMO


def _take_removed(
    begin: np.ndarray,
    end: np.ndarray,
    unread: np.ndarray,
    mapped: Sequence[MappedText],
    last: np.ndarray,
    normalise: Normalise | None,
) -> None:
    """Give characters that the normaliser removes to the token before them, or else to the one behind, in place."""

    @lru_cache(maxsize=1 << 12)
    def removed(char: str) -> bool:
        sign = unicodedata.category(char)[0] in "MC"
        return sign or (normalise is not None and not normalise(char).strip(f" {SPACE_MARK}"))

    places = np.flatnonzero(unread)
    texts = np.searchsorted(last, places, side="right").tolist()
    bounds = [(int(last[t]) - len(mapped[t].text), int(last[t])) for t in texts]
    inside = [
        (i, low, high) for i, t, (low, high) in zip(places.tolist(), texts, bounds) if removed(mapped[t].text[i - low])
    ]
    for i, low, _ in inside:
        k = int(np.searchsorted(begin, i)) - 1
        while i > low and k >= 0 and (end[k] == i or begin[k] == end[k]):
            if end[k] == i and begin[k] < i:
                end[k], unread[i] = i + 1, False
            k -= 1
    for i, _, high in reversed(inside):
        if unread[i] and i + 1 < high:
            begin[int(np.searchsorted(begin, i + 1)) : int(np.searchsorted(begin, i + 2))] = i
    unread[[i for i, _, _ in inside]] = False  # by itself between spaces, nothing remains of it

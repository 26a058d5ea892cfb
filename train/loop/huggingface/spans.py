"""The characters of the raw transcript that each label of a Hugging Face tokenizer stands for.

Guarantees: spans lie in the transcript and do not run backwards. Labels of another spelling of the transcript, such as
one in lower case without punctuation, have the spans of the characters that they were made of.
Try: `pytest tests/train/loop/huggingface/test_spans.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from ....data.errors import CorpusError
from ....data.text import SPACE_MARK

_WORDLIKE = "LMN"  # letters, marks and numbers
_FEW_WORDS = 4  # from here on, two spellings of one sentence have a word in common


def unit_spans(tokenizer: Any, labels: Sequence[int], text: str) -> np.ndarray:
    """Return the half-open span of code points of `text` for each label, int32 [U, 2].

    The tokenizer spells the labels, and what they spell is matched with the transcript, so they may come from a
    normalised transcript. A label without a character of its own, such as an unknown token, has the characters that its
    neighbours leave between them.

    Raises:
        CorpusError: the labels share no word with the transcript, though both have several.
    """
    spelled, pieces = _spelled(tokenizer, labels)
    source = _matched(spelled, text)
    spans = np.full((len(labels), 2), -1, np.int32)
    for number, (begin, end) in enumerate(pieces):
        found = [source[k] for k in range(begin, end) if k in source]
        if found:
            spans[number] = found[0][0], found[-1][1]
    _fill(spans, text)
    return spans


def _spelled(tokenizer: Any, labels: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of the labels, and the range of each label in it.

    A range is what a label adds to the text of those before it, because pieces of different tokenizers mark spaces and
    bytes in different ways. Labels that are bytes of one character share its range.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def decode(count: int) -> str:
        ids = [int(label) for label in labels[:count]]
        if backend is not None:
            return backend.decode(ids, skip_special_tokens=True)
        # Tokenizers for CTC would join equal neighbours.
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False, "group_tokens": False}
        return tokenizer.decode(ids, **options)

    whole = decode(len(labels))
    ranges: list[tuple[int, int]] = []
    at = waiting = 0
    for count in range(1, len(labels) + 1):
        now = decode(count)
        behind = next((k for k, (a, b) in enumerate(zip(now, whole)) if a != b), min(len(now), len(whole)))
        ranges.append((at, max(at, behind)))
        if behind > at:
            ranges[-waiting - 1 :] = [(at, behind)] * (waiting + 1)
            at, waiting = behind, 0
        else:  # Some bytes of a character spell a sign that is not in the text of all labels.
            waiting = waiting + 1 if len(now) > behind else 0
    return whole, ranges


def _matched(spelled: str, text: str) -> dict[int, tuple[int, int]]:
    """Return the span in `text` of each character of `spelled` that has one."""
    for keep in (None, _WORDLIKE):
        own, theirs = _signs(spelled, keep), _signs(text, keep)
        if [key for key, _ in own] == [key for key, _ in theirs]:
            return _joined((a, b, b + 1) for (_, a), (_, b) in zip(own, theirs))
    words, spoken = (set(re.findall(r"\w+", t.casefold())) for t in (spelled, text))
    if min(len(words), len(spoken)) >= _FEW_WORDS and not words & spoken:
        raise CorpusError(f"the labels spell {spelled[:60]!r}, but the transcript is {text[:60]!r}")
    own, theirs = _signs(spelled), _signs(text)
    matcher = SequenceMatcher(None, [key for key, _ in own], [key for key, _ in theirs], autojunk=False)
    pairs: list[tuple[int, int, int]] = []
    for what, a, a_end, b, b_end in matcher.get_opcodes():
        if what == "equal":
            pairs += [(own[a + k][1], theirs[b + k][1], theirs[b + k][1] + 1) for k in range(a_end - a)]
        elif what == "replace":
            pairs += [(own[k][1], theirs[b][1], theirs[b_end - 1][1] + 1) for k in range(a, a_end)]
    return _joined(pairs)


def _signs(text: str, keep: str | None = None) -> list[tuple[str, int]]:
    """Return the signs of a text without case, compatibility forms and white space, and the place of each.

    With `keep`, only signs of these categories of Unicode count.
    """
    signs = []
    for place, character in enumerate(text):
        for sign in unicodedata.normalize("NFKD", character.casefold()):
            if not (sign.isspace() or sign == SPACE_MARK) and (keep is None or unicodedata.category(sign)[0] in keep):
                signs.append((sign, place))
    return signs


def _joined(pairs: Iterable[tuple[int, int, int]]) -> dict[int, tuple[int, int]]:
    """Return {a: (begin, end)} of triples, with the widest span of those with one a."""
    spans: dict[int, tuple[int, int]] = {}
    for a, begin, end in pairs:
        first, last = spans.get(a, (begin, end))
        spans[a] = min(first, begin), max(last, end)
    return spans


def _fill(spans: np.ndarray, text: str) -> None:
    """Give labels without a span what is between their neighbours' spans, in place."""
    at = 0
    for number in range(len(spans)):
        if spans[number, 0] < 0:
            known = spans[number:, 0] >= 0
            end = int(spans[number:][known][0, 0]) if known.any() else len(text)
            gap = text[at:end]
            begin = at + len(gap) - len(gap.lstrip())
            spans[number] = (begin, max(begin, at + len(gap.rstrip()))) if gap.strip() else (at, at)
        else:
            at = int(spans[number, 1])

"""Turn transcripts into a teacher's token ids, each with its span in the manifest's raw text.

Guarantees: an utterance is tokenised once, by itself, so every context has the same token axis. The ids equal those
that the tokenizer gives inside running text, with the leading space that byte-BPE expects.
Try: `pytest tests/extract/teacher/test_tokenizer.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ...data.errors import TeacherError
from ...data.text import MappedText, transform

_PROBES = ("the", "a", "of", "and")  # words that any vocabulary can spell
_ASCII_VISIBLE = np.array([not chr(c).isspace() for c in range(128)])


@dataclass(frozen=True)
class Tokens:
    """Token ids of many utterances: ids int32 [ΣN], length int32 [U], span int32 [ΣN, 2] (code points, raw text)."""

    ids: np.ndarray
    length: np.ndarray
    span: np.ndarray


class Tokeniser:
    """A Hugging Face fast tokenizer with the settings that a store records. Raises TeacherError for a slow one.

    `kind` is "encoder" or "decoder". A decoder gets BOS before the text, or EOS if it has no BOS.
    """

    def __init__(self, tokenizer: Any, kind: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            what = f"{type(tokenizer).__name__} does not tell which characters a token came from"
            remedy = "convert it with transformers and save it beside the model"
            raise TeacherError(what, expected="a fast tokenizer (tokenizer.json)", remedy=remedy)
        self._hf = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.leading_space = self._wants_space()
        self.prefix, self.suffix = self._around(kind)
        self.hash = hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self._backend.encode(text, add_special_tokens=special).ids

    def _wants_space(self) -> bool:
        """Whether the first word needs a space before it to get the same ids as in the middle of a text."""

        def repeated(text: str) -> bool:
            ids = self._ids(text)
            return ids == 2 * ids[: len(ids) // 2]

        return sum(repeated(f" {w} {w}") for w in _PROBES) > sum(repeated(f"{w} {w}") for w in _PROBES)

    def _around(self, kind: str) -> tuple[list[int], list[int]]:
        text = " the" if self.leading_space else "the"
        bare, full = self._ids(text), self._ids(text, special=True)
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        prefix, suffix = full[:at], full[at + len(bare) :]
        if kind == "encoder":
            return prefix, suffix
        if not prefix:
            first = self._hf.bos_token_id if self._hf.bos_token_id is not None else self._hf.eos_token_id
            prefix = [] if first is None else [int(first)]
        return prefix, []

    def join_ids(self, join: str) -> list[int]:
        """Return the ids between two utterances of one window."""
        return self._ids(join) if join else []

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the tokenizer's spelling of token ids."""
        return [self._hf.convert_ids_to_tokens(int(i)) or "" for i in ids]

    def encode(self, texts: Sequence[str], transform_name: str) -> Tokens:
        """Tokenise raw transcripts. Raises ConfigError for an unknown transform."""
        ids, spans = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
        lengths = np.zeros(len(texts), dtype=np.int32)
        space = " " if self.leading_space else ""
        for first in range(0, len(texts), 1000):
            mapped = [transform(t, transform_name) for t in texts[first : first + 1000]]
            encodings = self._backend.encode_batch(
                [space + m.text if m.text.strip() else "" for m in mapped], add_special_tokens=False
            )
            of_texts = [e.ids for e in encodings]
            count = lengths[first : first + len(of_texts)]
            count[:] = [len(i) for i in of_texts]
            ids.append(np.fromiter(chain.from_iterable(of_texts), dtype=np.int32))
            numbers = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
            offsets = np.fromiter(numbers, dtype=np.int64).reshape(-1, 2)
            spans.append(raw_spans(offsets, count, mapped, len(space)))
        return Tokens(np.concatenate(ids), lengths, np.concatenate(spans))

    def settings(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        return json.loads(self._backend.to_str())


def raw_spans(offsets: np.ndarray, count: np.ndarray, mapped: Sequence[MappedText], shift: int) -> np.ndarray:
    """Map offsets in tokenised texts to spans in the raw texts: int32 [ΣN, 2], in code points.

    White space at a token's ends is no part of its span. A token of some bytes of a character has its whole span.

    Arguments:
        offsets: int64 [ΣN, 2], of all texts together; `count` int [U] of them belong to each text.
        shift: characters that were put before each text.
    """
    if not len(offsets):
        return np.zeros((0, 2), dtype=np.int32)
    size = np.array([len(m.text) for m in mapped], dtype=np.int64)
    last = np.cumsum(size)
    low, high = np.repeat(last - size, count), np.repeat(last, count)  # bounds of each token's text
    begin = np.clip(low + offsets[:, 0] - shift, low, high)
    end = np.clip(low + offsets[:, 1] - shift, low, high)
    visible = np.concatenate([_visible(m.text) for m in mapped])
    where = np.arange(len(visible))
    # following[i]: first visible character at or after i; preceding[i]: one past the last visible one before i
    following = np.minimum.accumulate(np.where(visible, where, len(visible))[::-1])[::-1]
    following = np.append(following, len(visible))
    preceding = np.maximum.accumulate(np.append(0, np.where(visible, where + 1, 0)))
    inner_begin, inner_end = np.minimum(following[begin], high), np.maximum(preceding[end], low)
    solid = inner_begin < inner_end
    begin, end = np.where(solid, inner_begin, begin), np.where(solid, inner_end, end)
    # An empty offset is a later byte of the character that it points into.
    empty = begin >= end
    begin = np.where(empty, np.minimum(begin, high - 1), begin)
    end = np.where(empty, begin + 1, end)
    source = np.concatenate([m.source for m in mapped])
    return np.stack([source[begin, 0], source[end - 1, 1]], axis=1).astype(np.int32)


def _visible(text: str) -> np.ndarray:
    """bool [len(text)]: which characters are not white space."""
    if text.isascii():
        return _ASCII_VISIBLE[np.frombuffer(text.encode("ascii"), np.uint8)]
    return np.array([not c.isspace() for c in text])

"""Turn transcripts into a teacher's token ids, each with its span in the manifest's raw text.

Guarantees: an utterance is tokenised once, by itself, so every context has the same token axis. The ids equal those
that the tokenizer gives inside running text, with the leading space that byte-BPE expects.
Try: `pytest tests/extract/teacher/test_tokenizer.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ...data.errors import TeacherError
from ...data.text import SPACE_MARK, transform
from .text.judge import MOST_UNKNOWN, NOTED_UNKNOWN, find_unknown
from .text.spaces import writes_spaces
from .text.spans import raw_spans

_PROBES = ("the", "a", "of", "and")  # words that any vocabulary can spell


@dataclass(frozen=True)
class Tokens:
    """Token ids of many utterances: ids int32 [ΣN], length int32 [U], span int32 [ΣN, 2] (code points, raw text).

    `unread` int32 [U] counts the characters of each utterance that no token stands for; None: not counted.
    """

    ids: np.ndarray
    length: np.ndarray
    span: np.ndarray
    unread: np.ndarray | None = None


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
        self.wants_space = self.leading_space = self.space_by_script = self._wants_space()
        self.prefix, self.suffix = self._around(kind)
        unknown = {
            self._hf.unk_token_id,
            self._backend.token_to_id(getattr(self._backend.model, "unk_token", None) or ""),
        }
        self.unknown_ids: set[int] = {int(i) for i in unknown if i is not None}
        parts = f"{self._backend.pre_tokenizer} {self._backend.normalizer} {self._backend.decoder}"
        self._space_marks = {" ", SPACE_MARK, *("Ġ" if "ByteLevel" in parts else "")}
        self._space_ids = set(self._ids(" ")) - self.unknown_ids
        self.hash = hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    def with_space(self, choice: str) -> Tokeniser:
        """Return this tokenizer with "auto", "yes" or "no" for a space before each text.

        "auto" is for vocabularies that spell a first word otherwise than a later one. They get the space, but not
        before a text in a script without spaces between words.
        """
        other = copy.copy(self)
        other.leading_space = choice == "yes" or (choice == "auto" and self.wants_space)
        other.space_by_script = choice == "auto" and self.wants_space
        return other

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
        lengths, unread = np.zeros((2, len(texts)), dtype=np.int32)
        normaliser = self._backend.normalizer
        for first in range(0, len(texts), 1000):
            mapped = [transform(t, transform_name) for t in texts[first : first + 1000]]
            spaces = [" " if self._needs_space(m.text) else "" for m in mapped]
            encodings = self._backend.encode_batch(
                [s + m.text if m.text.strip() else "" for s, m in zip(spaces, mapped)], add_special_tokens=False
            )
            of_texts = [e.ids for e in encodings]
            count = lengths[first : first + len(of_texts)]
            count[:] = [len(i) for i in of_texts]
            ids.append(np.fromiter(chain.from_iterable(of_texts), dtype=np.int32))
            numbers = chain.from_iterable(chain.from_iterable(e.offsets for e in encodings))
            offsets = np.fromiter(numbers, dtype=np.int64).reshape(-1, 2)
            shift, blank = np.array([len(s) for s in spaces]), self._is_blank(ids[-1])
            normalise = None if normaliser is None else normaliser.normalize_str
            span, unread[first : first + len(count)] = raw_spans(offsets, count, mapped, shift, blank, normalise)
            spans.append(span)
        return Tokens(np.concatenate(ids), lengths, np.concatenate(spans), unread)

    def _needs_space(self, text: str) -> bool:
        return self.leading_space and not (self.space_by_script and not writes_spaces(text))

    def _is_blank(self, ids: np.ndarray) -> np.ndarray:
        """bool [len(ids)]: tokens that stand for white space alone."""
        kinds, inverse = np.unique(ids, return_inverse=True)
        marks = self._space_marks
        pieces = self.pieces(kinds.tolist())
        blank = [k in self._space_ids or (p != "" and set(p) <= marks) for k, p in zip(kinds.tolist(), pieces)]
        return np.array(blank, dtype=bool)[inverse]

    def check(self, tokens: Tokens, names: Sequence[str], source: str, rows: int, judge: bool = True) -> list[str]:
        """Return warnings about the tokens of some utterances: a share of unknown pieces that is worth to know.

        Arguments:
            names: the utterances' ids.
            source: the model, for errors.
            rows: rows of the model's input embedding.
            judge: whether a share above a half is an error.

        Raises:
            TeacherError: token ids are beyond the embedding, or most of the text is unknown to the tokenizer.
        """
        self._check_ids(tokens, names, source, rows)
        unread = np.zeros(len(tokens.length), np.int32) if tokens.unread is None else tokens.unread
        unknown = find_unknown(tokens.ids, tokens.length, tokens.span, unread, names, self.unknown_ids)
        if unknown.share > MOST_UNKNOWN and judge:
            remedy = "use a teacher of the corpus's language and script, or --transform lower if the case is the reason"
            raise TeacherError(f"most of the text is unknown: {unknown.text}", where=source, remedy=remedy)
        return [unknown.text] if unknown.share >= NOTED_UNKNOWN else []

    def _check_ids(self, tokens: Tokens, names: Sequence[str], source: str, rows: int) -> None:
        around = [i for i in (*self.prefix, *self.suffix) if i >= rows]
        beyond = np.flatnonzero(tokens.ids >= rows)
        if not around and not len(beyond):
            return
        token, where = around[0] if around else int(tokens.ids[beyond[0]]), "around each text"
        if not around:
            where = f"in {names[int(np.searchsorted(np.cumsum(tokens.length), beyond[0], side='right'))]}"
        what = (
            f"the token {self.pieces([token])[0]!r} ({where}) has the id {token:,}, and the embedding has {rows:,} rows"
        )
        remedy = (
            "remove the token from the tokenizer, or resize_token_embeddings, train the new rows and save the model"
        )
        raise TeacherError(what, where=source, expected=f"ids below {rows:,}", remedy=remedy)

    def settings(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        return json.loads(self._backend.to_str())

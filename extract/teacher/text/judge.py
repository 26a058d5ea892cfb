"""Judge a tokenizer: whether it is the model's, and whether its tokens stand for the text of a corpus.

Guarantees: what is reported here is known before anything is written.
Try: `pytest tests/extract/teacher/test_judge.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import TeacherError, first_few

MOST_UNKNOWN = 0.5  # a higher share is an error
NOTED_UNKNOWN = 0.01  # a share from this on is a warning
_LEAST_PIECES = 5  # A vocabulary with fewer pieces beside the special ones spells no language.
_NAMES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_OTHERS = ("*.model", "*.tiktoken", "vocab*", "tokenizer*.json", "*.vocab", "*bpe*")
_SAVE = "save the model's own tokenizer there: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"


def require_tokenizer(folder: Path) -> None:
    """Raise TeacherError if a model's folder has no tokenizer: transformers would make one that knows no word."""
    found = {p.name for pattern in (*_NAMES, *_OTHERS) for p in folder.glob(pattern)}
    if not found - {"tokenizer_config.json"}:
        what = f"this folder has no tokenizer: none of {', '.join(_NAMES)} is there"
        raise TeacherError(what, where=folder, expected="tokenizer.json beside config.json", remedy=_SAVE)


def check_vocabulary(tokenizer: Any, source: str, rows: int) -> None:
    """Raise TeacherError if a tokenizer has no words, or cannot be that of a model with `rows` embeddings."""
    backend = tokenizer.backend_tokenizer
    pieces, own = backend.get_vocab_size(), backend.get_vocab_size(with_added_tokens=False)
    if pieces - len(set(tokenizer.all_special_ids)) < _LEAST_PIECES:
        what = f"its tokenizer has {pieces} pieces, and no words among them"
        raise TeacherError(what, where=source, expected="the tokenizer that the model was trained with", remedy=_SAVE)
    if own > rows or pieces < rows / 2:
        what = (
            f"its tokenizer has {max(pieces, own):,} pieces and its embedding {rows:,} rows, so it is another model's"
        )
        raise TeacherError(what, where=source, expected="the tokenizer that the model was trained with", remedy=_SAVE)


@dataclass(frozen=True)
class Unknown:
    """What a tokenizer could not spell in some utterances."""

    pieces: int  # all pieces
    unknown: int  # those that stand for something that the vocabulary lacks
    unread: int  # characters that no piece stands for
    share: float  # of the text: by pieces or by characters, whichever is higher
    utterances: list[str]  # ids, the one with most of it first

    @property
    def text(self) -> str:
        parts = [f"{self.unknown:,} of {self.pieces:,} pieces are unknown to the tokenizer"] if self.unknown else []
        parts += [f"{self.unread:,} characters are in no piece"] if self.unread else []
        return f"{' and '.join(parts)} ({self.share:.1%} of the text), as in {first_few(self.utterances, 3)}"


def find_unknown(
    ids: np.ndarray,
    length: np.ndarray,
    span: np.ndarray,
    unread: np.ndarray,
    names: Sequence[str],
    unknown_ids: Collection[int],
) -> Unknown:
    """Return what is unknown in the tokens of U utterances: ids [ΣN], length [U], span [ΣN, 2], unread [U]."""
    is_unknown = np.isin(ids, np.array(sorted(unknown_ids), dtype=np.int64))
    of = np.repeat(np.arange(len(length)), length)
    count = np.bincount(of[is_unknown], minlength=len(length)) + unread
    characters = (span[:, 1] - span[:, 0]).astype(np.int64)
    lost = int(unread.sum())
    by_pieces = is_unknown.sum() / max(1, len(ids))
    by_characters = (characters[is_unknown].sum() + lost) / max(1, characters.sum() + lost)
    worst = [names[u] for u in np.argsort(-count, kind="stable").tolist() if count[u]]
    return Unknown(len(ids), int(is_unknown.sum()), lost, float(max(by_pieces, by_characters)), worst)

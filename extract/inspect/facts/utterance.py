"""One utterance as the teachers saw it: `stillhouse inspect show`.

Guarantees: the transcript is never guessed. It comes from a manifest whose text still has the hash of the extracted
text, or it is spelt from the tokens, and `text_from` tells which.
Try: `stillhouse inspect show STORE UTT`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ....data.errors import CorpusError, NoStoreError, StaleError, StoreError
from ...store import Store, View, hash_text, to_float32
from ...store.verify.stale import REFRESH, is_newest
from ..frames import FrameFacts, frames_of, is_speech


@dataclass(frozen=True)
class TokenFacts:
    token_id: int
    piece: str
    begin: int  # in code points of the raw transcript
    end: int
    text: str | None  # that part of the transcript, if it is known


@dataclass(frozen=True)
class ContextFacts:
    context: str
    left: int  # tokens seen before the utterance
    right: int  # tokens seen after it


@dataclass(frozen=True)
class ShownView:
    view: str
    held: bool  # false if the utterance is not extracted yet, or is damaged
    problem: str | None  # the damage
    norms: list[float]  # of the N states
    values: list[list[float]] | None  # the states [N][D], if they are asked for


@dataclass(frozen=True)
class ShownTeacher:
    name: str
    tokens: list[TokenFacts]
    contexts: list[ContextFacts]
    views: list[ShownView]
    behind: bool = False  # it has another text of this utterance, or none: nothing of it is shown
    frames: list[FrameFacts] = field(default_factory=list)  # of a speech teacher, which has no tokens and contexts


@dataclass(frozen=True)
class Shown:
    utterance: str
    row: int
    session: int
    session_row: int  # place in the session, from 0
    session_utterances: int
    text: str
    text_from: str  # "corpus" or "tokens"; "nothing" if no text teacher has the utterance
    teachers: list[ShownTeacher]


def show(
    store: Store, utterance: str, views: Sequence[View], *, values: bool = False, corpus: Path | None = None
) -> Shown:
    """Return the tokens, contexts and norms of one utterance, of its newest text in the store.

    Without `corpus`, the transcript is spelt from the tokens of a teacher of `views`, or else of any text teacher.
    Raises StaleError if its text in `corpus` has changed, or if all teachers of `views` are from another text.
    """
    row = int(store.rows([utterance])[0])
    session, order = store.index.session, store.index.order
    session_rows = order[session[order] == session[row]].tolist()
    text = None if corpus is None else transcript(corpus, utterance)
    if text is not None and hash_text(text) != int(store.text_hash([utterance])[0]):
        what = f"the transcript of {utterance} has changed since it was extracted"
        raise StaleError(what, where=corpus, remedy="extract it again")
    names = dict.fromkeys(v.teacher for v in views)
    current = [t for t in names if is_newest(store, t, [utterance])[0]]
    if names and not current:
        what = f"{', '.join(names)}: no states of the newest text of {utterance}"
        raise StaleError(what, where=store.address, remedy=REFRESH)
    teachers = [
        _teacher(store, utterance, t, [v for v in views if v.teacher == t], values, text)
        if t in current
        else ShownTeacher(t, [], [], [], behind=True)
        for t in names
    ]
    spelt_text = None if text is not None else newest_text(store, utterance, current)
    return Shown(
        utterance=utterance,
        row=row,
        session=int(session[row]),
        session_row=session_rows.index(row),
        session_utterances=len(session_rows),
        text=text or spelt_text or "",
        text_from="corpus" if text is not None else "tokens" if spelt_text is not None else "nothing",
        teachers=teachers,
    )


def _teacher(
    store: Store, utterance: str, name: str, views: list[View], values: bool, text: str | None
) -> ShownTeacher:
    dtype = store.teacher(name).dtype
    shown: list[ShownView] = []
    contexts: dict[str, ContextFacts] = {}
    speech = is_speech(store, name)
    tokens = [] if speech else tokens_of(store, utterance, name, text)
    frames = frames_of(store, utterance, name) if speech else []
    for view in views:
        if not store.has([utterance], view)[0]:
            shown.append(ShownView(view.address, False, None, [], None))
            continue
        try:
            matrix = to_float32(store.gather([utterance], [view]).states[view], dtype)
        except StoreError as e:
            shown.append(ShownView(view.address, False, str(e), [], None))
            continue
        if view.context not in contexts and not speech:
            left, right = store.context_seen([utterance], view)
            contexts[view.context] = ContextFacts(view.context, int(left[0]), int(right[0]))
        norms = np.linalg.norm(matrix, axis=1).tolist()
        shown.append(ShownView(view.address, True, None, norms, matrix.tolist() if values else None))
    return ShownTeacher(name, tokens, list(contexts.values()), shown, frames=frames)


def newest_text(store: Store, utterance: str, first: Sequence[str] = ()) -> str | None:
    """Spell an utterance's newest text from a text teacher's tokens, if possible one of `first`. None: none has it."""
    for name in [*first, *store.plan.teachers]:
        if not is_speech(store, name) and is_newest(store, name, [utterance])[0]:
            return spelt(tokens_of(store, utterance, name))
    return None


def tokens_of(store: Store, utterance: str, teacher: str, text: str | None = None) -> list[TokenFacts]:
    """Return an utterance's tokens. The plan has them before any state is extracted."""
    _, token_id, span = store.tokens([utterance], teacher)
    pieces = pieces_of(store, teacher, token_id)
    return [
        TokenFacts(int(t), piece, b, e, None if text is None else text[b:e])
        for t, piece, (b, e) in zip(token_id, pieces, span.tolist())
    ]


def pieces_of(store: Store, teacher: str, token_id: np.ndarray) -> list[str]:
    """Return the tokenizer's spelling of token ids."""
    spelling = store.pieces(teacher)
    return [spelling[i] for i in store.vocabulary_rows(teacher, token_id).tolist()]


def spelt(tokens: Sequence[TokenFacts]) -> str:
    """Spell the transcript from its tokens: each piece without its marks, at the begin of its span.

    A piece like [UNK] becomes one � for each character of its span.
    """
    text, omitted = "", 0  # characters of gaps, because a damaged span may begin billions of characters later
    for token in tokens:
        piece, length = plain(token.piece), token.end - token.begin
        unknown = piece[:1] + piece[-1:] in ("[]", "<>") and len(piece) > 2 and len(piece) != length
        omitted += max(0, token.begin - omitted - len(text) - 1)
        begin = max(0, token.begin - omitted)
        text = text.ljust(begin)[:begin] + ("\ufffd" * min(length, 100) if unknown else piece)
    return " ".join(text.split())


def plain(piece: str) -> str:
    """Return a piece without its tokenizer's marks. Bytes beyond ASCII stay as the tokenizer writes them."""
    for mark in ("##", "▁", "Ġ", "Ċ"):
        piece = piece.removeprefix(mark)
    return piece.removesuffix("</w>")


def transcript(manifest: Path, utterance: str) -> str:
    """Read the raw text of one utterance. The rest of the manifest is not checked, which would take seconds."""
    spellings = json.dumps(utterance), json.dumps(utterance, ensure_ascii=False)
    number = 0
    try:
        with open(manifest, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007, an error below names it
                if any(s in line for s in spellings):
                    entry = json.loads(line)
                    if entry.get("id") == utterance:
                        return str(entry["text"])
    except OSError as e:
        raise CorpusError(f"cannot be read: {e.strerror}", where=manifest) from e
    except (ValueError, KeyError, AttributeError) as e:
        where = f"{manifest}:{number}"
        raise CorpusError("this is not a line of a manifest", where=where, expected="JSON with id and text") from e
    raise NoStoreError(f"no utterance {utterance}", where=manifest)

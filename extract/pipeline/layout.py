"""What a plan adds to a store: the order of its utterances, their shards, and the rows of a changed corpus.

Guarantees: the layout depends on corpus, tokenizer and seed alone. Sessions stay whole and in order, so contexts stay
together. No utterance lies in two shards.
Try: `pytest tests/extract/maintain/test_packing.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...data.errors import CorpusError, TeacherError
from ...data.manifest import Corpus, Utterance
from ...data.text import transform as transform_text
from ..speech.sounds import Sounds
from ..speech.teacher import AnyTeacher, SpeechTeacher
from ..store.disk.layout import dtype_of, hash_text, shard_rows
from ..store.format.plan import Plan, Shard
from ..teacher.tokenizer import Tokens


@dataclass(frozen=True)
class Layout:
    """The rows of a teacher that is new to a store. A store with a table of utterances needs no hashes and sessions."""

    ids: list[str]  # by row
    tokens: Tokens | Sounds
    start: np.ndarray  # int64 [U], place of each row on the axis of tokens or frames
    shard_rows: int  # places on that axis that a shard takes
    shards: list[Shard]
    text_hash: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # [U]
    session: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [U]


@dataclass(frozen=True)
class NewRows:
    """A table of the n utterances of a changed corpus, and the rows that it adds to a store."""

    number: int  # of the generation, and of its table of utterances
    first: int  # the new rows are [first, first + len(ids))
    order: np.ndarray  # int [n], rows of the corpus in its order
    session: np.ndarray  # int32 [n], session of each utterance of the corpus
    served: np.ndarray | None = None  # bool [n], utterances that can be read; None: all
    ids: list[str] = field(default_factory=list)
    text_hash: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    source: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # replaced by each new row, or -1
    tokens: Tokens | Sounds | None = None  # of the new rows; None: the teacher is new to the store
    start: np.ndarray | None = None  # int64, place of each new row on the token axis
    known: int = 0  # token ids of the vocabulary before this generation
    vocabulary: np.ndarray | None = None  # int32, token ids that are added to these


@dataclass(frozen=True)
class PlanDraft:
    """A plan whose last generation is not on disk yet if it is `new`."""

    plan: Plan
    layout: Layout | None = None  # of a teacher that is new to the store
    new_rows: NewRows | None = None  # of a changed corpus
    new: bool = True
    replaces: bool = False  # the teacher that the store has under this name, of which nothing is committed
    warnings: list[str] = field(default_factory=list)  # what is worth to know before it is written


def order_sessions(corpus: Corpus, seed: int) -> list[list[int]]:
    """Return indices of utterances by session: sessions by a seeded hash of their name, utterances as in the manifest.

    With a hash, the place of a session does not depend on the other sessions, as it would in a random permutation.
    """

    def key(session: list[int]) -> tuple[bytes, str]:
        first = corpus.utterances[session[0]]
        name = f"s:{first.session}" if first.session is not None else f"u:{first.id}"
        return hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest(), name

    return sorted(corpus.sessions(), key=key)


def read_input(teacher: AnyTeacher, utterances: Sequence[Utterance | None], transform: str) -> Tokens | Sounds:
    """Return the tokens of utterances, or what a speech teacher knows of their audio by its headers. None is empty.

    Raises AudioError, with all utterances whose audio cannot be read.
    """
    if isinstance(teacher, SpeechTeacher):
        return teacher.measure(utterances)
    return teacher.tokeniser.encode(["" if u is None else u.text for u in utterances], transform)


def lay_out(corpus: Corpus, teacher: AnyTeacher, transform: str, seed: int, dtype: str) -> Layout:
    """Read a corpus in the order of a new store and cut it into shards. Raises CorpusError if it has no text or audio.

    Raises TeacherError if the tokenizer makes nothing of the text, and AudioError as `read_input`.
    """
    if not corpus.utterances:
        raise CorpusError("the corpus is empty", where=corpus.path)
    sessions = order_sessions(corpus, seed)
    utterances = [corpus.utterances[i] for s in sessions for i in s]
    tokens = read_input(teacher, utterances, transform)
    if isinstance(tokens, Sounds):
        check_sounds(tokens, corpus)
    elif not tokens.length.any():
        spoken = next((u for u in utterances if transform_text(u.text, transform).text.strip()), None)
        if spoken is None:
            raise CorpusError("no utterance has any text", where=corpus.path)
        what = f"the tokenizer makes no token of any text, as of {spoken.id!r}: {spoken.text!r:.60}"
        raise TeacherError(what, expected="the tokenizer that the model was trained with")
    hashes = np.array([hash_text(u.text) for u in utterances], dtype=np.uint64)
    session = np.repeat(np.arange(len(sessions), dtype=np.int32), [len(s) for s in sessions])
    layout = cut_layout([u.id for u in utterances], tokens, teacher.width, dtype)
    return replace(layout, text_hash=hashes, session=session)


def check_sounds(sounds: Sounds, corpus: Corpus) -> None:
    """Raise CorpusError if no utterance has a frame."""
    if not sounds.length.any():
        what = "; ".join(sounds.notes) or "no utterance has audio"
        raise CorpusError(f"there is nothing to extract: {what}", where=corpus.path)


def cut_layout(ids: list[str], tokens: Tokens | Sounds, width: int, dtype: str) -> Layout:
    """Cut the rows of a teacher that is new to a store into shards. Raises StoreError if one does not fit into one."""
    lengths = tokens.length.astype(np.int64)
    longest = int(lengths.argmax())
    rows = shard_rows(int(lengths.sum()), int(lengths[longest]), width, dtype_of(dtype), ids[longest])
    shards, start = cut_shards(lengths, rows)
    return Layout(ids, tokens, start, rows, shards)


def cut_shards(lengths: np.ndarray, rows: int) -> tuple[list[Shard], np.ndarray]:
    """Return runs of whole utterances of at most `rows` tokens, and each utterance's first row, int64 [U]."""
    start = np.zeros(len(lengths), dtype=np.int64)
    shards: list[Shard] = []
    first = used = 0
    for u, n in enumerate(lengths.tolist()):
        if used + n > rows:
            shards.append(Shard(len(shards), first, u, used))
            first, used = u, 0
        start[u] = len(shards) * rows + used
        used += n
    shards.append(Shard(len(shards), first, len(lengths), used))
    return shards, start


def is_small(used: int, rows: int) -> bool:
    """Return whether two such shards always fit into one of `rows`."""
    return 2 * used < rows


def pack_shards(lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """Return which utterances lie together in shards of `rows` tokens: one array of indices for each shard.

    Runs keep the given order. Long utterances leave small runs between them, and these are put together. So at most
    one shard is small.
    """
    shards = cut_shards(lengths, rows)[0] if len(lengths) else []
    packed, small = [], np.zeros(0, dtype=np.int64)
    for s in shards:
        run = np.arange(s.first, s.last)
        if is_small(s.rows, rows):
            run = small = np.concatenate([small, run])
            if is_small(int(lengths[small].sum()), rows):
                continue
            small = small[:0]
        packed.append(run)
    return [*packed, small] if len(small) else packed


def compact(
    shard: np.ndarray, lengths: np.ndarray, used: Mapping[int, int], rows: int
) -> tuple[list[int], list[np.ndarray]]:
    """Choose the shards to empty, and how their live utterances lie together in new shards of at most `rows`.

    Afterwards no shard has deleted rows and at most one is small, so a second call empties none. A shard without
    deleted rows is emptied only to have fewer small ones.

    Arguments:
        shard, lengths: int64 [n], shard and tokens of each live utterance with tokens, in the order of the corpus.
        used: {shard: its rows, deleted ones included}.

    Returns:
        The numbers of the emptied shards, and one array of indices into `shard` for each new shard.
    """
    live = dict.fromkeys(used, 0)
    numbers, inverse = np.unique(shard, return_inverse=True)
    live |= dict(zip(numbers.tolist(), np.bincount(inverse, lengths, len(numbers)).astype(np.int64).tolist()))
    emptied = {s for s in used if live[s] < used[s]}
    small = {s for s in used if s not in emptied and is_small(used[s], rows)}
    packed = _pack(shard, lengths, emptied, rows)
    if len(small) + sum(is_small(int(lengths[p].sum()), rows) for p in packed) > 1:
        emptied |= small
        packed = _pack(shard, lengths, emptied, rows)
    return sorted(emptied), packed


def _pack(shard: np.ndarray, lengths: np.ndarray, emptied: set[int], rows: int) -> list[np.ndarray]:
    moved = np.flatnonzero(np.isin(shard, sorted(emptied)))
    return [moved[p] for p in pack_shards(lengths[moved], rows)]

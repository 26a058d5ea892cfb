"""The order of a store's utterances and their shards.

Invariant: a function of corpus, tokenizer and seed; sessions stay whole and in order, so contexts stay together, and
no utterance straddles a shard. Run: `pytest tests/extract/maintain/test_packing.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...data.errors import CorpusError
from ...data.manifest import Corpus
from ..store.disk.layout import dtype_of, hash_text, shard_rows
from ..store.format.plan import Shard
from ..teacher.tokenizer import Tokeniser, Tokens


@dataclass(frozen=True)
class Layout:
    """Utterances in the order of the store, and their tokens."""

    ids: list[str]
    text_hash: np.ndarray  # uint64 [U]
    session: np.ndarray  # int32 [U], contiguous runs
    tokens: Tokens
    start: np.ndarray  # int64 [U]
    shard_rows: int
    shards: list[Shard]


def order_sessions(corpus: Corpus, seed: int) -> list[list[int]]:
    """Indices of utterances by session: sessions by a seeded hash of their name, utterances as in the manifest.

    A hash instead of a random permutation, so that a session's place does not depend on which others there are.
    """

    def key(session: list[int]) -> tuple[bytes, str]:
        first = corpus.utterances[session[0]]
        name = f"s:{first.session}" if first.session is not None else f"u:{first.id}"
        return hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest(), name

    return sorted(corpus.sessions(), key=key)


def lay_out(corpus: Corpus, tokeniser: Tokeniser, transform: str, seed: int, width: int, dtype: str) -> Layout:
    """Tokenise the corpus in the order of the store and cut it into shards."""
    if not corpus.utterances:
        raise CorpusError("the corpus is empty", where=corpus.path)
    sessions = order_sessions(corpus, seed)
    utterances = [corpus.utterances[i] for s in sessions for i in s]
    tokens = tokeniser.encode([u.text for u in utterances], transform)
    lengths = tokens.length.astype(np.int64)
    if not lengths.any():
        raise CorpusError("no utterance has any text", where=corpus.path)
    rows = shard_rows(int(lengths.sum()), int(lengths.max()), width, dtype_of(dtype))
    shards, start = cut_shards(lengths, rows)
    return Layout(
        ids=[u.id for u in utterances],
        text_hash=np.array([hash_text(u.text) for u in utterances], dtype=np.uint64),
        session=np.repeat(np.arange(len(sessions), dtype=np.int32), [len(s) for s in sessions]),
        tokens=tokens,
        start=start,
        shard_rows=rows,
        shards=shards,
    )


def cut_shards(lengths: np.ndarray, rows: int) -> tuple[list[Shard], np.ndarray]:
    """Runs of whole utterances of at most `rows` tokens, and each utterance's first row (int64 [U])."""
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
    """Whether two such shards always fit into one of `rows`."""
    return 2 * used < rows


def pack_shards(lengths: np.ndarray, rows: int) -> list[np.ndarray]:
    """Which utterances lie together in shards of `rows` tokens, of which one at most is small: indices, by shard.

    Runs in the order that is given; small runs, which long utterances leave between them, are put together.
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
    shard: np.ndarray, lengths: np.ndarray, held: Mapping[int, int], rows: int
) -> tuple[list[int], list[np.ndarray]]:
    """Which shards are emptied, and how the utterances that live in them lie together elsewhere: indices, by new shard.

    shard int64 [n], lengths int64 [n]: of every utterance that lives and has tokens, in the order of the corpus;
    held: {shard: its rows, dead ones too}. Afterwards no shard has dead rows and one at most is small, so that the
    same again would empty none; a shard without dead rows goes only where small ones are to become fewer.
    """
    living = dict.fromkeys(held, 0)
    at, into = np.unique(shard, return_inverse=True)
    living |= dict(zip(at.tolist(), np.bincount(into, lengths, len(at)).astype(np.int64).tolist()))
    go = {s for s in held if living[s] < held[s]}
    small = {s for s in held if s not in go and is_small(held[s], rows)}
    mine, packed = _packed(shard, lengths, go, rows)
    if len(small) + sum(is_small(int(lengths[mine[p]].sum()), rows) for p in packed) > 1:
        go |= small
        mine, packed = _packed(shard, lengths, go, rows)
    return sorted(go), [mine[p] for p in packed]


def _packed(shard: np.ndarray, lengths: np.ndarray, go: set[int], rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
    mine = np.flatnonzero(np.isin(shard, sorted(go)))
    return mine, pack_shards(lengths[mine], rows)

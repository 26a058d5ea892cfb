"""All places where a word stands, as each context shows it, on a plane: for `plot --kind word` and the report.

Invariant: one projection for all contexts, so that distances between colours mean something.
Exercised by: `stillhouse inspect plot STORE bank.png --kind word --word bank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....data.errors import NoStoreError, UsageError
from ...store import Store, View, to_float32
from ..facts.utterance import plain, tokens_of
from ..sample import cut, held_rows
from .neighbours import marked

BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    view: str
    utterance: str
    token: int
    sentence: str
    begin: int
    end: int


@dataclass(frozen=True)
class WordMap:
    """`explained` is the share of the variance that the two axes show; `found` counts all occurrences."""

    word: str
    views: list[str]
    found: int
    shown: int
    explained: list[float]
    points: list[Point]


def occurrences(store: Store, teacher: str, word: str, rows: np.ndarray) -> list[tuple[int, int]]:
    """(row, token) of every token that spells the word alone, in the order of `rows`."""
    pieces = store.pieces(teacher)
    spelling = [i for i, p in enumerate(pieces) if plain(p).casefold() == word.casefold() and not p.startswith("##")]
    wanted = store.embedding(teacher)[0][spelling]
    found: list[tuple[int, int]] = []
    for part in cut(store, teacher, rows, BLOCK_TOKENS):
        lengths, token_id, _ = store.tokens([store.index.id(int(r)) for r in part], teacher)
        at = np.flatnonzero(np.isin(token_id, wanted))
        ends = np.cumsum(lengths.astype(np.int64))
        of = np.searchsorted(ends, at, side="right")
        found += zip(part[of].tolist(), (at - (ends - lengths)[of]).tolist())
    return found


def word_map(
    store: Store,
    views: Sequence[View],
    word: str,
    most: int = 200,
    seed: int = 0,
    places: list[tuple[int, int]] | None = None,
) -> WordMap:
    """The first two principal components of a word's states in views of one teacher and layer, contexts differing.

    places: its occurrences, where they are known already, or some of them.
    Errors: NoStoreError where the word stands less than twice; UsageError for views of several teachers.
    """
    teachers = {v.teacher for v in views}
    if len(teachers) != 1:
        raise UsageError(
            f"views of several teachers on one plane: {', '.join(sorted(teachers))}", remedy="name one with --view"
        )
    teacher, dtype = views[0].teacher, store.teacher(views[0].teacher).dtype
    places = occurrences(store, teacher, word, held_rows(store, views)) if places is None else places
    if len(places) < 2:
        raise NoStoreError(
            f"{word!r} is {len(places)} times a token of {teacher} by itself",
            where=store.address,
            expected="twice at least",
        )
    chosen = places
    if len(places) > most:
        index = np.sort(np.random.default_rng(seed).choice(len(places), most, replace=False))
        chosen = [places[i] for i in index.tolist()]
    ids = list(dict.fromkeys(store.index.id(row) for row, _ in chosen))
    gathered = store.gather(ids, views)
    lengths = gathered.lengths[teacher].astype(np.int64)
    start = dict(zip(ids, (np.cumsum(lengths) - lengths).tolist()))
    at = [start[store.index.id(row)] + token for row, token in chosen]
    states = np.concatenate([to_float32(gathered.states[v][at], dtype) for v in views])
    centred = states - states.mean(0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes[:2].T
    explained = (spread**2 / max(float((spread**2).sum()), 1e-30))[:2]
    tokens = {i: tokens_of(store, i, teacher) for i in ids}
    points = []
    for n, (x, y) in enumerate(plane.tolist()):
        row, token = chosen[n % len(chosen)]
        utterance = store.index.id(row)
        sentence, begin, end = marked(tokens[utterance], token)
        view = views[n // len(chosen)].address
        points.append(Point(round(x, 4), round(y, 4), view, utterance, token, sentence, begin, end))
    return WordMap(word, [v.address for v in views], len(places), len(chosen), explained.round(4).tolist(), points)

"""All occurrences of a word in several contexts, on a plane: for `inspect plot --kind word` and the report.

Guarantees: all contexts share one projection, so distances between colours are comparable.
Try: `stillhouse inspect plot STORE bank.png --kind word --word bank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ....data.errors import NoStoreError, UsageError
from ...store import Store, View, to_float32
from ..facts.utterance import plain, tokens_of
from ..sample import available_rows, blocks, counted, ids_of, locate
from .neighbours import marked

READ_TOKENS = 1 << 20  # token ids that are read at once
Places = list[tuple[int, int]]  # (row, token) of each occurrence


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
    word: str
    views: list[str]
    found: int  # all occurrences, except as the first token of an utterance in a decoder
    shown: int
    explained: list[float]  # share of the variance on each of the two axes
    points: list[Point]


def occurrences(store: Store, teacher: str, word: str, rows: np.ndarray) -> Places:
    """Return (row, token) of every token that spells the word alone and is `counted`, in the order of `rows`."""
    pieces = store.pieces(teacher)
    spelling = [i for i, p in enumerate(pieces) if plain(p).casefold() == word.casefold() and not p.startswith("##")]
    ids = store.embedding(teacher)[0][spelling]
    places: Places = []
    for part in blocks(store, teacher, rows, READ_TOKENS):
        lengths, token_id, _ = store.tokens(ids_of(store, part), teacher)
        of, token = locate(part, lengths, np.flatnonzero(np.isin(token_id, ids) & counted(store, teacher, lengths)))
        places += zip(of.tolist(), token.tolist())
    return places


def word_map(
    store: Store, views: Sequence[View], word: str, most: int = 200, seed: int = 0, places: Places | None = None
) -> WordMap:
    """Project at most `most` occurrences, or those of known `places`, to two principal components of their states."""
    teacher, *others = dict.fromkeys(v.teacher for v in views)
    if others:
        names = ", ".join([teacher, *others])
        raise UsageError(f"views of several teachers on one plane: {names}", remedy="name one with --view")
    dtype = store.teacher(teacher).dtype
    places = occurrences(store, teacher, word, available_rows(store, views)) if places is None else places
    if len(places) < 2:
        what = f"{word!r} occurs {len(places)} times as a single token of {teacher}, without first tokens of a decoder"
        raise NoStoreError(what, where=store.address, expected="at least two times")
    index = np.random.default_rng(seed).choice(len(places), min(most, len(places)), replace=False)
    chosen = [places[i] for i in np.sort(index).tolist()]
    utterances = ids_of(store, (row for row, _ in chosen))
    ids = list(dict.fromkeys(utterances))
    gathered = store.gather(ids, views)
    lengths = gathered.lengths[teacher].astype(np.int64)
    start = dict(zip(ids, (np.cumsum(lengths) - lengths).tolist()))
    at = [start[utterance] + token for utterance, (_, token) in zip(utterances, chosen)]
    states = np.concatenate([to_float32(gathered.states[v][at], dtype) for v in views])
    centred = states - states.mean(0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    plane = (centred @ axes[:2].T).tolist()
    explained = (scale**2 / max(float((scale**2).sum()), 1e-30))[:2]
    tokens = {i: tokens_of(store, i, teacher) for i in ids}
    points = [
        Point(round(x, 4), round(y, 4), view.address, utterance, token, *marked(tokens[utterance], token))
        for (view, (utterance, (_, token))), (x, y) in zip(product(views, zip(utterances, chosen)), plane)
    ]
    return WordMap(word, [v.address for v in views], len(places), len(chosen), explained.round(4).tolist(), points)

"""Compare views by linear CKA: `stillhouse inspect similarity`.

Guarantees: every view is read at the same places of the same transcripts, or at the same times of the same audio, so
tokenisers, frame rates and widths may differ. No place is a decoder's first token of an utterance (see `counted`). The
estimate is unbiased: unrelated views get 0.
Try: `stillhouse inspect similarity STORE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....data.errors import NoStoreError
from ...store import Store, View, to_float32
from ..frames import frames_at, middles, one_axis
from ..sample import OnProgress, ids_of, ignore, is_decoder, read_states, sample_rows, sample_size

PLACES = 2000
EVERY_S = 0.2  # between two places in audio, because neighbouring frames are much alike
GRAM_NUMBERS = 1 << 27  # of all views' Gram matrices


@dataclass(frozen=True)
class Similarity:
    views: list[str]
    places: int  # tokens at which views were compared, without first tokens of decoders; or frames
    cka: list[list[float]]  # [V][V], in the order of `views`
    axis: str = "token"  # or "frame", of speech teachers


def similarity(
    store: Store, views: Sequence[View], tokens: int | None = None, seed: int = 0, on_progress: OnProgress = ignore
) -> Similarity:
    """Compute linear CKA of all pairs of views at `tokens` places, at least 4. None means PLACES or fewer.

    Raises UsageError for views of text teachers together with views of speech teachers.
    """
    speech = one_axis(store, views)
    if tokens is None:
        tokens = min(sample_size(store, views, PLACES), int((GRAM_NUMBERS / max(1, len(views))) ** 0.5))
    ids, tokens_of = (times if speech else places)(store, views, tokens, seed)
    _, tokens_of = without_first(store, tokens_of)
    count = sum(len(t) for t in next(iter(tokens_of.values())))
    if count < 4:
        what = f"only {count} {'frames' if speech else 'tokens'} to compare views at"
        expected = f"at least 4, {EVERY_S} s apart" if speech else "at least 4, without first tokens of decoders"
        raise NoStoreError(what, where=store.address, expected=expected)
    gram = np.empty((len(views), count, count), np.float32)
    for number, view in enumerate(views):
        on_progress(view)
        gram[number] = centred_gram(states_at(store, view, ids, tokens_of[view.teacher]))
    flat = gram.reshape(len(views), -1)
    product = (flat @ flat.T).astype(np.float64)
    scale = np.sqrt(np.maximum(np.diag(product), 1e-30))
    cka = product / scale[:, None] / scale
    return Similarity([v.address for v in views], count, cka.round(6).tolist(), "frame" if speech else "token")


def places(
    store: Store, views: Sequence[View], tokens: int, seed: int
) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Draw utterances; return their ids, and the indices of the tokens to read in each of them, by teacher.

    A place is where a token of the first teacher begins. Another teacher's token is the one that spans that character.
    Places without a token of some teacher are left out.
    """
    names = list(dict.fromkeys(v.teacher for v in views))
    ids = ids_of(store, sample_rows(store, views, tokens, seed))
    lengths, _, span = store.tokens(ids, names[0])
    spans = np.split(span, np.cumsum(lengths)[:-1])
    good, over = tokens_over(store, ids, names[1:], [s[:, 0] for s in spans])
    at = {names[0]: [np.flatnonzero(g) for g in good], **over}
    left = tokens
    for number, own in enumerate(at[names[0]]):
        solid = spans[number][own, 1] > spans[number][own, 0]
        for indices in at.values():
            indices[number] = indices[number][solid][:left]
        left -= len(at[names[0]][number])
    return ids, at


def times(store: Store, views: Sequence[View], frames: int, seed: int) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Draw utterances; return their ids, and the indices of the frames to read in each of them, by teacher.

    A place is the middle of every n-th frame of the first teacher. Another teacher's frame is the one over that time.
    Places without a frame of some teacher are left out.
    """
    names = list(dict.fromkeys(v.teacher for v in views))
    records = [store.plan.teachers[name] for name in names]
    step = max(1, round(EVERY_S * records[0].rate_hz))
    ids = ids_of(store, sample_rows(store, views, frames * step, seed))
    counts = [store.row_lengths(name, store.rows(ids, name)).tolist() for name in names]
    at: dict[str, list[np.ndarray]] = {name: [] for name in names}
    left = frames
    for of in zip(*counts, strict=True):
        own = np.arange(0, of[0], step)
        found = [own, *(frames_at(r, middles(records[0], own)) for r in records[1:])]
        there = np.logical_and.reduce([(f >= 0) & (f < n) for f, n in zip(found, of, strict=True)])
        for name, f in zip(names, found, strict=True):
            at[name].append(f[there][:left])
        left -= len(at[names[0]][-1])
    return ids, at


def tokens_over(
    store: Store, ids: Sequence[str], teachers: Sequence[str], begins: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Find the tokens of several teachers over some characters `begins` (code points) of each utterance.

    Returns per utterance a bool [characters] (every teacher has a token there), and per teacher those tokens' indices.
    """
    good = [np.ones(len(begin), bool) for begin in begins]
    at: dict[str, list[np.ndarray]] = {}
    for name in teachers:
        lengths, _, packed = store.tokens(ids, name)
        spans = np.split(packed, np.cumsum(lengths)[:-1])
        # Tokens are in order, so the last one that begins at or before a character is over it, if it is long enough.
        at[name] = [np.searchsorted(s[:, 0], b, side="right") - 1 for s, b in zip(spans, begins)]
        for number, (s, b, index) in enumerate(zip(spans, begins, at[name])):
            good[number] &= (index >= 0) & (s[np.maximum(index, 0), 1] > b) if len(s) else False
    return good, {name: [i[g] for i, g in zip(index, good)] for name, index in at.items()}


def without_first(
    store: Store, at: dict[str, list[np.ndarray]]
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Leave out the places where a decoder's token is the first of its utterance. `at` is what `tokens_over` returns.

    Returns per utterance a bool [places], and `at` without the others. A decoder that has first tokens only keeps them:
    they are compared with each other.
    """
    keep = [np.ones(len(indices), bool) for indices in next(iter(at.values()))]
    for name, of in at.items():
        if is_decoder(store, name) and any(indices.any() for indices in of):
            keep = [k & (indices > 0) for k, indices in zip(keep, of)]
    return keep, {name: [indices[k] for indices, k in zip(of, keep)] for name, of in at.items()}


def states_at(store: Store, view: View, ids: list[str], tokens: list[np.ndarray]) -> np.ndarray:
    """Read a view at some tokens of each utterance: float32 [places, D]."""
    gathered = read_states(store, view, ids)
    rows = packed_places(gathered.lengths[view.teacher], tokens)
    return to_float32(gathered.states[view][rows], store.teacher(view.teacher).dtype)


def packed_places(lengths: np.ndarray, tokens: list[np.ndarray]) -> np.ndarray:
    """Return the places of some tokens of each utterance among the packed tokens of all."""
    start = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.concatenate([t + s for t, s in zip(tokens, start.tolist())])


def centred_gram(states: np.ndarray) -> np.ndarray:
    """Return the U-centred Gram matrix [n, n]. Products of two such matrices are unbiased estimates of HSIC.

    Source: Székely and Rizzo 2014, "Partial distance correlation with methods for dissimilarities".
    """
    states = states - states.mean(0)
    gram = (states @ states.T).astype(np.float64)
    n = len(gram)
    np.fill_diagonal(gram, 0)
    rows = gram.sum(0)
    gram -= (rows[:, None] + rows) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    return gram / max(np.linalg.norm(gram), 1e-30)

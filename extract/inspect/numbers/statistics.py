"""Statistics of the states of a view: `stillhouse inspect stats`.

Guarantees: the states are read once. The first token of each utterance is counted apart: `counted` says why. All
frames of a speech teacher count.
Try: `stillhouse inspect stats STORE --view 'minilm/*/*'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...store import Store, View, to_float32
from ..frames import is_speech
from ..sample import (
    OnProgress,
    blocks,
    first_tokens,
    ids_of,
    ignore,
    quantisation_errors,
    read_states,
    sample_rows,
    sample_size,
)

SAMPLE_TOKENS = 20_000  # of each view, if the views are neither wide nor many
RANK_SIDE = 1024  # most tokens for the rank of wider states, because it takes width³ operations otherwise
OUTLIER = 5.0  # times the median dimension's root mean square
DEAD = 1e-3  # times the median dimension's deviation


@dataclass(frozen=True)
class Dimension:
    dimension: int
    mean: float
    rms: float  # root mean square


@dataclass(frozen=True)
class Statistics:
    """Statistics of all tokens except the first of each utterance; fields named `first` count those."""

    view: str
    width: int
    utterances: int
    tokens: int
    first_tokens: int
    norm_mean: float
    norm_std: float
    first_norm_mean: float
    anisotropy: float  # mean cosine of two random states: 0 if directions spread evenly, 1 if all are equal
    effective_rank: float  # exp of the entropy of the covariance's spectrum: dimensions in which states vary
    dead: list[int]  # dimensions whose deviation is below 1e-3 of the median dimension's
    outliers: list[Dimension]  # root mean square above 5 times the median dimension's, largest first
    not_finite: int  # states with a NaN or an infinity, first ones included; nothing else counts them
    int8_error: float | None  # for int8: root mean square error over root mean square of all states as written
    int8_error_standardised: float | None  # the same for standardised states, which training sees
    rank_tokens: int = 0  # tokens behind the rank, which bounds it: 1,024 in a sample of wider states
    pq_error: float | None = None  # for pq: as int8_error
    pq_error_standardised: float | None = None
    axis: str = "token"  # or "frame": what the fields named after tokens count, of which none is a first one


def statistics(
    store: Store,
    views: Sequence[View],
    tokens: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = ignore,
    *,
    rank: bool = True,
    full: bool = False,
) -> list[Statistics]:
    """Compute the statistics of each view from `tokens` tokens (None: at most SAMPLE_TOKENS), or with `full` from all.

    Without `rank` the effective rank is NaN, which saves operations that grow with the square of the width.
    """
    measured = []
    most = None if full else tokens or sample_size(store, views, SAMPLE_TOKENS)
    for view in views:
        on_progress(view)
        rows = sample_rows(store, [view], most, seed)
        narrow = full or store.teacher(view.teacher).width <= RANK_SIDE
        measured.append(_of_view(store, view, rows, "none" if not rank else "all" if narrow else "some"))
    return measured


def _of_view(store: Store, view: View, rows: np.ndarray, rank: str) -> Statistics:
    """`rank` is computed of "all" tokens, of "some", or of "none"."""
    width, dtype = store.teacher(view.teacher).width, store.teacher(view.teacher).dtype
    speech = is_speech(store, view.teacher)
    total, direction = np.zeros(width), np.zeros(width)
    shift: np.ndarray | None = None
    square = np.zeros((width, width) if rank == "all" else width)
    some: list[np.ndarray] = []
    every = -(-int(store.lengths(view.teacher)[rows].sum()) // RANK_SIDE)
    norms = [np.zeros(0, np.float32)]
    first_norms = [np.zeros(0, np.float32)]
    not_finite = count = 0
    for part in blocks(store, view.teacher, rows):
        gathered = read_states(store, view, ids_of(store, part))
        lengths, states = gathered.lengths[view.teacher], to_float32(gathered.states[view], dtype)
        first = np.zeros(len(states), bool) if speech else first_tokens(lengths)
        finite = np.isfinite(states).all(1)
        not_finite += int((~finite).sum())
        first_norms.append(np.linalg.norm(states[first & finite], axis=1))
        states = states[finite & ~first]
        if not len(states):
            continue
        if shift is None:  # The products keep their digits if the mean is near zero.
            shift = states.mean(0, dtype=np.float64).astype(np.float32)
        length = np.linalg.norm(states, axis=1)
        norms.append(length)
        direction += (states / np.maximum(length, 1e-30)[:, None]).sum(0, dtype=np.float64)
        moved = states - shift
        total += moved.sum(0, dtype=np.float64)
        square += moved.T @ moved if rank == "all" else np.einsum("nd,nd->d", moved, moved)
        if rank == "some":
            some.append(moved[-count % every :: every])
        count += len(states)
    lengths_all, first_all = np.concatenate(norms), np.concatenate(first_norms)
    mean = total / max(count, 1)
    covariance = square / max(count, 1) - (np.outer(mean, mean) if rank == "all" else mean**2)
    mean = mean + (0 if shift is None else shift)
    std = np.sqrt(np.maximum(np.diag(covariance) if rank == "all" else covariance, 0))
    ranked, spectrum_of = count, covariance
    if rank == "some" and some:
        drawn = np.concatenate(some)
        drawn -= drawn.mean(0)
        ranked, spectrum_of = len(drawn), drawn @ drawn.T
    rms = np.sqrt(std**2 + mean**2)
    large = np.flatnonzero(rms > OUTLIER * np.median(rms))
    large = large[np.argsort(-rms[large], kind="stable")]
    pairs = count * (count - 1)
    return Statistics(
        view=view.address,
        width=width,
        utterances=len(rows),
        tokens=count,
        first_tokens=len(first_all),
        norm_mean=float(lengths_all.mean()) if count else 0.0,
        norm_std=float(lengths_all.std()) if count else 0.0,
        first_norm_mean=float(first_all.mean()) if len(first_all) else 0.0,
        # The mean over ordered pairs of different states. A state's cosine with itself is 1.
        anisotropy=float((direction @ direction - count) / pairs) if pairs else 0.0,
        effective_rank=float("nan") if rank == "none" else _effective_rank(spectrum_of) if count else 0.0,
        dead=np.flatnonzero(std <= DEAD * np.median(std)).tolist() if count else [],
        outliers=[Dimension(d, float(mean[d]), float(rms[d])) for d in large.tolist()],
        not_finite=not_finite,
        **quantisation_errors(store, view),
        rank_tokens=0 if rank == "none" else ranked,
        axis="frame" if speech else "token",
    )


def _effective_rank(covariance: np.ndarray) -> float:
    """exp of the Shannon entropy of the normalised spectrum, which a Gram matrix of the same states shares.

    Source: Roy and Vetterli 2007, "The effective rank".
    """
    if not np.isfinite(covariance).all():  # Damaged norms lead here; `verify` names them.
        return float("nan")
    spectrum = np.maximum(np.linalg.eigvalsh(covariance), 0)
    if not spectrum.sum():
        return 0.0
    p = spectrum / spectrum.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))

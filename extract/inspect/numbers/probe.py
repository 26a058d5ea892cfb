"""A linear probe: ridge regression from states to class indicators, cross-validated.

Guarantees: the predictions of a fold come from the other folds only. The strength of the ridge is the one that predicts
best over all folds, and it is the same for all classes.
Try: `stillhouse views STORE …`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the ridge, times the number of places
WIDEST = 2048  # wider states are projected at random to this width


@dataclass(frozen=True)
class Probe:
    here: np.ndarray  # [n]: class number of the unit at each place
    next: np.ndarray  # [n]: class number of the unit after it
    fold: np.ndarray  # [n]: the fold of each place


@dataclass(frozen=True)
class Fit:
    r2: list[float]  # of (here, next), over all class indicators
    accuracy: list[float]  # of (here, next): share of places whose highest class is correct


def fold_numbers(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign whole groups to folds of about equal size. Returns the fold of each place: int64 [n]."""
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    number = np.empty(len(names), np.int64)
    filled = np.zeros(folds)
    order = np.random.default_rng(seed).permutation(len(names))
    for g in order[np.argsort(-counts[order], kind="stable")].tolist():
        number[g] = int(np.argmin(filled))
        filled[number[g]] += counts[g]
    return number[inverse]


def tied(sessions: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Number the groups of utterances that are linked by chains of equal sessions and equal texts: int64 [U].

    Without these groups, a text that two speakers read could be fitted in one session and tested in another. The work
    is one pass over [U] for each link of the longest chain.
    """
    _, sessions = np.unique(sessions, return_inverse=True)
    _, texts = np.unique(texts, return_inverse=True)
    number = sessions.astype(np.int64)
    while True:
        before = number
        for group in (texts, sessions):
            least = np.full(group.max(initial=-1) + 1, len(number), np.int64)
            np.minimum.at(least, group, number)
            number = least[group]
        if (number == before).all():
            return number


def ridge(states: np.ndarray, probe: Probe) -> Fit:
    """Fit a cross-validated ridge from float [n, D] to both targets. Time: folds · strengths · D² (D/3 + C)."""
    x = _standardised(states)
    y = np.concatenate([np.eye(int(c.max()) + 1)[c] for c in (probe.here, probe.next)], axis=1)
    edge = int(probe.here.max()) + 1
    predicted = np.empty((len(STRENGTHS), *y.shape), np.float32)
    means = np.empty(y.shape)
    for fold in range(int(probe.fold.max()) + 1):
        out = probe.fold == fold
        a, b = x[~out], y[~out]
        mean_a, mean_b = a.mean(0), b.mean(0)
        means[out] = mean_b
        a = a - mean_a
        covariance, cross = a.T @ a, a.T @ (b - mean_b)
        for k, strength in enumerate(STRENGTHS):
            weight = np.linalg.solve(covariance + strength * len(a) * np.eye(a.shape[1]), cross)
            predicted[k, out] = (x[out] - mean_a) @ weight + mean_b
    r2, accuracy = [], []
    for part, classes in ((slice(edge), probe.here), (slice(edge, None), probe.next)):
        # Each target gets its own strength, because one of them may be as hard to predict as noise.
        error = np.square(predicted[:, :, part] - y[:, part]).sum(axis=(1, 2))
        best = int(np.argmin(error))
        r2.append(float(1 - error[best] / np.square(y[:, part] - means[:, part]).sum()))
        accuracy.append(float((predicted[best][:, part].argmax(axis=1) == classes).mean()))
    return Fit(r2, accuracy)


def _standardised(states: np.ndarray) -> np.ndarray:
    """float64 [n, ≤ WIDEST] with mean 0 and deviation 1 in each dimension; dead dimensions are 0."""
    x = states.astype(np.float64)
    x -= x.mean(0)
    deviation = x.std(0)
    x /= np.where(deviation > 1e-6, deviation, np.inf)
    if x.shape[1] > WIDEST:
        x = x @ np.random.default_rng(0).normal(0, WIDEST**-0.5, (x.shape[1], WIDEST))
    return x

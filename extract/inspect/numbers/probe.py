"""A linear probe: ridge regression from states to indicators of classes, judged on folds that it was not fitted to.

Invariant: a fold's predictions come from the other folds alone; the strength of the ridge is the one that predicts
best over all folds, the same for all classes. Exercised by: `stillhouse views STORE …`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the ridge, times the number of places
WIDEST = 2048  # wider states are projected at random to this width


@dataclass(frozen=True)
class Probe:
    """What is to be told: class numbers [n] of the unit here and of the next one, and the fold of each place [n]."""

    here: np.ndarray
    next: np.ndarray
    fold: np.ndarray


@dataclass(frozen=True)
class Fit:
    """For (here, next): R² over all classes' indicators, and the share of places whose highest class is right."""

    r2: tuple[float, float]
    accuracy: tuple[float, float]


def fold_numbers(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each place [n]: whole groups, shared out so that the folds are of about equal size."""
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    number = np.empty(len(names), np.int64)
    filled = np.zeros(folds)
    order = np.random.default_rng(seed).permutation(len(names))
    for g in order[np.argsort(-counts[order], kind="stable")].tolist():
        number[g] = int(np.argmin(filled))
        filled[number[g]] += counts[g]
    return number[inverse]


def tied(sessions: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """int64 [U]: equal numbers for utterances that a chain of equal sessions and equal texts leads from one to another.

    A story that two speakers read, or a prompt that all do, would otherwise be fitted to in one session and judged in
    another. Work: passes over [U], as many as the longest chain has links.
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
    """Cross-validated ridge of float [n, D] onto both targets' indicators. Time: folds · strengths · D² (D/3 + C)."""
    x = _standardised(states)
    targets = [np.eye(int(c.max()) + 1)[c] for c in (probe.here, probe.next)]
    edge = targets[0].shape[1]
    y = np.concatenate(targets, axis=1)
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
    parts = (slice(0, edge), slice(edge, None))
    r2, accuracy = [], []
    for part, classes in zip(parts, (probe.here, probe.next)):
        # The strength is chosen for each of the two by itself: one of them may be as good as noise
        error = np.square(predicted[:, :, part] - y[:, part]).sum(axis=(1, 2))
        best = int(np.argmin(error))
        r2.append(float(1 - error[best] / np.square(y[:, part] - means[:, part]).sum()))
        accuracy.append(float((predicted[best][:, part].argmax(axis=1) == classes).mean()))
    return Fit((r2[0], r2[1]), (accuracy[0], accuracy[1]))


def _standardised(states: np.ndarray) -> np.ndarray:
    """float64 [n, ≤ WIDEST], mean 0 and deviation 1 in each dimension, dead ones 0."""
    x = states.astype(np.float64)
    x -= x.mean(0)
    deviation = x.std(0)
    x /= np.where(deviation > 1e-6, deviation, np.inf)
    if x.shape[1] > WIDEST:
        x = x @ np.random.default_rng(0).normal(0, WIDEST**-0.5, (x.shape[1], WIDEST))
    return x

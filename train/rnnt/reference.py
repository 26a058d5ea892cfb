"""The specification: the RNN-T loss, its occupancies and its gradient in float64, in plain loops.

One utterance has T frames and U target units y(0) … y(U-1). The lattice has T x (U+1) cells. In cell (t, u), frames
before t are done and u units are out. In each cell the model gives V log-probabilities. Two of them leave the cell:

    blank(t, u) = log P(blank | t, u)                       to (t+1, u): the frame is done
    label(t, u) = log P(y(u) | t, u) + delay(t)             to (t, u+1): unit u is emitted at frame t; none at u = U

An alignment starts in cell (0, 0) and ends by the blank of cell (T-1, U). It has T blanks and U labels.

    alpha(0, 0) = 0
    alpha(t, u) = logadd( alpha(t-1, u) + blank(t-1, u),  alpha(t, u-1) + label(t, u-1) )
    beta(T-1, U) = blank(T-1, U)
    beta(t, u)  = logadd( blank(t, u) + beta(t+1, u),     label(t, u) + beta(t, u+1) )
    log P(y)    = beta(0, 0) = alpha(T-1, U) + blank(T-1, U)
    loss        = -log P(y)

Occupancies are the share of the alignments' probability that takes an arc, with beta(T, U) = 0 behind the last blank:

    occ_blank(t, u) = exp( alpha(t, u) + blank(t, u) + beta(t+1, u) - log P(y) )
    occ_label(t, u) = exp( alpha(t, u) + label(t, u) + beta(t, u+1) - log P(y) )     sums to 1 over t for every u
    gamma(t, u)     = occ_blank(t, u) + occ_label(t, u)                              the share that visits the cell

The gradient in the logits x(t, u, v), where p = softmax(x), is eq. 20 of Graves 2012 with the softmax folded in:

    g(t, u, v) = p(v) * gamma(t, u) - [v = blank] occ_blank(t, u) - [v = y(u)] occ_label(t, u)

FastEmit (Yu et al. 2021, eq. 9) counts the gradient of each label arc 1 + lambda times. The loss's value stays
-log P(y), so values compare across lambdas. The delay penalty of k2, delay(t) = penalty * ((T-1)/2 - t), is part of the
scores, of the loss's value and of the occupancies. clamp limits each element of g before grad_output scales it. With
fused_log_softmax off, x holds log-probabilities, and g has the two subtracted terms alone.

Guarantees: each other implementation is tested against this one. None of it is fast.
Try: `pytest tests/train/rnnt`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reference:
    """Costs [B], the gradient of each cost [B, T, U+1, V], and label occupancies [B, U, T]. Padding is 0."""

    costs: np.ndarray
    gradient: np.ndarray
    occupancy: np.ndarray


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def lattice(blank: np.ndarray, label: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return log P(y) and the occupancies of the arcs, occ_blank and occ_label [T, U+1].

    Arguments:
        blank, label: [T, U+1], the arcs' log-probabilities. label[:, U] is never read. Minus infinity closes an arc.
    """
    T, U = blank.shape[0], blank.shape[1] - 1
    alpha = np.full((T, U + 1), -np.inf)
    alpha[0, 0] = 0.0
    for t in range(T):
        for u in range(U + 1):
            if t > 0:
                alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t - 1, u] + blank[t - 1, u])
            if u > 0:
                alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t, u - 1] + label[t, u - 1])

    beta = np.full((T + 1, U + 2), -np.inf)  # One row and one column more are outside the lattice.
    beta[T, U] = 0.0  # behind the last blank
    for t in reversed(range(T)):
        for u in reversed(range(U + 1)):
            beta[t, u] = blank[t, u] + beta[t + 1, u]
            if u < U:
                beta[t, u] = np.logaddexp(beta[t, u], label[t, u] + beta[t, u + 1])

    log_p = beta[0, 0]
    occ_blank, occ_label = np.zeros((T, U + 1)), np.zeros((T, U + 1))
    if log_p > -np.inf:
        occ_blank = np.exp(alpha + blank + beta[1:, : U + 1] - log_p)
        occ_label[:, :U] = np.exp(alpha[:, :U] + label[:, :U] + beta[:T, 1 : U + 1] - log_p)
    return float(log_p), occ_blank, occ_label


def rnnt_reference(
    logits: np.ndarray,
    targets: np.ndarray,
    logit_lengths: np.ndarray,
    target_lengths: np.ndarray,
    blank: int = -1,
    clamp: float = -1,
    fused_log_softmax: bool = True,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
) -> Reference:
    """Return costs, gradients and occupancies of logits [B, T, U+1, V], with the arguments of `rnnt_loss`."""
    x = np.asarray(logits, dtype=np.float64)
    B, Tmax, Uplus, V = x.shape
    blank = blank % V
    costs, gradient = np.zeros(B), np.zeros_like(x)
    occupancy = np.zeros((B, Uplus - 1, Tmax))
    for b in range(B):
        T, U = int(logit_lengths[b]), int(target_lengths[b])
        y = np.asarray(targets[b, :U], dtype=np.int64)
        cells = x[b, :T, : U + 1]
        log_p = log_softmax(cells) if fused_log_softmax else cells
        units = np.arange(U)
        label = np.full((T, U + 1), -np.inf)
        label[:, :U] = log_p[:, units, y] + delay_penalty * ((T - 1) / 2 - np.arange(T))[:, None]
        total, occ_blank, occ_label = lattice(log_p[:, :, blank], label)

        costs[b] = -total
        occupancy[b, :U, :T] = occ_label[:, :U].T
        occ_label = occ_label * (1 + fastemit_lambda)
        g = np.exp(log_p) * (occ_blank + occ_label)[:, :, None] if fused_log_softmax else np.zeros_like(cells)
        g[:, :, blank] -= occ_blank
        g[:, units, y] -= occ_label[:, :U]
        gradient[b, :T, : U + 1] = np.clip(g, -clamp, clamp) if clamp > 0 else g
    return Reference(costs, gradient, occupancy)


@dataclass(frozen=True)
class TdtReference:
    """Costs [B], gradients of each cost [B, T, U+1, V] and [B, T, U+1, D], and label occupancies [B, U, T]."""

    costs: np.ndarray
    gradient: np.ndarray
    duration_gradient: np.ndarray
    occupancy: np.ndarray


def tdt_reference(
    token_logits, duration_logits, targets, logit_lengths, target_lengths, blank=-1, durations=(0, 1, 2, 3, 4),
    sigma=0.0, fastemit_lambda=0.0, delay_penalty=0.0,
) -> TdtReference:  # fmt: skip
    """Return what `rnnt_reference` does for `tdt_loss`, arc by arc. Its recursion is in tdt.py."""
    x, z = np.asarray(token_logits, dtype=np.float64), np.asarray(duration_logits, dtype=np.float64)
    B, Tmax, Uplus, V = x.shape
    blank %= V
    costs, grad, dur_grad = np.zeros(B), np.zeros_like(x), np.zeros_like(z)
    occupancy = np.zeros((B, Uplus - 1, Tmax))
    for b in range(B):
        T, U = int(logit_lengths[b]), int(target_lengths[b])
        log_p, log_d = log_softmax(x[b, :T, : U + 1]), log_softmax(z[b, :T, : U + 1])
        arcs = []  # (from, to, unit, duration index, score). The last ones end in cell (T, U).
        for t in range(T):
            delay = delay_penalty * ((T - 1) / 2 - t)
            for u in range(U + 1):
                for i, d in enumerate(durations):
                    score = log_d[t, u, i] - sigma
                    if d > 0 and (t + d < T or (t + d == T and u == U)):
                        arcs.append(((t, u), (t + d, u), blank, i, score + log_p[t, u, blank]))
                    if u < U and t + d < T:
                        y = int(targets[b, u])
                        arcs.append(((t, u), (t + d, u + 1), y, i, score + log_p[t, u, y] + delay))
        alpha, beta = np.full((T + 1, U + 1), -np.inf), np.full((T + 1, U + 1), -np.inf)
        alpha[0, 0], beta[T, U] = 0.0, 0.0
        arcs.sort(key=lambda arc: arc[0])
        for source, to, _, _, score in arcs:
            alpha[to] = np.logaddexp(alpha[to], alpha[source] + score)
        for source, to, _, _, score in reversed(arcs):
            beta[source] = np.logaddexp(beta[source], beta[to] + score)
        total = beta[0, 0]
        costs[b] = -total
        if total == -np.inf:
            continue
        for (t, u), to, unit, i, score in arcs:
            share = np.exp(alpha[t, u] + score + beta[to] - total)
            if unit != blank:
                occupancy[b, u, t] += share
                share *= 1 + fastemit_lambda
            grad[b, t, u] += share * np.exp(log_p[t, u])
            grad[b, t, u, unit] -= share
            dur_grad[b, t, u] += share * np.exp(log_d[t, u])
            dur_grad[b, t, u, i] -= share
    return TdtReference(costs, grad, dur_grad, occupancy)

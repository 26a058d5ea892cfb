"""Checks of a batch and its options, and the reductions and the warning that all losses share.

Integers on the CPU are checked always, at no measurable cost. Integers on a device are checked only on request.
Guarantees: an index that passes here cannot leave its array in a kernel.
Try: `pytest tests/train/rnnt/test_guards.py`.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
_ANY = 2**63 - 1
REDUCTIONS = ("none", "mean", "sum", "mean_volume", "mean_batch")


class LossBatch(NamedTuple):
    """A batch's integers on the CPU: targets int64 [B, Umax], frames T and units U int64 [B], blank in 0..V-1."""

    y: np.ndarray
    T: np.ndarray
    U: np.ndarray
    blank: int


class Options(NamedTuple):
    """The options of a loss, by the names that the kernels have for them."""

    clamp: float = -1.0  # limit of each element of a cost's gradient, or none if it is not positive
    fused: bool = True  # False: the logits are log-probabilities already
    fastemit: float = 0.0
    delay: float = 0.0
    inplace: bool = False
    eps: float = 0.0
    sigma: float = 0.0  # tdt_loss: subtracted from each arc's log-probability
    durations: tuple[int, ...] = ()  # tdt_loss: frames that an arc can move on by
    relu: bool = False  # rnnt_loss_joint: relu instead of tanh
    multiply: bool = False  # rnnt_loss_joint: the product of the two states instead of their sum


def make_options(
    reduction: str, fastemit_lambda: float, delay_penalty: float, clamp: float = -1, eps: float = 0,
    sigma: float = 0, **rest: Any,
) -> Options:  # fmt: skip
    """Return the options of a loss. Raises ValueError for a number or a reduction that no loss has."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"rnnt loss: reduction {reduction!r} is unknown. Expected one of {', '.join(REDUCTIONS)}.")
    if not (0 <= fastemit_lambda < math.inf and 0 <= eps < math.inf):
        name, value = ("eps", eps) if 0 <= fastemit_lambda < math.inf else ("fastemit_lambda", fastemit_lambda)
        raise ValueError(f"rnnt loss: {name} {value} is out of range. Expected 0 or more.")
    if not -math.inf < delay_penalty < math.inf:
        raise ValueError(f"rnnt loss: delay_penalty {delay_penalty} is out of range. Expected a finite number.")
    return Options(
        float(clamp), fastemit=float(fastemit_lambda), delay=float(delay_penalty), eps=float(eps), sigma=float(sigma),
        **rest,
    )  # fmt: skip


def reduce(costs: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """Return the costs [B] as they are for "none", or else as a scalar, which is 0 for an empty batch."""
    return costs if reduction == "none" else divide(costs.sum(), costs.shape[0], target_lengths, reduction)


def divide(total: Tensor, count: int, target_lengths: Tensor, reduction: str) -> Tensor:
    """Return the share of a total, or of its gradient, that the reduction counts for a batch of `count` utterances."""
    if reduction == "mean_volume":
        return total / target_lengths.sum().clamp(min=1).to(total.device)
    return total / max(1, count) if reduction.startswith("mean") else total


def warn_nan(costs: np.ndarray, batch: LossBatch) -> None:
    """Warn of each utterance with a cost of NaN."""
    if not any(cost != cost for cost in costs.tolist()):  # For a small batch numpy takes several times as long.
        return
    for b in np.flatnonzero(np.isnan(costs)):
        warnings.warn(
            f"rnnt loss: row {b} of the batch (logit length {batch.T[b]}, target length {batch.U[b]}) has a loss of "
            "NaN, because its logits hold NaN or +infinity.",
            RuntimeWarning,
            stacklevel=3,
        )


def _integers(name: str, tensor: Tensor, dim: int) -> np.ndarray:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"rnnt loss: {name} is a {type(tensor).__name__}. Expected a tensor.")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"rnnt loss: {name} is of {tensor.dtype}. Expected int32 or int64.")
    if tensor.dim() != dim:
        raise ValueError(f"rnnt loss: {name} has shape {tuple(tensor.shape)}. Expected {dim} dimension(s).")
    return np.ascontiguousarray((tensor if tensor.is_cpu else tensor.cpu()).numpy(), np.int64)


@cache
def _kernels() -> Any:
    """Return the module with `sound`. numba is loaded when a loss is first computed."""
    from .cpu import plan

    return plan


def check_batch(
    targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int, vocabulary: int,
    max_frames: int | None = None, max_units: int | None = None,
) -> LossBatch:  # fmt: skip
    """Return the batch's integers, checked. max_frames and max_units are what the logits have, None if packed.

    Raises TypeError for a tensor of another type, and ValueError for a length, a target or a blank out of range. The
    text names the row and its lengths.
    """
    y = _integers("targets", targets, 2)
    T = _integers("logit_lengths", logit_lengths, 1)
    U = _integers("target_lengths", target_lengths, 1)
    B = y.shape[0]
    if T.size != B or U.size != B:
        raise ValueError(
            f"rnnt loss: targets have {B} rows, logit_lengths {T.size} and target_lengths {U.size}. "
            "Expected the same number."
        )
    if vocabulary < 1:
        raise ValueError("rnnt loss: the logits have no vocabulary. Their last dimension is 0.")
    if not -vocabulary <= blank < vocabulary:
        raise ValueError(f"rnnt loss: blank {blank} is outside a vocabulary of {vocabulary}.")
    blank %= vocabulary
    most_frames = _ANY if max_frames is None else max_frames
    most_units = y.shape[1] if max_units is None else min(y.shape[1], max_units)
    clean = np.empty_like(y)
    if _kernels().sound(y, T, U, blank, vocabulary, most_frames, most_units, clean):
        return LossBatch(clean, T, U, blank)
    # The kernel only finds that something is wrong. This names it.
    for b in np.flatnonzero((T < 1) | (most_frames < T) | (U < 0) | (most_units < U))[:1]:
        frames = "1 or more" if max_frames is None else f"1..{max_frames}"
        raise ValueError(
            f"rnnt loss: row {b} of the batch has logit length {T[b]} and target length {U[b]}. "
            f"Expected {frames} frames and 0..{most_units} units."
        )
    inside = np.arange(y.shape[1]) < U[:, None]
    for b, u in np.argwhere(inside & ((y < 0) | (y >= vocabulary) | (y == blank)))[:1]:
        why = "the blank" if y[b, u] == blank else f"outside a vocabulary of {vocabulary}"
        raise ValueError(
            f"rnnt loss: row {b} of the batch (logit length {T[b]}, target length {U[b]}) has target {y[b, u]} at "
            f"position {u}, which is {why}."
        )
    raise AssertionError("a batch was refused for no reason")


def check_packed_rows(batch: LossBatch, rows: int) -> None:
    """Raise ValueError unless a packed matrix has exactly the rows that its lengths ask for."""
    expected = int((batch.T * (batch.U + 1)).sum())
    if rows != expected:
        raise ValueError(
            f"rnnt loss: packed logits have {rows} rows, but the lengths ask for sum of T*(U+1) = {expected}."
        )


def check_joint(encoder, predictor, weight, bias, activation: str, combine: str) -> None:
    """Check a joint: encoder [B, T, H], predictor [B, U+1, H], weight [V, H], bias [V] or None, all on one device."""
    tensors = {"encoder": (encoder, 3), "predictor": (predictor, 3), "weight": (weight, 2), "bias": (bias, 1)}
    for name, (tensor, dim) in tensors.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"rnnt loss: {name} is no tensor of floating numbers.")
        if tensor.dim() != dim:
            raise ValueError(f"rnnt loss: {name} has shape {tuple(tensor.shape)}. Expected {dim} dimension(s).")
        if tensor.device != encoder.device:
            raise ValueError(f"rnnt loss: {name} is on {tensor.device}, but encoder is on {encoder.device}.")
    widths = {encoder.shape[2], predictor.shape[2], weight.shape[1]}
    if len(widths) > 1 or encoder.shape[0] != predictor.shape[0]:
        raise ValueError(
            f"rnnt loss: encoder {tuple(encoder.shape)}, predictor {tuple(predictor.shape)} and weight "
            f"{tuple(weight.shape)} do not fit together. Expected [B, T, H], [B, U+1, H], [V, H]."
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"rnnt loss: bias has {bias.shape[0]} units, but weight has {weight.shape[0]}.")
    if predictor.shape[1] < 1:
        raise ValueError("rnnt loss: predictor has no state. Expected U+1 states, the first of them before any unit.")
    for name, value, known in (("activation", activation, ("tanh", "relu")), ("combine", combine, ("add", "mul"))):
        if value not in known:
            raise ValueError(f"rnnt loss: {name} {value!r} is unknown. Expected {known[0]} or {known[1]}.")


def check_band(ranges: Tensor, batch: LossBatch, max_frames: int) -> tuple[np.ndarray, int]:
    """Return the first unit of each frame's band, int64 [B, T], and the width S of ranges, int [B, T, S].

    Raises ValueError for a band without an alignment. A band must start at unit 0 and reach unit U. It must never go
    back or leave a gap.
    """
    if ranges.dim() != 3 or ranges.shape[0] != batch.T.size or ranges.shape[1] != max_frames or ranges.shape[2] < 1:
        raise ValueError(
            f"rnnt loss: ranges have shape {tuple(ranges.shape)}. Expected [B, T, S] = [{batch.T.size}, {max_frames}, "
            "1 or more]."
        )
    width = ranges.shape[2]
    band = _integers("ranges", ranges[:, :, 0], 2).copy()
    for b, (T, U) in enumerate(zip(batch.T, batch.U)):
        steps = np.diff(band[b, :T])
        bad = (steps < 0).any() or (steps >= width).any()
        if bad or band[b, 0] != 0 or not U + 1 - width <= band[b, T - 1] <= U:
            raise ValueError(
                f"rnnt loss: row {b} of the batch (logit length {T}, target length {U}) has a band of {width} units a "
                f"frame that holds no alignment. It must start at unit 0, reach unit {U} and move 0..{width - 1} units "
                "a frame."
            )
        band[b, T:] = 0
    return band, width

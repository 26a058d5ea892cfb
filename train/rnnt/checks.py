"""The guard rails: what a batch must satisfy, and messages that name the batch's row and its lengths.

Checked on the CPU at no cost worth measuring; lengths and targets that live on another device are checked by whoever
brings them over. Invariant: an index that passes here can't leave its array in a kernel.
Run: pytest tests/train/rnnt/test_guards.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

REDUCTIONS = ("none", "mean", "sum", "mean_volume", "mean_batch")


@dataclass(frozen=True)
class LossBatch:
    """A batch's integers on the CPU: targets int64 [B, Umax], frames T and units U int64 [B], blank in 0..V-1."""

    y: np.ndarray
    T: np.ndarray
    U: np.ndarray
    blank: int


def _integers(name: str, tensor: torch.Tensor, dim: int) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"rnnt loss: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rnnt loss: {name} must be int32 or int64, got {tensor.dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"rnnt loss: {name} must have {dim} dimension(s), got shape {tuple(tensor.shape)}")
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=np.int64)


def check_batch(
    targets: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    vocabulary: int,
    max_frames: int | None = None,
    max_units: int | None = None,
) -> LossBatch:
    """The batch's integers, checked.

    targets [B, Umax], lengths [B]. max_frames and max_units are what the logits have room for (None: packed).
    Raises TypeError for a wrong dtype, ValueError for anything outside, with the row of the batch and its lengths.
    """
    from .cpu.plan import sound

    y = _integers("targets", targets, 2)
    T = _integers("logit_lengths", logit_lengths, 1)
    U = _integers("target_lengths", target_lengths, 1)
    B = y.shape[0]
    if T.size != B or U.size != B:
        raise ValueError(
            f"rnnt loss: targets have {B} rows, logit_lengths {T.size}, target_lengths {U.size}: expected one each"
        )
    if vocabulary < 1:
        raise ValueError("rnnt loss: the logits have no vocabulary (last dimension 0)")
    if not -vocabulary <= blank < vocabulary:
        raise ValueError(f"rnnt loss: blank {blank} is outside a vocabulary of {vocabulary}")
    blank %= vocabulary
    room_t = np.iinfo(np.int64).max if max_frames is None else max_frames
    room_u = y.shape[1] if max_units is None else min(y.shape[1], max_units)
    clean = np.empty_like(y)
    if sound(y, T, U, blank, vocabulary, room_t, room_u, clean):
        return LossBatch(clean, T, U, blank)
    # something is not: what, and where
    for b in np.flatnonzero((T < 1) | (room_t < T) | (U < 0) | (room_u < U))[:1]:
        frames = "1 or more" if max_frames is None else f"1..{max_frames}"
        raise ValueError(
            f"rnnt loss: row {b} of the batch has logit length {T[b]} and target length {U[b]}: "
            f"expected {frames} frames and 0..{room_u} units"
        )
    inside = np.arange(y.shape[1]) < U[:, None]
    for b, u in np.argwhere(inside & ((y < 0) | (y >= vocabulary) | (y == blank)))[:1]:
        why = "the blank" if y[b, u] == blank else f"outside a vocabulary of {vocabulary}"
        raise ValueError(
            f"rnnt loss: row {b} of the batch (logit length {T[b]}, target length {U[b]}) has target {y[b, u]} at "
            f"position {u}, which is {why}"
        )
    raise AssertionError("a batch was refused for no reason")


def check_options(reduction: str, fastemit_lambda: float, delay_penalty: float, eps: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"rnnt loss: reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    for name, value in (("fastemit_lambda", fastemit_lambda), ("eps", eps)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"rnnt loss: {name} {value}: expected 0 or more")
    if not -float("inf") < delay_penalty < float("inf"):
        raise ValueError(f"rnnt loss: delay_penalty {delay_penalty}: expected a finite number")


def check_packed_rows(batch: LossBatch, rows: int, padded: tuple[int, int] | None) -> None:
    """A packed matrix must have exactly the rows of its lengths."""
    if padded is None:
        expected = int((batch.T * (batch.U + 1)).sum())
        if rows != expected:
            raise ValueError(
                f"rnnt loss: packed logits have {rows} rows; the lengths ask for sum of T*(U+1) = {expected}"
            )


def check_joint(encoder, predictor, weight, bias, activation: str, combine: str) -> None:
    """encoder [B, T, H], predictor [B, U+1, H], weight [V, H], bias [V] or None: floating, on one device."""
    tensors = {"encoder": (encoder, 3), "predictor": (predictor, 3), "weight": (weight, 2), "bias": (bias, 1)}
    for name, (tensor, dim) in tensors.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"rnnt loss: {name} must be a tensor of floating numbers")
        if tensor.dim() != dim:
            raise ValueError(f"rnnt loss: {name} must have {dim} dimension(s), got shape {tuple(tensor.shape)}")
        if tensor.device != encoder.device:
            raise ValueError(f"rnnt loss: {name} is on {tensor.device}, encoder on {encoder.device}")
    widths = {encoder.shape[2], predictor.shape[2], weight.shape[1]}
    if len(widths) > 1 or encoder.shape[0] != predictor.shape[0]:
        raise ValueError(
            f"rnnt loss: encoder {tuple(encoder.shape)}, predictor {tuple(predictor.shape)} and weight "
            f"{tuple(weight.shape)} don't fit: expected [B, T, H], [B, U+1, H], [V, H]"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"rnnt loss: bias has {bias.shape[0]} units, weight {weight.shape[0]}")
    if predictor.shape[1] < 1:
        raise ValueError("rnnt loss: predictor must have U+1 states: one before the first unit, too")
    if activation not in ("tanh", "relu"):
        raise ValueError(f"rnnt loss: activation {activation!r}: expected tanh or relu")
    if combine not in ("add", "mul"):
        raise ValueError(f"rnnt loss: combine {combine!r}: expected add or mul")


def check_band(ranges: torch.Tensor, batch: LossBatch, max_frames: int) -> tuple[np.ndarray, int]:
    """ranges int [B, T, S], runs of S units, as first units int64 [B, T] and S.

    Every utterance's band must start at unit 0, reach unit U, and never go back or leave a gap: else it holds no
    alignment.
    """
    if ranges.dim() != 3 or ranges.shape[0] != batch.T.size or ranges.shape[1] != max_frames or ranges.shape[2] < 1:
        raise ValueError(
            f"rnnt loss: ranges must be [B, T, S] = [{batch.T.size}, {max_frames}, 1 or more], got "
            f"{tuple(ranges.shape)}"
        )
    width = ranges.shape[2]
    band = _integers("ranges", ranges[:, :, 0], 2).copy()
    for b, (T, U) in enumerate(zip(batch.T, batch.U)):
        steps = np.diff(band[b, :T])
        bad = (steps < 0).any() or (steps >= width).any()
        if bad or band[b, 0] != 0 or not U + 1 - width <= band[b, T - 1] <= U:
            raise ValueError(
                f"rnnt loss: row {b} of the batch (logit length {T}, target length {U}): its band of {width} units a "
                f"frame holds no alignment: it must start at unit 0, reach unit {U} and move 0..{width - 1} a frame"
            )
        band[b, T:] = 0
    return band, width

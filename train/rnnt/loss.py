"""rnnt_loss: the entry point with logits given; picks the implementation by device, binds it to autograd.

Invariant: the forward pass keeps, beside the logits, 12 bytes a cell of the lattice, and the backward pass needs no
more than that (and a gradient, unless in place). Run: pytest tests/train/rnnt/test_loss.py
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .checks import LossBatch, check_band, check_batch, check_options, check_packed_rows
from .cpu import threads
from .cpu.memory import as_rows, fresh_like

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    clamp: float
    fused: bool
    fastemit: float
    delay: float
    inplace: bool
    eps: float


def reduce(costs: torch.Tensor, target_lengths: torch.Tensor, reduction: str) -> torch.Tensor:
    """costs [B] to a scalar: mean and mean_batch over utterances, mean_volume over target units; 0 for no utterance."""
    if reduction == "none":
        return costs
    total = costs.sum()
    if reduction == "sum":
        return total
    if reduction == "mean_volume":
        return total / target_lengths.sum().clamp(min=1).to(costs.device)
    return total / max(1, costs.shape[0])


def warn_nan(costs: np.ndarray, batch: LossBatch) -> None:
    for b in np.flatnonzero(np.isnan(costs)):
        warnings.warn(
            f"rnnt loss: row {b} of the batch (logit length {batch.T[b]}, target length {batch.U[b]}) has a loss of "
            "NaN: its logits hold NaN or +infinity",
            RuntimeWarning,
            stacklevel=3,
        )


class _CpuLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, batch: LossBatch, padded, band, options: Options, want_occupancy: bool):
        from .cpu.lattice import CLOSED, forward, unpack_occupancy
        from .plan import make_plan, make_tasks

        x = as_rows(logits)
        plan = make_plan(batch, padded, band)
        tasks, left = make_tasks(batch.T, batch.U + 1, x.shape[1])
        exact = logits.dtype == torch.float64
        kind = np.float64 if exact else np.float32
        lse, blank_lp, label_lp = (np.empty(plan.total, kind) for _ in range(3))
        if plan.pruned:
            blank_lp.fill(CLOSED)
            label_lp.fill(CLOSED)
        count, width = min(threads.thread_count(), len(tasks)), int(batch.U.max(initial=0)) + 1
        alpha, costs = np.empty((count, plan.longest)), np.zeros(batch.T.size)
        work, work64 = np.empty((count, 2, width), kind), np.empty((count, width))
        threads.run(
            forward, count, x, batch.y, batch.T, batch.U, plan.first, plan.per_frame, plan.band,
            plan.at, plan.base, tasks, np.zeros(1, np.int64), left, lse, blank_lp, label_lp, alpha, work,
            work64, costs, batch.blank,
            float(options.delay), options.fused, exact,
        )  # fmt: skip
        warn_nan(costs, batch)
        ctx.save_for_backward(logits)
        ctx.state = (batch, plan, options, lse, blank_lp, label_lp)
        occupancy = None
        if want_occupancy:
            shape = (batch.T.size, batch.y.shape[1], padded[0] if padded else int(batch.T.max(initial=0)))
            occupancy = torch.zeros(shape)
            unpack_occupancy(batch.T, batch.U, plan.at, plan.base, label_lp, occupancy.numpy())
            ctx.mark_non_differentiable(occupancy)
        return torch.from_numpy(costs).to(torch.float64 if exact else torch.float32), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        from .cpu.lattice import backward
        from .plan import make_tasks

        if ctx.state is None:
            raise RuntimeError(
                "rnnt loss: second backward of a loss in place: the first wrote the gradient over the logits; "
                "use inplace=False to keep them"
            )
        batch, plan, options, lse, occ_blank, occ_label = ctx.state
        (logits,) = ctx.saved_tensors
        if options.inplace:
            ctx.state = None
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        else:
            gradient = fresh_like(logits)
        x = as_rows(logits)
        tasks, _ = make_tasks(plan.frames, plan.per_frame, x.shape[1])
        threads.run(
            backward, threads.thread_count(), x, as_rows(gradient), options.inplace, batch.y, batch.T, batch.U,
            plan.first, plan.per_frame, plan.band, plan.at, plan.base, tasks, np.zeros(1, np.int64),
            lse, occ_blank, occ_label,
            grad_costs.detach().double().contiguous().numpy(), batch.blank, float(options.clamp), options.fused,
            float(options.fastemit), float(options.eps),
        )  # fmt: skip
        return gradient, None, None, None, None, None


def rnnt_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = -1,
    clamp: float = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
    *,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    layout: Literal["padded", "packed"] = "padded",
    inplace: bool = False,
    eps: float = 0.0,
    ranges: torch.Tensor | None = None,
    return_occupancy: bool = False,
    check: bool = False,
) -> Any:
    """RNN-T loss (Graves 2012); torchaudio.functional.rnnt_loss's signature and results, then more.

    logits: [B, T, U+1, V], or packed [sum of T*(U+1), V] without padding; float16, bfloat16, float32 or float64,
        computed in float32 (float64). targets [B, U], logit_lengths [B], target_lengths [B]: int32 or int64.
    blank: unit of the blank, negative counts from the end. clamp > 0 limits every element of a cost's gradient.
    reduction: none, sum, mean = mean_batch (over utterances), mean_volume (over target units).
    fused_log_softmax: off when logits are log-probabilities already.
    fastemit_lambda, delay_penalty: see reference.py. inplace: the gradient is written over the logits.
    eps: rows whose occupancy is eps or less get a gradient of 0.
    ranges: int [B, T, S], units of every frame (see pruned.py): logits are then [B, T, S, V], of those units alone.
    return_occupancy: returns (loss, occupancy float32 [B, U, T]): P(unit u emitted at frame t), detached, padding 0.

    check: integers on the CPU are always checked; those on a device only with check=True, which waits for it.

    Returns float32 (float64 for float64). An utterance without any alignment costs infinity and has gradient 0; one
    with NaN among its logits costs NaN, is named in a RuntimeWarning, and leaves the others unharmed.
    Raises ValueError or TypeError that name the row of the batch and its lengths.
    """
    check_options(reduction, fastemit_lambda, delay_penalty, eps)
    if logits.dtype not in DTYPES:
        raise TypeError(f"rnnt loss: logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if layout not in ("padded", "packed"):
        raise ValueError(f"rnnt loss: layout {layout!r}: expected padded or packed")
    dim = 4 if layout == "padded" else 2
    if logits.dim() != dim:
        raise ValueError(f"rnnt loss: {layout} logits must have {dim} dimensions, got shape {tuple(logits.shape)}")
    padded = (logits.shape[1], logits.shape[2]) if layout == "padded" else None
    if padded and logits.shape[0] != targets.shape[0]:
        raise ValueError(f"rnnt loss: logits have {logits.shape[0]} rows, targets {targets.shape[0]}")
    if ranges is not None and padded is None:
        raise ValueError("rnnt loss: ranges need padded logits [B, T, S, V]")
    room = (padded[0], padded[1] - 1 if ranges is None else None) if padded else (None, None)
    if inplace and not logits.is_contiguous():
        raise ValueError("rnnt loss: inplace needs contiguous logits: their memory becomes the gradient")
    options = Options(clamp, fused_log_softmax, fastemit_lambda, delay_penalty, inplace, eps)
    on_cpu = all(v.device.type == "cpu" for v in (targets, logit_lengths, target_lengths))
    if logits.device.type == "cuda" and not (on_cpu or check):
        from .cuda.launch import rnnt_loss_cuda

        costs, occupancy = rnnt_loss_cuda(
            logits.contiguous(), (targets, logit_lengths, target_lengths), blank, padded, options,
            None if ranges is None else ranges[:, :, 0], return_occupancy,
        )  # fmt: skip
    else:
        batch = check_batch(targets, logit_lengths, target_lengths, blank, logits.shape[-1], *room)
        check_packed_rows(batch, logits.shape[0], padded)
        band = None
        if ranges is not None and padded is not None:
            band, width = check_band(ranges, batch, padded[0])
            if width != padded[1]:
                raise ValueError(f"rnnt loss: ranges are {width} units wide, logits {padded[1]}")
        if logits.device.type == "cuda":
            from .cuda.launch import rnnt_loss_cuda

            first = None if band is None else torch.from_numpy(band).to(logits.device, non_blocking=True)
            costs, occupancy = rnnt_loss_cuda(
                logits.contiguous(), batch, blank, padded, options, first, return_occupancy
            )
        elif logits.device.type == "cpu":
            costs, occupancy = _CpuLoss.apply(logits.contiguous(), batch, padded, band, options, return_occupancy)
        else:
            raise ValueError(f"rnnt loss: no implementation for device {logits.device}")
    loss = reduce(costs, target_lengths, reduction)
    return (loss, occupancy) if return_occupancy else loss


class RNNTLoss(torch.nn.Module):
    """rnnt_loss as a module: torchaudio.transforms.RNNTLoss's arguments, and by keyword all others of rnnt_loss."""

    def __init__(
        self,
        blank: int = -1,
        clamp: float = -1.0,
        reduction: str = "mean",
        fused_log_softmax: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = {
            "blank": blank, "clamp": clamp, "reduction": reduction, "fused_log_softmax": fused_log_softmax, **options
        }  # fmt: skip
        inspect.signature(rnnt_loss).bind(None, None, None, None, **self.options)  # a wrong name is an error here

    def forward(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        logit_lengths: torch.Tensor,
        target_lengths: torch.Tensor,
    ) -> Any:
        return rnnt_loss(logits, targets, logit_lengths, target_lengths, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

"""tdt_loss: the token-and-duration transducer (Xu et al. 2023, arXiv 2304.06795), on the stages of rnnt_loss.

An arc emits the blank or the next unit and moves on by one of the durations, each with its own probability:

    alpha(t, u) = logadd over d > 0 of  alpha(t-d, u)   + blank(t-d, u)   + dur(d | t-d, u)   - sigma
                  and over all d of     alpha(t-d, u-1) + label(t-d, u-1) + dur(d | t-d, u-1) - sigma
    log P(y)    = logadd over d > 0 of  alpha(T-d, U)   + blank(T-d, U)   + dur(d | T-d, U)   - sigma

Invariant: values and gradients equal tdt_reference's. Run: pytest tests/train/rnnt/test_tdt.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .checks import LossBatch, check_batch, check_options
from .cpu import threads
from .cpu.memory import as_rows, fresh_like
from .loss import DTYPES, Options, reduce, warn_nan


class _CpuTdtLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, duration_logits, batch: LossBatch, durations, options: dict, want_occupancy: bool):
        from .cpu.lattice import unpack_occupancy
        from .cpu.tdt import tdt_forward
        from .plan import make_plan, make_tasks

        x, d_rows = as_rows(logits), as_rows(duration_logits)
        plan = make_plan(batch, (logits.shape[1], logits.shape[2]))
        tasks, left = make_tasks(batch.T, batch.U + 1, x.shape[1])
        exact = logits.dtype == torch.float64
        kind = np.float64 if exact else np.float32
        lse, blank_lp, label_lp = (np.empty(plan.total, kind) for _ in range(3))
        dur = np.empty((durations.size, plan.total), kind)
        alpha, beta, costs = np.empty(plan.total), np.empty(plan.total), np.zeros(batch.T.size)
        count, width = threads.thread_count(), int(batch.U.max(initial=0)) + 1
        threads.run(
            tdt_forward, count, x, d_rows, batch.y, batch.T, batch.U, plan.first, plan.per_frame, plan.band, plan.at,
            plan.base, tasks, np.zeros(1, np.int64), left, lse, blank_lp, label_lp, dur, durations, alpha, beta,
            np.empty((count, 2, width), kind), np.empty((count, width)), costs, batch.blank, options["delay"],
            options["sigma"], options["fastemit"], exact,
        )  # fmt: skip
        warn_nan(costs, batch)
        ctx.save_for_backward(logits, duration_logits)
        ctx.state = (batch, plan, options, lse, blank_lp, label_lp, dur)
        occupancy = None
        if want_occupancy:
            occupancy = torch.zeros(batch.T.size, batch.y.shape[1], logits.shape[1])
            unpack_occupancy(batch.T, batch.U, plan.at, plan.base, label_lp, occupancy.numpy())
            ctx.mark_non_differentiable(occupancy)
        return torch.from_numpy(costs).to(torch.float64 if exact else torch.float32), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        from .cpu.lattice import backward
        from .cpu.tdt import duration_backward
        from .plan import make_tasks

        batch, plan, options, lse, occ_blank, occ_label, dur = ctx.state
        logits, duration_logits = ctx.saved_tensors
        gradient, duration_gradient = fresh_like(logits), torch.zeros_like(duration_logits)
        x, count = as_rows(logits), threads.thread_count()
        tasks, _ = make_tasks(plan.frames, plan.per_frame, x.shape[1])
        scale = grad_costs.detach().double().contiguous().numpy()
        threads.run(
            backward, count, x, as_rows(gradient), False, batch.y, batch.T, batch.U, plan.first, plan.per_frame,
            plan.band, plan.at, plan.base, tasks, np.zeros(1, np.int64), lse, occ_blank, occ_label, scale, batch.blank,
            -1.0, True, options["fastemit"], 0.0,
        )  # fmt: skip
        threads.run(
            duration_backward, count, as_rows(duration_logits), as_rows(duration_gradient), batch.T, batch.U,
            plan.first, plan.per_frame, plan.at, plan.base, np.zeros(1, np.int64), dur, scale,
        )  # fmt: skip
        return gradient, duration_gradient, None, None, None, None


def _on_cuda(tokens, steps_logits, batch: LossBatch, steps, options: dict, want_occupancy: bool):
    from .cuda.joint import CudaTdtLoss
    from .cuda.launch import device_batch

    integers = tuple(torch.from_numpy(v) for v in (batch.y, batch.T, batch.U))
    padded, V = (tokens.shape[1], tokens.shape[2]), tokens.shape[3]
    d = device_batch(integers, batch.blank, V, 0, padded, tokens.device)
    o = Options(-1.0, True, options["fastemit"], options["delay"], False, 0.0)
    return CudaTdtLoss.apply(tokens, steps_logits, d, o, steps.tolist(), options["sigma"], want_occupancy)


def tdt_loss(
    token_logits: torch.Tensor,
    duration_logits: torch.Tensor,
    targets: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = -1,
    durations: Sequence[int] = (0, 1, 2, 3, 4),
    sigma: float = 0.0,
    reduction: str = "mean",
    *,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    return_occupancy: bool = False,
) -> Any:
    """Token-and-duration transducer loss.

    token_logits [B, T, U+1, V] and duration_logits [B, T, U+1, D]: two softmaxes; durations: D different frames >= 0,
    one of them > 0. targets [B, U], lengths [B]: int32 or int64. sigma: what every arc's log-probability is lowered by.
    The rest is rnnt_loss's: reductions (mean is over utterances), occupancies, errors, NaN and infinity.
    """
    check_options(reduction, fastemit_lambda, delay_penalty, 0.0)
    if token_logits.dtype not in DTYPES or token_logits.dtype != duration_logits.dtype:
        raise TypeError(
            f"tdt loss: token and duration logits must share a floating dtype, got {token_logits.dtype} and "
            f"{duration_logits.dtype}"
        )
    if token_logits.dim() != 4 or token_logits.shape[:3] != duration_logits.shape[:3]:
        raise ValueError(
            f"tdt loss: expected token logits [B, T, U+1, V] and duration logits [B, T, U+1, D], got "
            f"{tuple(token_logits.shape)} and {tuple(duration_logits.shape)}"
        )
    steps = np.asarray(list(durations), dtype=np.int64)
    if steps.size != duration_logits.shape[3] or len(set(steps.tolist())) != steps.size:
        raise ValueError(f"tdt loss: {duration_logits.shape[3]} duration logits need as many different durations")
    if steps.size == 0 or (steps < 0).any() or not (steps > 0).any():
        raise ValueError(f"tdt loss: durations {steps.tolist()}: expected 0 or more, and one above 0")
    if token_logits.shape[0] != targets.shape[0]:
        raise ValueError(f"tdt loss: logits have {token_logits.shape[0]} rows, targets {targets.shape[0]}")
    room = (token_logits.shape[1], token_logits.shape[2] - 1)
    batch = check_batch(targets, logit_lengths, target_lengths, blank, token_logits.shape[3], *room)
    tokens, steps_logits = token_logits.contiguous(), duration_logits.contiguous()
    options = {"sigma": float(sigma), "fastemit": float(fastemit_lambda), "delay": float(delay_penalty)}
    if token_logits.device.type == "cpu":
        costs, occupancy = _CpuTdtLoss.apply(tokens, steps_logits, batch, steps, options, return_occupancy)
    elif token_logits.device.type == "cuda":
        costs, occupancy = _on_cuda(tokens, steps_logits, batch, steps, options, return_occupancy)
    else:
        raise ValueError(f"tdt loss: no implementation for device {token_logits.device}")
    loss = reduce(costs, target_lengths, reduction)
    return (loss, occupancy) if return_occupancy else loss

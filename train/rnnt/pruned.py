"""The pruned mode: a cheap additive joint gives occupancies, the full joint then runs on a band of units a frame.

As in k2 (Kuang et al. 2022, arXiv 2206.13236): rnnt_loss_simple on two projections am [B, T, V] and lm [B, U+1, V],
prune_ranges on its occupancies, then rnnt_loss_joint(..., ranges=ranges) or rnnt_loss(..., ranges=ranges); train on
the sum of both losses. Unlike k2's, the band is the best one there is (dynamic programming), not the best of every
frame mended afterwards. Invariant: a band always holds an alignment. Run: pytest tests/train/rnnt/test_pruned.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .checks import LossBatch, check_batch, check_options
from .cpu import threads
from .loss import reduce, rnnt_loss, warn_nan


class _CpuLattice(torch.autograd.Function):
    """costs [B] of arcs given as dense log-probabilities [B, T, U+1]; also the cells' occupancies gamma."""

    @staticmethod
    def forward(ctx: Any, blank_lp, label_lp, batch: LossBatch, fastemit: float):
        from .cpu.lattice import lattices
        from .cpu.pruned import to_dense, to_diagonals
        from .plan import make_plan

        exact = blank_lp.dtype == torch.float64
        plan = make_plan(batch, (blank_lp.shape[1], blank_lp.shape[2]))
        arcs = [np.empty(plan.total, np.float64 if exact else np.float32) for _ in range(2)]
        for dense, own in zip((blank_lp, label_lp), arcs):
            to_diagonals(dense.detach().contiguous().numpy(), batch.T, batch.U, plan.at, plan.base, own)
        count, costs = min(threads.thread_count(), batch.T.size), np.zeros(batch.T.size)
        threads.run(
            lattices, count, batch.T, batch.U, plan.at, plan.base, np.zeros(1, np.int64), *arcs,
            np.empty((count, plan.longest)), costs, exact,
        )  # fmt: skip
        warn_nan(costs, batch)
        dense_occupancies = []
        for own in arcs:
            out = torch.zeros_like(blank_lp, memory_format=torch.contiguous_format)
            to_dense(own, batch.T, batch.U, plan.at, plan.base, out.numpy())
            dense_occupancies.append(out)
        ctx.save_for_backward(*dense_occupancies)
        ctx.fastemit = fastemit
        gamma = dense_occupancies[0] + dense_occupancies[1]
        ctx.mark_non_differentiable(gamma)
        return torch.from_numpy(costs).to(blank_lp.dtype), gamma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        scale = -grad_costs.view(-1, 1, 1)
        occ_blank, occ_label = ctx.saved_tensors
        return occ_blank * scale, occ_label * (scale * (1 + ctx.fastemit)), None, None


def rnnt_loss_simple(
    am: torch.Tensor,
    lm: torch.Tensor,
    targets: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = -1,
    reduction: str = "mean",
    *,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RNN-T loss of the logits am[t] + lm[u], without ever adding them up.

    am [B, T, V] from the encoder, lm [B, U+1, V] from the predictor: their softmax's sum over V is a matrix product of
    exponentials. Returns (loss, gamma [B, T, U+1]): the share of the alignments that visits a cell, detached.
    fastemit_lambda, delay_penalty: as in rnnt_loss.
    """
    check_options(reduction, fastemit_lambda, delay_penalty, 0.0)
    if am.dim() != 3 or lm.dim() != 3 or am.shape[0] != lm.shape[0] or am.shape[2] != lm.shape[2]:
        raise ValueError(
            f"rnnt loss: expected am [B, T, V] and lm [B, U+1, V], got {tuple(am.shape)} and {tuple(lm.shape)}"
        )
    batch = check_batch(
        targets, logit_lengths, target_lengths, blank, am.shape[2], am.shape[1], min(lm.shape[1] - 1, targets.shape[1])
    )
    with torch.autocast(am.device.type, enabled=False):
        kind = torch.float64 if am.dtype == torch.float64 else torch.float32
        am, lm = am.to(kind), lm.to(kind)
        device = am.device
        y, T, U = (torch.from_numpy(v).to(device, non_blocking=True) for v in (batch.y, batch.T, batch.U))
        inside_t = (torch.arange(am.shape[1], device=device) < T[:, None])[:, :, None]
        inside_u = (torch.arange(lm.shape[1], device=device) <= U[:, None])[:, :, None]
        am, lm = torch.where(inside_t, am, 0), torch.where(inside_u, lm, 0)  # NaN in padding must not matter
        am_max, lm_max = am.detach().amax(2, keepdim=True), lm.detach().amax(2, keepdim=True)
        product = torch.exp(am - am_max) @ torch.exp(lm - lm_max).transpose(1, 2)
        norm = product.clamp(min=torch.finfo(kind).tiny).log() + am_max + lm_max.transpose(1, 2)
        y = torch.nn.functional.pad(y, (0, max(0, lm.shape[1] - y.shape[1])))[:, : lm.shape[1]]
        label = am.gather(2, y[:, None].expand(-1, am.shape[1], -1)) + lm.gather(2, y[:, :, None]).transpose(1, 2)
        blank_lp = am[:, :, batch.blank, None] + lm[:, None, :, batch.blank] - norm
        if delay_penalty:
            frames = torch.arange(am.shape[1], dtype=kind, device=device)
            middle = (T.to(kind) - 1) / 2
            label = label + delay_penalty * (middle[:, None] - frames)[:, :, None]
        if device.type == "cpu":
            costs, gamma = _CpuLattice.apply(blank_lp, label - norm, batch, fastemit_lambda)
        else:  # a lattice is a loss of two units whose logits are log-probabilities already
            arcs = torch.stack([blank_lp, label - norm], dim=-1)
            ones = torch.ones(batch.T.size, lm.shape[1] - 1, dtype=torch.int64)
            lengths = torch.from_numpy(batch.T), torch.from_numpy(batch.U)
            with torch.enable_grad():  # gamma is wanted where no gradient is, too
                arcs = arcs if arcs.requires_grad else arcs.requires_grad_()
                costs = rnnt_loss(
                    arcs, ones, *lengths, blank=0, reduction="none", fused_log_softmax=False,
                    fastemit_lambda=fastemit_lambda,
                )  # fmt: skip
                counted = -torch.autograd.grad(costs.sum(), arcs, retain_graph=True)[0]
            gamma = counted[..., 0] + counted[..., 1] / (1 + fastemit_lambda)
    return reduce(costs, target_lengths, reduction), gamma


def prune_ranges(
    gamma: torch.Tensor, logit_lengths: torch.Tensor, target_lengths: torch.Tensor, width: int
) -> torch.Tensor:
    """The band of `width` units a frame that holds most occupancy: int64 [B, T, width], units of every frame.

    gamma [B, T, U+1] from rnnt_loss_simple. A band starts at unit 0, ends at unit U, never goes back, and moves on by
    less than its width, so that it always holds an alignment; where width > U+1, its last units are outside.
    Raises ValueError, with the row, where an utterance has too few frames for the width: T * (width-1) < U.
    """
    from .cpu.pruned import best_band

    B, Tmax, _ = gamma.shape
    T, U = (v.detach().cpu().numpy().astype(np.int64) for v in (logit_lengths, target_lengths))
    if width < 1:
        raise ValueError(f"rnnt loss: a band of {width} units: expected 1 or more")
    for b in np.flatnonzero(T * (width - 1) < U)[:1]:
        raise ValueError(
            f"rnnt loss: row {b} of the batch (logit length {T[b]}, target length {U[b]}): a band of {width} units a "
            f"frame holds no alignment; expected {-(-U[b] // T[b]) + 1} or more"
        )
    band = np.zeros((B, Tmax), np.int64)
    for b in range(B):
        own = np.ascontiguousarray(gamma[b, : T[b], : U[b] + 1].detach().cpu().numpy(), dtype=np.float64)
        best_band(own, width, band[b])
    return (torch.from_numpy(band)[:, :, None] + torch.arange(width)).to(gamma.device)

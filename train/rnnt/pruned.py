"""The pruned loss: a cheap additive joint gives occupancies, and the full joint then runs on a band of units a frame.

This is k2's method (Kuang et al. 2022, arXiv 2206.13236). Call `rnnt_loss_simple` on two projections am [B, T, V] and
lm [B, U+1, V], and `prune_ranges` on its occupancies. Then call `rnnt_loss_joint(..., ranges=ranges)` or
`rnnt_loss(..., ranges=ranges)`, and train on the sum of both losses. k2 takes the best units of each frame and corrects
them afterwards. Here the band is the best one of all, by dynamic programming.
Guarantees: a band always holds an alignment.
Try: `pytest tests/train/rnnt/test_pruned.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import check_batch, make_options, reduce
from .loss import rnnt_loss


def rnnt_loss_simple(
    am: Tensor, lm: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor,
    blank: int = -1, reduction: str = "mean", *, fastemit_lambda: float = 0.0, delay_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the RNN-T loss of the logits am[t] + lm[u], and how often each cell is visited.

    The logits are never made. The sum over V in their softmax is a matrix product of exponentials.

    Arguments:
        am: [B, T, V], from the encoder.
        lm: [B, U+1, V], from the predictor.

    The other arguments and the errors are those of `rnnt_loss`.

    Returns:
        A pair of the loss and gamma [B, T, U+1], detached: the share of the alignments' probability that visits a cell.
    """
    make_options(reduction, fastemit_lambda, delay_penalty)
    if am.dim() != 3 or lm.dim() != 3 or am.shape[0] != lm.shape[0] or am.shape[2] != lm.shape[2]:
        raise ValueError(
            f"rnnt loss: am has shape {tuple(am.shape)}, lm {tuple(lm.shape)}. Expected [B, T, V] and [B, U+1, V]."
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
        am, lm = torch.where(inside_t, am, 0), torch.where(inside_u, lm, 0)  # NaN in the padding must not matter.
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
            from .cpu.launch import CpuLattice

            costs, gamma = CpuLattice.apply(blank_lp, label - norm, batch, fastemit_lambda)
        else:  # A lattice is a loss of two units whose logits are log-probabilities already.
            arcs = torch.stack([blank_lp, label - norm], dim=-1)
            ones = torch.ones(batch.T.size, lm.shape[1] - 1, dtype=torch.int64)
            lengths = torch.from_numpy(batch.T), torch.from_numpy(batch.U)
            with torch.enable_grad():  # gamma is needed without a gradient, too.
                arcs = arcs if arcs.requires_grad else arcs.requires_grad_()
                costs = rnnt_loss(
                    arcs, ones, *lengths, blank=0, reduction="none", fused_log_softmax=False,
                    fastemit_lambda=fastemit_lambda,
                )  # fmt: skip
                counted = -torch.autograd.grad(costs.sum(), arcs, retain_graph=True)[0]
            gamma = counted[..., 0] + counted[..., 1] / (1 + fastemit_lambda)
    return reduce(costs, target_lengths, reduction), gamma


def prune_ranges(gamma: Tensor, logit_lengths: Tensor, target_lengths: Tensor, width: int) -> Tensor:
    """Return the band of `width` units a frame that holds the most occupancy.

    A band starts at unit 0, ends at unit U and never goes back. It moves on by less than its width, so it always holds
    an alignment.

    Arguments:
        gamma: [B, T, U+1], from `rnnt_loss_simple`.
        logit_lengths, target_lengths: int32 or int64 [B].
        width: 1 or more. If it is more than U+1, the last units of a band are outside.

    Returns:
        The units of each frame, int64 [B, T, width].

    Raises:
        ValueError: an utterance has too few frames for the width, T * (width-1) < U. The text names its row.
    """
    from .cpu.pruned import best_band

    B, Tmax, _ = gamma.shape
    T, U = (v.detach().cpu().numpy().astype(np.int64) for v in (logit_lengths, target_lengths))
    if width < 1:
        raise ValueError(f"rnnt loss: a band is {width} units wide. Expected 1 or more.")
    for b in np.flatnonzero(T * (width - 1) < U)[:1]:
        raise ValueError(
            f"rnnt loss: row {b} of the batch (logit length {T[b]}, target length {U[b]}) has no alignment in a band "
            f"of {width} units a frame. Expected {-(-U[b] // T[b]) + 1} or more."
        )
    band = np.zeros((B, Tmax), np.int64)
    for b in range(B):
        own = np.ascontiguousarray(gamma[b, : T[b], : U[b] + 1].detach().cpu().numpy(), dtype=np.float64)
        best_band(own, width, band[b])
    return (torch.from_numpy(band)[:, :, None] + torch.arange(width)).to(gamma.device)

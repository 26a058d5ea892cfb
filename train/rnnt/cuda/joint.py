"""rnnt_loss_joint and tdt_loss on CUDA, with the kernels of the plain loss; matrix products are torch's (cuBLAS).

A tile of the joint is a run of frames of one utterance with all its units, made by torch, read by the kernels, written
over by the gradient kernel, and multiplied back. eps zeroes rows but skips no products: that would need a number from
the device. Invariant: no call waits for the device. No GPU has run this yet. Run: pytest tests/train/rnnt/test_cuda.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..loss import Options
from .launch import DeviceBatch, _Launch, kept_arrays, stage_gradient, stage_lattice, stage_rows, unpack_occupancy

TILE_ELEMENTS = 1 << 24  # logits of a tile: large enough to fill a GPU, small beside its memory


def _compute_type(encoder: torch.Tensor) -> torch.dtype:
    return encoder.dtype if encoder.dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32


def _tiles(d: DeviceBatch, vocabulary: int, longest: list[int] | None):
    """(utterance, frames from, to); longest: the utterances' frames where the host knows them."""
    step = max(1, TILE_ELEMENTS // max(1, vocabulary * d.width))
    for b in range(d.T.shape[0]):
        frames = d.frames if longest is None else longest[b]
        for t0 in range(0, frames, step):
            yield b, t0, min(t0 + step, frames)


def _units(d: DeviceBatch, p, b, t0, t1, pruned: bool) -> torch.Tensor | None:
    """Units of the tile's rows [frames, width] where they are a band; None where they are all, in order."""
    if not pruned:
        return None
    units = d.band[b, t0:t1, None] + torch.arange(d.width, device=p.device)
    return units.clamp(max=p.shape[1] - 1)


def _hidden(e, p, b, t0, t1, units, relu, multiply) -> torch.Tensor:
    states = p[b] if units is None else p[b][units]
    pre = e[b, t0:t1, None] * states if multiply else e[b, t0:t1, None] + states
    return (torch.relu_(pre) if relu else torch.tanh_(pre)).view(-1, e.shape[2])


class CudaJointLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder, predictor, weight, bias, d: DeviceBatch, o: Options, shape, longest, want):
        relu, multiply, pruned = shape
        kind = _compute_type(encoder)
        with torch.autocast(encoder.device.type, enabled=False):
            e, p, w = (v.detach().to(kind) for v in (encoder, predictor, weight))
            c = torch.zeros_like(w[:, 0]) if bias is None else bias.detach().to(kind)
            launch = _Launch(w.t())
            kept = kept_arrays(d, kind)
            for b, t0, t1 in _tiles(d, w.shape[0], longest):
                units = _units(d, p, b, t0, t1, pruned)
                logits = torch.addmm(c, _hidden(e, p, b, t0, t1, units, relu, multiply), w.t())
                first = torch.full_like(d.first, -t0 * d.width)
                stage_rows(launch, logits, d, o, kept, b, 1, t0, t1, first)
        costs = stage_lattice(launch, d, kept)
        ctx.save_for_backward(encoder, predictor, weight, bias)
        ctx.state = (d, o, shape, longest, kept)
        occupancy = None
        if want:
            occupancy = unpack_occupancy(launch, d, kept[2], d.frames)
            ctx.mark_non_differentiable(occupancy)
        return costs.to(kept[0].dtype), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        inputs = ctx.saved_tensors
        encoder, predictor, weight, bias = inputs
        d, o, (relu, multiply, pruned), longest, kept = ctx.state
        kind = _compute_type(encoder)
        wide = kept[0].dtype
        with torch.autocast(encoder.device.type, enabled=False):
            e, p, w = (v.detach().to(kind) for v in (encoder, predictor, weight))
            c = torch.zeros_like(w[:, 0]) if bias is None else bias.detach().to(kind)
            launch = _Launch(w.t())
            scale = grad_costs.detach().to(wide).contiguous()
            grads = [torch.zeros_like(v, dtype=wide) for v in (e, p, w, c)]
            for b, t0, t1 in _tiles(d, w.shape[0], longest):
                units = _units(d, p, b, t0, t1, pruned)
                hidden = _hidden(e, p, b, t0, t1, units, relu, multiply)
                logits = torch.addmm(c, hidden, w.t())
                first = torch.full_like(d.first, -t0 * d.width)
                stage_gradient(launch, logits, logits, d, o, kept, scale, b, 1, t0, t1, first)
                grads[2] += logits.t() @ hidden
                grads[3] += logits.sum(0, dtype=wide)
                back = (logits @ w).to(wide)
                back = back * (hidden > 0) if relu else back * (1 - hidden.to(wide).square())
                back = back.view(t1 - t0, d.width, -1)
                states = p[b] if units is None else p[b][units]
                to_e = back * states.to(wide) if multiply else back
                to_p = back * e[b, t0:t1, None].to(wide) if multiply else back
                grads[0][b, t0:t1] = to_e.sum(1)
                if units is None:
                    grads[1][b] += to_p.sum(0)
                else:
                    grads[1][b].index_add_(0, units.reshape(-1), to_p.reshape(-1, to_p.shape[2]))
        given = [None if v is None else g.to(v.dtype) for v, g in zip(inputs, grads)]
        return (*given, None, None, None, None, None)


def joint_cuda(
    encoder, predictor, weight, bias, d: DeviceBatch, o: Options, relu: bool, multiply: bool, pruned: bool, longest,
    want: bool,
):  # fmt: skip
    """(costs [B], occupancy or None). NaN in padded states is cleared: it would reach the gradient by 0 * NaN."""
    inside_t = torch.arange(encoder.shape[1], device=encoder.device) < d.T[:, None]
    inside_u = torch.arange(predictor.shape[1], device=encoder.device) <= d.U[:, None]
    encoder = torch.where(inside_t[:, :, None], encoder, 0)
    predictor = torch.where(inside_u[:, :, None], predictor, 0)
    return CudaJointLoss.apply(encoder, predictor, weight, bias, d, o, (relu, multiply, pruned), longest, want)


class CudaTdtLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, duration_logits, d: DeviceBatch, o: Options, durations, sigma: float, want: bool):
        launch = _Launch(logits)
        B, D = d.T.shape[0], duration_logits.shape[-1]
        kept = kept_arrays(d, logits.dtype)
        dur = torch.empty(D, d.total, dtype=kept[0].dtype, device=logits.device)
        stage_rows(launch, logits.view(-1, logits.shape[-1]), d, o, kept)
        grid, z = (B, launch.spread), duration_logits.view(-1, D)
        launch("durations_in", grid, launch.threads, z, d.T, d.U, d.first, d.per_frame, d.cells, dur, sigma)
        alpha, beta = torch.empty(2, d.total, dtype=torch.float64, device=logits.device)
        costs = torch.zeros(B, dtype=torch.float64, device=logits.device)
        steps = torch.tensor(durations).to(logits.device, non_blocking=True)
        arcs = (d.T, d.U, d.cells, kept[1], kept[2], dur, steps, alpha, beta)
        launch("tdt_wavefront", (B, 2), launch.threads, *arcs)
        launch("tdt_occupancies", grid, launch.threads, *arcs, costs, o.fastemit)
        ctx.save_for_backward(logits, duration_logits)
        ctx.state = (d, o, kept, dur)
        occupancy = None
        if want:
            occupancy = unpack_occupancy(launch, d, kept[2], d.frames)
            ctx.mark_non_differentiable(occupancy)
        return costs.to(kept[0].dtype), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        logits, duration_logits = ctx.saved_tensors
        d, o, kept, dur = ctx.state
        launch = _Launch(logits)
        scale = grad_costs.detach().to(kept[0].dtype).contiguous()
        gradient, duration_gradient = torch.empty_like(logits), torch.zeros_like(duration_logits)
        V, D = logits.shape[-1], duration_logits.shape[-1]
        stage_gradient(launch, logits.view(-1, V), gradient.view(-1, V), d, o, kept, scale)
        launch(
            "durations_out", (d.T.shape[0], launch.spread), launch.threads, duration_logits.view(-1, D),
            duration_gradient.view(-1, D), d.T, d.U, d.first, d.per_frame, d.cells, dur, scale,
        )  # fmt: skip
        return gradient, duration_gradient, None, None, None, None, None

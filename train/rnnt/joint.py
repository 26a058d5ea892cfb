"""rnnt_loss_joint: the loss from encoder and predictor on; the logits [B, T, U+1, V] never exist.

Forward, tile by tile: hidden rows, matrix product, logsumexp; two numbers a cell stay. Backward recomputes tiles, but
only of cells whose occupancy exceeds eps. Threads take tiles, each with matrix products of one thread.
Invariant: which tiles a thread takes in the backward pass, and the order of its sums, depend on lengths, occupancies
and the number of threads alone: gradients are reproducible to the bit. Run: pytest tests/train/rnnt/test_joint.py
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .checks import LossBatch, check_band, check_batch, check_joint, check_options
from .cpu import threads
from .loss import reduce, warn_nan

TILE_ELEMENTS = 1 << 17  # logits of a tile: half a megabyte, which stays in a core's cache between the stages


@dataclass(frozen=True)
class JointOptions:
    clamp: float
    fastemit: float
    delay: float
    eps: float
    relu: bool
    multiply: bool
    band: np.ndarray | None  # int64 [B, T]: first unit of a frame's band
    width: int  # units of a band


def tile_rows(vocabulary: int) -> int:
    return int(np.clip(TILE_ELEMENTS // max(1, vocabulary), 128, 1024))


class _Workspace:
    """One thread's buffers for tiles of up to `rows` rows."""

    def __init__(self, rows: int, weight: torch.Tensor) -> None:
        V, H = weight.shape
        self.hidden = torch.empty(rows, H, dtype=weight.dtype)
        self.logits = torch.empty(rows, V, dtype=weight.dtype)
        self.work = np.empty((2, rows), self.hidden.numpy().dtype)
        self.work64 = np.empty(rows)
        self.cells = np.empty((rows, 2), np.int64)


def _forward(e, p, weight, bias, batch: LossBatch, plan, o: JointOptions, lse, blank_lp, label_lp) -> None:
    from .cpu.tiles import band_cells, hidden_rows, keep_rows

    rows = tile_rows(weight.shape[0])
    width = np.minimum(batch.U + 1, o.width) if o.band is not None else batch.U + 1
    tiles = [
        (b, start, min(start + rows, int(n))) for b, n in enumerate(batch.T * width) for start in range(0, int(n), rows)
    ]
    number = itertools.count()
    transposed = weight.t().contiguous()  # a packed product takes a fifth less

    def work(thread: int) -> None:
        room = _Workspace(rows, weight)
        while (k := next(number)) < len(tiles):
            b, start, stop = tiles[k]
            count = band_cells(start, stop, batch.U[b], width[b], plan.band[b], room.cells)
            if count == 0:
                continue
            cells, hidden, logits = room.cells[:count], room.hidden[:count], room.logits[:count]
            hidden_rows(e[b].numpy(), p[b].numpy(), cells, o.relu, o.multiply, hidden.numpy())
            torch.addmm(bias, hidden, transposed, out=logits)
            keep_rows(
                logits.numpy(), cells, batch.y[b], batch.T[b], batch.U[b], plan.base[plan.at[b] : plan.at[b + 1]],
                lse, blank_lp, label_lp, batch.blank, o.delay, room.work, room.work64,
            )  # fmt: skip

    count = min(threads.thread_count(), max(1, len(tiles)))
    with threads.single_products():
        threads.run(work, count)


def _shares(batch: LossBatch, counts: np.ndarray, count: int) -> list[list[tuple[int, int, int]]]:
    """Every thread's runs of frames (utterance, from, to), about the same number of active cells for each."""
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1]) if counts.size else 0
    bounds = np.searchsorted(cumulative, np.arange(1, count) * total / count, side="left") + 1
    edges = np.concatenate([[0], np.minimum(bounds, counts.size), [counts.size]])
    starts = np.concatenate([[0], np.cumsum(batch.T)])
    shares = []
    for low, high in itertools.pairwise(edges):
        share = []
        for b in range(batch.T.size):
            first, last = max(low, starts[b]), min(high, starts[b + 1])
            if first < last:
                share.append((b, int(first - starts[b]), int(last - starts[b])))
        shares.append(share)
    return shares


def _backward(e, p, weight, bias, batch: LossBatch, plan, o: JointOptions, lse, occ_blank, occ_label, scale):
    from .cpu.tiles import active_cells, count_active, gradient_rows, hidden_rows, scatter_rows

    rows = tile_rows(weight.shape[0])
    counts = np.zeros(int(batch.T.sum()), np.int64)
    count_active(batch.T, batch.U, plan.at, plan.base, occ_blank, occ_label, o.eps, o.fastemit, counts)
    shares = _shares(batch, counts, threads.thread_count())
    grad_e, grad_p = torch.zeros_like(e), torch.zeros_like(p)
    results: list[Any] = [None] * len(shares)
    transposed = weight.t().contiguous()  # a packed product takes a fifth less

    def work(thread: int) -> None:
        if not shares[thread]:
            return
        room = _Workspace(rows, weight)
        grad_hidden = torch.empty_like(room.hidden)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        low = shares[thread][0][0]
        mine = torch.zeros(shares[thread][-1][0] + 1 - low, *p.shape[1:], dtype=p.dtype)
        for b, t0, t1 in shares[thread]:
            own = plan.base[plan.at[b] : plan.at[b + 1]]
            active = np.empty(((t1 - t0) * int(batch.U[b] + 1), 2), np.int64)
            active = active[: active_cells(t0, t1, batch.U[b], own, occ_blank, occ_label, o.eps, o.fastemit, active)]
            for start in range(0, len(active), rows):
                cells = active[start : start + rows]
                hidden, logits = room.hidden[: len(cells)], room.logits[: len(cells)]
                hidden_rows(e[b].numpy(), p[b].numpy(), cells, o.relu, o.multiply, hidden.numpy())
                torch.addmm(bias, hidden, transposed, out=logits)
                gradient_rows(
                    logits.numpy(), cells, batch.y[b], batch.U[b], own, lse, occ_blank, occ_label, batch.blank,
                    scale[b], o.clamp, o.fastemit, grad_bias.numpy(),
                )  # fmt: skip
                grad_weight.addmm_(logits.t(), hidden)
                back = torch.mm(logits, weight, out=grad_hidden[: len(cells)])
                scatter_rows(
                    back.numpy(), hidden.numpy(), e[b].numpy(), p[b].numpy(), cells, o.relu, o.multiply,
                    grad_e[b].numpy(), mine[b - low].numpy(),
                )  # fmt: skip
        results[thread] = (low, mine, grad_weight, grad_bias)

    with threads.single_products():
        threads.run(work, len(shares))
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for result in results:
        if result is not None:
            low, mine, gw, gb = result
            grad_p[low : low + len(mine)] += mine
            grad_weight += gw
            grad_bias += gb
    return grad_e, grad_p, grad_weight, grad_bias


class _CpuJointLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder, predictor, weight, bias, batch: LossBatch, o: JointOptions, want_occupancy: bool):
        from .cpu.lattice import CLOSED, lattices, unpack_occupancy
        from .plan import make_plan

        kind = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        e, p, w, c = (
            v.detach().to(kind).contiguous()
            for v in (encoder, predictor, weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)
        )
        plan = make_plan(batch, (e.shape[1], p.shape[1]), o.band)
        numbers = np.float64 if kind == torch.float64 else np.float32
        lse, blank_lp, label_lp = (np.empty(plan.total, numbers) for _ in range(3))
        if plan.pruned:
            blank_lp.fill(CLOSED)
            label_lp.fill(CLOSED)
        count = min(threads.thread_count(), batch.T.size)
        alpha, costs = np.empty((count, plan.longest)), np.zeros(batch.T.size)
        with torch.autocast("cpu", enabled=False):
            _forward(e, p, w, c, batch, plan, o, lse, blank_lp, label_lp)
        threads.run(
            lattices, count, batch.T, batch.U, plan.at, plan.base, np.zeros(1, np.int64),
            blank_lp, label_lp, alpha, costs, kind == torch.float64,
        )  # fmt: skip
        warn_nan(costs, batch)
        ctx.save_for_backward(encoder, predictor, weight, bias)
        ctx.state = (batch, plan, o, lse, blank_lp, label_lp)
        occupancy = None
        if want_occupancy:
            occupancy = torch.zeros(batch.T.size, batch.y.shape[1], e.shape[1])
            unpack_occupancy(batch.T, batch.U, plan.at, plan.base, label_lp, occupancy.numpy())
            ctx.mark_non_differentiable(occupancy)
        return torch.from_numpy(costs).to(kind), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        encoder, predictor, weight, bias = ctx.saved_tensors
        batch, plan, o, lse, occ_blank, occ_label = ctx.state
        kind = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        e, p, w, c = (
            v.detach().to(kind).contiguous()
            for v in (encoder, predictor, weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)
        )
        scale = grad_costs.detach().double().contiguous().numpy()
        with torch.autocast("cpu", enabled=False):
            found = _backward(e, p, w, c, batch, plan, o, lse, occ_blank, occ_label, scale)
        inputs = (encoder, predictor, weight, bias)
        grads = [None if v is None else g.to(v.dtype) for v, g in zip(inputs, found)]
        return (*grads, None, None, None)


def _on_cuda(
    encoder, predictor, weight, bias, integers, batch: LossBatch | None, band, ranges, blank, clamp, fastemit, delay,
    eps, activation, combine, want_occupancy,
):  # fmt: skip
    """(costs [B], occupancy or None); batch None: the integers are on the device, unchecked."""
    from .cuda.joint import joint_cuda
    from .cuda.launch import device_batch
    from .loss import Options

    longest = None if batch is None else [int(t) for t in batch.T]
    if batch is not None:
        integers = tuple(torch.from_numpy(v) for v in (batch.y, batch.T, batch.U))
    first = None
    if ranges is not None:
        first = ranges[:, :, 0] if band is None else torch.from_numpy(band).to(encoder.device, non_blocking=True)
    V, width = weight.shape[0], predictor.shape[1] if ranges is None else ranges.shape[2]
    d = device_batch(integers, blank % V, V, 0, (encoder.shape[1], width), encoder.device, first)
    options = Options(float(clamp), True, float(fastemit), float(delay), True, float(eps))
    return joint_cuda(
        encoder, predictor, weight, bias, d, options, activation == "relu", combine == "mul", ranges is not None,
        longest, want_occupancy,
    )  # fmt: skip


def rnnt_loss_joint(
    encoder: torch.Tensor,
    predictor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    logit_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int = -1,
    clamp: float = -1,
    reduction: str = "mean",
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    combine: Literal["add", "mul"] = "add",
    eps: float = 1e-6,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    ranges: torch.Tensor | None = None,
    return_occupancy: bool = False,
    check: bool = False,
) -> Any:
    """RNN-T loss of logits = activation(encoder[t] + predictor[u]) @ weight.T + bias, which are never all in memory.

    encoder [B, T, H] and predictor [B, U+1, H] are projected to the joint's width H already; weight [V, H], bias [V]
    or None. targets [B, U], lengths [B] int32 or int64. Computed in float32 (float64 for float64), under autocast too.
    activation, combine: the joint. eps: cells whose occupancy is eps or less get no gradient; the gradient changes by
    about eps. ranges int [B, T, S]: the units of every frame that are computed at all (see pruned.py).
    The rest, the results and the errors are rnnt_loss's.
    """
    check_options(reduction, fastemit_lambda, delay_penalty, eps)
    check_joint(encoder, predictor, weight, bias, activation, combine)
    if encoder.shape[0] != targets.shape[0]:
        raise ValueError(f"rnnt loss: encoder has {encoder.shape[0]} rows, targets {targets.shape[0]}")
    integers = (targets, logit_lengths, target_lengths)
    room = (encoder.shape[1], predictor.shape[1] - 1)
    known = check or encoder.device.type == "cpu" or all(v.device.type == "cpu" for v in integers)
    batch = check_batch(*integers, blank, weight.shape[0], *room) if known else None
    band, width = None, 0
    if ranges is not None and batch is not None:
        band, width = check_band(ranges, batch, encoder.shape[1])
    if encoder.device.type == "cuda":
        costs, occupancy = _on_cuda(
            encoder, predictor, weight, bias, integers, batch, band, ranges, blank, clamp, fastemit_lambda,
            delay_penalty, eps, activation, combine, return_occupancy,
        )  # fmt: skip
    elif encoder.device.type == "cpu" and batch is not None:
        options = JointOptions(
            float(clamp), float(fastemit_lambda), float(delay_penalty), float(eps), activation == "relu",
            combine == "mul", band, width,
        )  # fmt: skip
        costs, occupancy = _CpuJointLoss.apply(encoder, predictor, weight, bias, batch, options, return_occupancy)
    else:
        raise ValueError(f"rnnt loss: no joint-fused implementation for device {encoder.device}")
    loss = reduce(costs, target_lengths, reduction)
    return (loss, occupancy) if return_occupancy else loss

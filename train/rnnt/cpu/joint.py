"""The fused joint on the CPU: tiles of logits that exist only while they are used.

The forward pass makes hidden rows, a matrix product and logsumexp tile by tile, and keeps three numbers per cell. The
backward pass makes the tiles again, but only of cells whose occupancy exceeds eps. Each thread takes tiles and computes
their matrix products alone.
Guarantees: a thread's tiles in the backward pass, and the order of its sums, depend on lengths, occupancies and the
number of threads alone. So gradients are reproducible to the bit.
Try: `pytest tests/train/rnnt/test_joint.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....extract.cpu_matmul import ManyPieces
from ..autograd import joint_inputs
from ..checks import LossBatch, Options
from . import threads
from .launch import results, run_lattices
from .plan import make_plan
from .tiles import active_cells, band_cells, count_active, gradient_rows, hidden_rows, keep_rows, scatter_rows

TILE_ELEMENTS = 1 << 17  # logits of a tile: half a megabyte, which stays in a core's cache between the stages


def tile_rows(vocabulary: int) -> int:
    return int(np.clip(TILE_ELEMENTS // max(1, vocabulary), 128, 1024))


class TileBuffers:
    """One thread's memory for a tile of up to `rows` rows."""

    def __init__(self, rows: int, weight: Tensor) -> None:
        V, H = weight.shape
        self.hidden = torch.empty(rows, H, dtype=weight.dtype)
        self.logits = torch.empty(rows, V, dtype=weight.dtype)
        self.work = np.empty((2, rows), self.hidden.numpy().dtype)
        self.work64 = np.empty(rows)
        self.cells = np.empty((rows, 2), np.int64)


class CpuJointLoss:
    """The loss from encoder and predictor on. `kept` holds lse and the two occupancies of each cell between the passes.

    `padded` is (Tmax, Umax + 1). `band` int64 [B, Tmax] is the first of `width` units of each frame. None means all
    units.
    """

    inplace = False

    def __init__(
        self, batch: LossBatch, padded: tuple[int, int], band: np.ndarray | None, width: int, options: Options,
        want_occupancy: bool,
    ) -> None:  # fmt: skip
        self.batch, self.options = batch, options
        self.plan = make_plan(batch.T, batch.U, padded, band)
        self.frames = padded[0] if want_occupancy else None
        self.widths = batch.U + 1 if band is None else np.minimum(batch.U + 1, width)

    def forward(self, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None):
        kind = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        self.kept = self.plan.arrays(kind == torch.float64)
        with torch.autocast("cpu", enabled=False):
            self.keep_tiles(*joint_inputs(kind, encoder, predictor, weight, bias))
        costs = run_lattices(self.batch, self.plan, *self.kept[1:])
        return results(self.batch, self.plan, costs, self.kept[2], self.frames)

    def backward(self, grad_costs: Tensor, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None):
        kind = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        scale = grad_costs.numpy().astype(np.float64)
        with torch.autocast("cpu", enabled=False):
            return self.gradients(scale, *joint_inputs(kind, encoder, predictor, weight, bias))

    def keep_tiles(self, e: Tensor, p: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Run stage 1 of all tiles."""
        batch, plan, o, width = self.batch, self.plan, self.options, self.widths
        rows = tile_rows(weight.shape[0])
        tiles = [
            (b, start, min(start + rows, int(n)))
            for b, n in enumerate(batch.T * width)
            for start in range(0, int(n), rows)
        ]
        number = itertools.count()
        layer = ManyPieces(weight, bias, rows, sum(stop - start for _, start, stop in tiles))

        def work(thread: int) -> None:
            buffers = TileBuffers(rows, weight)
            while (k := next(number)) < len(tiles):
                b, start, stop = tiles[k]
                count = band_cells(start, stop, batch.U[b], width[b], plan.band[b], buffers.cells)
                if count == 0:
                    continue
                cells, hidden, logits = buffers.cells[:count], buffers.hidden[:count], buffers.logits[:count]
                hidden_rows(e[b].numpy(), p[b].numpy(), cells, o.relu, o.multiply, hidden.numpy())
                logits = layer.outputs(hidden, out=logits)
                keep_rows(
                    logits.numpy(), cells, batch.y[b], batch.T[b], batch.U[b], plan.base[plan.at[b] : plan.at[b + 1]],
                    *self.kept, batch.blank, o.delay, buffers.work, buffers.work64,
                )  # fmt: skip

        count = min(threads.thread_count(), max(1, len(tiles)))
        with threads.single_products():
            threads.run(work, count)

    def gradients(self, scale: np.ndarray, e: Tensor, p: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        """Run stage 3: return the gradients of e, p, weight and bias."""
        batch, plan, o = self.batch, self.plan, self.options
        lse, occ_blank, occ_label = self.kept
        rows = tile_rows(weight.shape[0])
        counts = np.zeros(int(batch.T.sum()), np.int64)
        count_active(batch.T, batch.U, plan.at, plan.base, occ_blank, occ_label, o.eps, o.fastemit, counts)
        shares = frame_runs(batch, counts, threads.thread_count())
        grad_e, grad_p = torch.zeros_like(e), torch.zeros_like(p)
        sums: list[Any] = [None] * len(shares)
        layer = ManyPieces(weight, bias, rows, int(counts.sum()))

        def work(thread: int) -> None:
            if not shares[thread]:
                return
            buffers = TileBuffers(rows, weight)
            grad_hidden = torch.empty_like(buffers.hidden)
            grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            low = shares[thread][0][0]
            own_p = torch.zeros(shares[thread][-1][0] + 1 - low, *p.shape[1:], dtype=p.dtype)
            for b, t0, t1 in shares[thread]:
                own = plan.base[plan.at[b] : plan.at[b + 1]]
                active = np.empty(((t1 - t0) * int(batch.U[b] + 1), 2), np.int64)
                count = active_cells(t0, t1, batch.U[b], own, occ_blank, occ_label, o.eps, o.fastemit, active)
                for start in range(0, count, rows):
                    cells = active[start : min(start + rows, count)]
                    hidden, logits = buffers.hidden[: len(cells)], buffers.logits[: len(cells)]
                    hidden_rows(e[b].numpy(), p[b].numpy(), cells, o.relu, o.multiply, hidden.numpy())
                    logits = layer.outputs(hidden, out=logits)
                    gradient_rows(
                        logits.numpy(), cells, batch.y[b], batch.U[b], own, lse, occ_blank, occ_label, batch.blank,
                        scale[b], o.clamp, o.fastemit, grad_bias.numpy(),
                    )  # fmt: skip
                    layer.add_grad_weight(logits, hidden, grad_weight)
                    back = layer.grad_inputs(logits, out=grad_hidden[: len(cells)])
                    scatter_rows(
                        back.numpy(), hidden.numpy(), e[b].numpy(), p[b].numpy(), cells, o.relu, o.multiply,
                        grad_e[b].numpy(), own_p[b - low].numpy(),
                    )  # fmt: skip
            sums[thread] = (low, own_p, grad_weight, grad_bias)

        with threads.single_products():
            threads.run(work, len(shares))
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for low, own_p, of_weight, of_bias in filter(None, sums):  # In the order of the threads, for equal bits.
            grad_p[low : low + len(own_p)] += own_p
            grad_weight += of_weight
            grad_bias += of_bias
        return [grad_e, grad_p, grad_weight, grad_bias]


def frame_runs(batch: LossBatch, counts: np.ndarray, count: int) -> list[list[tuple[int, int, int]]]:
    """Return the runs of frames (utterance, from, to) of each of `count` threads.

    All threads get about the same number of active cells, of which `counts` int64 [sum of T] has those of each frame.
    """
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

"""The losses on the CPU: a batch's arrays, and the kernels run over them by threads.

Guarantees: results are the same bits for any number of threads.
Try: `pytest tests/train/rnnt/test_loss.py tests/train/rnnt/test_tdt.py tests/train/rnnt/test_pruned.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import LossBatch, Options, warn_nan
from . import threads
from .lattice import backward, forward, lattices, unpack_occupancy
from .memory import as_rows, fresh_like
from .plan import LatticePlan, make_plan
from .pruned import to_dense, to_diagonals
from .tdt import duration_backward, tdt_forward


def counter() -> np.ndarray:
    """Return a new counter, from which threads take the numbers of their tasks."""
    return np.zeros(1, np.int64)


def run_lattices(batch: LossBatch, plan: LatticePlan, blank_lp: np.ndarray, label_lp: np.ndarray) -> np.ndarray:
    """Run stage 2 alone: return costs float64 [B]. The arcs' log-probabilities become their occupancies."""
    count, costs = min(threads.thread_count(), batch.T.size), np.zeros(batch.T.size)
    threads.run(
        lattices, count, batch.T, batch.U, plan.at, plan.base, counter(), blank_lp, label_lp,
        np.empty((count, plan.longest)), costs, blank_lp.dtype == np.float64,
    )  # fmt: skip
    warn_nan(costs, batch)
    return costs


def results(
    batch: LossBatch, plan: LatticePlan, costs: np.ndarray, label: np.ndarray, frames: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return costs [B] in the type that was computed in, and label occupancies [B, U, frames] unless frames is None."""
    occupancy = None
    if frames is not None:
        occupancy = torch.zeros(batch.T.size, batch.y.shape[1], frames)
        unpack_occupancy(batch.T, batch.U, plan.at, plan.base, label, occupancy.numpy())
    return torch.from_numpy(costs.astype(label.dtype)), occupancy


class CpuLoss:
    """The loss of given logits. `kept` holds lse and the two occupancies of each cell between the passes.

    `padded` and `band` are those of `make_plan`.
    """

    def __init__(
        self, batch: LossBatch, padded: tuple[int, int] | None, band: np.ndarray | None, options: Options,
        want_occupancy: bool, vocabulary: int,
    ) -> None:  # fmt: skip
        self.batch, self.options, self.inplace = batch, options, options.inplace
        self.plan = make_plan(batch.T, batch.U, padded, band, vocabulary)
        self.frames = self.plan.band.shape[1] if want_occupancy else None

    def forward(self, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, plan = self.batch, self.plan
        exact = logits.dtype == torch.float64
        self.kept, costs = plan.arrays(exact), np.zeros(batch.T.size)
        where = (plan.first, plan.per_frame, plan.band, plan.at, plan.base, plan.tasks, counter(), plan.left)
        self.run_forward(min(threads.thread_count(), len(plan.tasks)), as_rows(logits), rest, where, costs, exact)
        warn_nan(costs, batch)
        return results(batch, plan, costs, self.kept[2], self.frames)

    def run_forward(self, count: int, x, rest, where: tuple, costs: np.ndarray, exact: bool) -> None:
        """Run stages 1 and 2 on `count` threads."""
        b, o, plan = self.batch, self.options, self.plan
        threads.run(
            forward, count, x, b.y, b.T, b.U, *where, *self.kept, plan.longest, plan.most_units + 1, costs, b.blank,
            o.delay, o.fused, exact,
        )  # fmt: skip

    def backward(self, grad_costs: Tensor, logits: Tensor, *_: Tensor) -> Sequence[Tensor]:
        b, plan, o = self.batch, self.plan, self.options
        gradient = logits.detach() if self.inplace else fresh_like(logits)
        count = min(threads.thread_count(), len(plan.padded_tasks))
        threads.run(
            backward, count, as_rows(logits), as_rows(gradient), self.inplace, b.y, b.T, b.U, plan.first,
            plan.per_frame, plan.band, plan.at, plan.base, plan.padded_tasks, counter(), *self.kept,
            grad_costs.numpy().astype(np.float64), b.blank, o.clamp, o.fused, o.fastemit, o.eps,
        )  # fmt: skip
        return [gradient]


class CpuTdtLoss(CpuLoss):
    """The token-and-duration loss of token and duration logits."""

    def run_forward(self, count: int, x, rest, where: tuple, costs: np.ndarray, exact: bool) -> None:
        b, o, total, width = self.batch, self.options, self.plan.total, self.plan.most_units + 1
        durations = np.array(o.durations, np.int64)
        self.dur = np.empty((durations.size, total), self.kept[0].dtype)
        threads.run(
            tdt_forward, count, x, as_rows(rest[0]), b.y, b.T, b.U, *where, *self.kept, self.dur, durations,
            np.empty(total), np.empty(total), width, costs, b.blank, o.delay, o.sigma, o.fastemit, exact,
        )  # fmt: skip

    def backward(self, grad_costs: Tensor, logits: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        b, plan, duration_logits = self.batch, self.plan, rest[0]
        gradient = torch.zeros_like(duration_logits)
        threads.run(
            duration_backward, threads.thread_count(), as_rows(duration_logits), as_rows(gradient), b.T, b.U,
            plan.first, plan.per_frame, plan.at, plan.base, counter(), self.dur,
            grad_costs.numpy().astype(np.float64),
        )  # fmt: skip
        return [*super().backward(grad_costs, logits), gradient]


class CpuLattice(torch.autograd.Function):
    """Costs [B] of arcs given as dense log-probabilities [B, T, U+1], and gamma, the occupancy of each cell.

    It keeps the occupancies, not the arcs, for its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, blank_lp: Tensor, label_lp: Tensor, batch: LossBatch, fastemit: float):
        plan = make_plan(batch.T, batch.U, (blank_lp.shape[1], blank_lp.shape[2]))
        _, *arcs = plan.arrays(blank_lp.dtype == torch.float64)
        for dense, own in zip((blank_lp, label_lp), arcs):
            to_diagonals(dense.detach().contiguous().numpy(), batch.T, batch.U, plan.at, plan.base, own)
        costs = run_lattices(batch, plan, *arcs)
        occupancies = [torch.zeros_like(blank_lp, memory_format=torch.contiguous_format) for _ in arcs]
        for dense, own in zip(occupancies, arcs):
            to_dense(own, batch.T, batch.U, plan.at, plan.base, dense.numpy())
        ctx.save_for_backward(*occupancies)
        ctx.fastemit = fastemit
        gamma = occupancies[0] + occupancies[1]
        ctx.mark_non_differentiable(gamma)
        return torch.from_numpy(costs).to(blank_lp.dtype), gamma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs: Tensor, _: Any):
        scale = -grad_costs.view(-1, 1, 1)
        occ_blank, occ_label = ctx.saved_tensors
        return occ_blank * scale, occ_label * (scale * (1 + ctx.fastemit)), None, None

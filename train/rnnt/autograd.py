"""The one binding of the losses to torch's autograd, on the CPU and on CUDA.

Guarantees: each loss can be differentiated once. A loss in place refuses a second backward pass.
Try: `pytest tests/train/rnnt/test_guards.py -k "backward or inplace"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import divide, reduce


class LossComputation(Protocol):
    """The loss of one batch: computed once, with what its gradient needs kept in between."""

    inplace: bool  # The gradient is written over the first input.

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return costs [B], and the occupancies [B, U, T] or None."""

    def backward(self, grad_costs: Tensor, *inputs: Any) -> Sequence[Tensor]:
        """Return the gradient of each input from that of the costs, [B]."""


class ReducedLoss:
    """A loss whose costs are reduced. One node of the graph instead of three is a fifth of a tiny loss's time."""

    def __init__(self, computation: LossComputation, target_lengths: Tensor, reduction: str) -> None:
        self.computation, self.inplace = computation, computation.inplace
        self.target_lengths, self.reduction = target_lengths, reduction

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the reduced costs, and the occupancies or None."""
        costs, occupancy = self.computation.forward(*inputs)
        self.shape = costs.shape
        return reduce(costs, self.target_lengths, self.reduction), occupancy

    def backward(self, grad_loss: Tensor, *inputs: Any) -> Sequence[Tensor]:
        """Return the gradient of each input from that of the loss."""
        share = divide(grad_loss, self.shape[0], self.target_lengths, self.reduction)
        return self.computation.backward(share.expand(self.shape), *inputs)


class BoundLoss(torch.autograd.Function):
    """`BoundLoss.apply(computation, *inputs)` returns costs [B] with a graph, and occupancies without one."""

    @staticmethod
    def forward(ctx: Any, computation: LossComputation, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        costs, occupancy = computation.forward(*inputs)
        ctx.save_for_backward(*inputs)
        ctx.computation = computation
        if occupancy is not None:
            ctx.mark_non_differentiable(occupancy)
        return costs, occupancy

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # Without create_graph, autograd itself has switched gradients off, and the wrapper would do it again.
        return (BoundLoss._once if torch.is_grad_enabled() else BoundLoss._gradients)(ctx, grad_costs)

    @staticmethod
    def _gradients(ctx: Any, grad_costs: Tensor) -> tuple[Tensor | None, ...]:
        computation = ctx.computation
        if computation is None:
            raise RuntimeError(
                "rnnt loss: this is the second backward of a loss in place. The first one wrote the gradient over the "
                "logits. Use inplace=False to keep the logits."
            )
        inputs = ctx.saved_tensors
        if computation.inplace:
            ctx.computation = None
            torch.autograd.graph.increment_version(inputs[0])
        gradients = computation.backward(grad_costs.detach(), *inputs)
        return (None, *(None if x is None else g.to(x.dtype) for x, g in zip(inputs, gradients)))

    _once = staticmethod(once_differentiable(_gradients))


def joint_inputs(dtype: torch.dtype, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None):
    """Return the four inputs of a fused joint in the type that is computed in. A bias of None becomes zeros."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return [v.detach().to(dtype).contiguous() for v in (encoder, predictor, weight, bias)]

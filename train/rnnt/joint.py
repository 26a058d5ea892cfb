"""`rnnt_loss_joint`: the RNN-T loss from encoder and predictor on, without all logits [B, T, U+1, V] in memory.

Guarantees: memory beside inputs and gradients does not grow with the number of logits.
Try: `pytest tests/train/rnnt/test_joint.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from .autograd import BoundLoss, LossComputation, ReducedLoss
from .checks import check_band, check_batch, check_joint, make_options


def rnnt_loss_joint(
    encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor,
    blank: int = -1, clamp: float = -1, reduction: str = "mean", *,
    activation: Literal["tanh", "relu"] = "tanh", combine: Literal["add", "mul"] = "add", eps: float = 1e-6,
    fastemit_lambda: float = 0.0, delay_penalty: float = 0.0, ranges: Tensor | None = None,
    return_occupancy: bool = False, check: bool = False,
) -> Any:  # fmt: skip
    """Return the RNN-T loss of logits = activation(encoder[t] + predictor[u]) @ weight.T + bias, made tile by tile.

    Arguments:
        encoder: [B, T, H], projected to the joint's width H already.
        predictor: [B, U+1, H], projected as well.
        weight: [V, H].
        bias: [V] or None.
        activation: "tanh" or "relu".
        combine: "add", or "mul" for encoder[t] * predictor[u].
        eps: cells whose occupancy is eps or less are not computed again for the gradient, which changes by about eps.
        ranges: int [B, T, S] from `prune_ranges`, the units of each frame that are computed at all.

    The other arguments, the results and the errors are those of `rnnt_loss`. The arithmetic is in float32, and in
    float64 for float64, under autocast too. On CUDA, the products of float16 and bfloat16 inputs are of that type.
    """
    options = make_options(
        reduction, fastemit_lambda, delay_penalty, clamp, eps, relu=activation == "relu", multiply=combine == "mul"
    )
    check_joint(encoder, predictor, weight, bias, activation, combine)
    if encoder.shape[0] != targets.shape[0]:
        raise ValueError(f"rnnt loss: encoder has {encoder.shape[0]} rows, targets {targets.shape[0]}.")
    device, padded, width = encoder.device.type, (encoder.shape[1], predictor.shape[1]), 0
    integers = (targets, logit_lengths, target_lengths)
    batch: Any = integers
    band: Any = None if ranges is None else ranges[:, :, 0]
    if check or device != "cuda" or all(v.device.type == "cpu" for v in integers):
        batch = check_batch(*integers, blank, weight.shape[0], padded[0], padded[1] - 1)
        if ranges is not None:
            band, width = check_band(ranges, batch, padded[0])
    computation: LossComputation
    if device == "cuda":
        from .cuda.joint import CudaJointLoss

        rows = padded if ranges is None else (padded[0], ranges.shape[2])
        computation = CudaJointLoss(encoder, weight, batch, blank, rows, band, options, return_occupancy)
    elif device == "cpu":
        from .cpu.joint import CpuJointLoss

        computation = CpuJointLoss(batch, padded, band, width, options, return_occupancy)
    else:
        raise ValueError(f"rnnt loss: there is no fused joint for the device {encoder.device}.")
    reduced = ReducedLoss(computation, target_lengths, reduction)
    loss, occupancy = BoundLoss.apply(reduced, encoder, predictor, weight, bias)
    return (loss, occupancy) if return_occupancy else loss

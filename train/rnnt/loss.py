"""`rnnt_loss`: the RNN-T loss of given logits, on the CPU or on CUDA.

Guarantees: the forward pass keeps 12 bytes per cell of the lattice beside the logits. The backward pass needs no more
than that, and the gradient unless it is written in place.
Try: `pytest tests/train/rnnt/test_loss.py`.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from .autograd import BoundLoss, LossComputation, ReducedLoss
from .checks import DTYPES, check_band, check_batch, check_packed_rows, make_options


def rnnt_loss(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor,
    blank: int = -1, clamp: float = -1, reduction: str = "mean", fused_log_softmax: bool = True, *,
    fastemit_lambda: float = 0.0, delay_penalty: float = 0.0, layout: Literal["padded", "packed"] = "padded",
    inplace: bool = False, eps: float = 0.0, ranges: Tensor | None = None, return_occupancy: bool = False,
    check: bool = False,
) -> Any:  # fmt: skip
    """Return the RNN-T loss (Graves 2012) of logits, with the signature and results of torchaudio's `rnnt_loss`.

    Arguments:
        logits: [B, T, U+1, V], or packed [sum of T*(U+1), V] without padding. They may be float16, bfloat16, float32
            or float64. The arithmetic is in float32, and in float64 for float64.
        targets: int32 or int64 [B, U], units other than the blank.
        logit_lengths, target_lengths: int32 or int64 [B], frames T ≥ 1 and units U ≥ 0 of each utterance.
        blank: the blank's unit. A negative number counts from the end.
        clamp: limits each element of a cost's gradient if it is above 0.
        reduction: "none", "sum", "mean" = "mean_batch" (over utterances) or "mean_volume" (over target units).
        fused_log_softmax: False if the logits are log-probabilities. Then only blank and label get a gradient.
        fastemit_lambda: counts the gradient of each label 1 + lambda times (FastEmit, Yu et al. 2021, eq. 9).
        delay_penalty: adds penalty * ((T-1)/2 - t) to the score of each label at frame t, as k2 does.
        layout: "padded" or "packed".
        inplace: write the gradient over the logits, which must be contiguous.
        eps: cells whose occupancy is eps or less get no gradient.
        ranges: int [B, T, S] from `prune_ranges`, the units of each frame. The logits are then [B, T, S, V].
        return_occupancy: also return the occupancies.
        check: check integers on a device, too, and wait for it. Integers on the CPU are always checked.

    Returns:
        The loss in float32 (float64 for float64). With `return_occupancy`, a pair of the loss and the detached
        occupancies float32 [B, U, T]: P(unit u is emitted at frame t), 0 in the padding. An utterance without any
        alignment costs infinity and has gradient 0. One with NaN among its logits costs NaN, is named in a
        RuntimeWarning, and leaves the others unharmed.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape or number is out of range. The text names the row of the batch and its lengths.
    """
    options = make_options(
        reduction, fastemit_lambda, delay_penalty, clamp, eps, fused=fused_log_softmax, inplace=inplace
    )
    if logits.dtype not in DTYPES:
        raise TypeError(f"rnnt loss: logits are {logits.dtype}. Expected float16, bfloat16, float32 or float64.")
    if layout not in ("padded", "packed"):
        raise ValueError(f"rnnt loss: layout {layout!r} is unknown. Expected padded or packed.")
    dim = 4 if layout == "padded" else 2
    if logits.dim() != dim:
        raise ValueError(f"rnnt loss: {layout} logits have shape {tuple(logits.shape)}. Expected {dim} dimensions.")
    padded = (logits.shape[1], logits.shape[2]) if layout == "padded" else None
    if padded and logits.shape[0] != targets.shape[0]:
        raise ValueError(f"rnnt loss: logits have {logits.shape[0]} rows, targets {targets.shape[0]}.")
    if ranges is not None and padded is None:
        raise ValueError("rnnt loss: ranges need padded logits [B, T, S, V].")
    if inplace and not logits.is_contiguous():
        raise ValueError("rnnt loss: logits are not contiguous. With inplace, their memory becomes the gradient.")
    device = logits.device.type
    integers = (targets, logit_lengths, target_lengths)
    batch: Any = integers
    band: Any = None if ranges is None else ranges[:, :, 0]
    if check or device != "cuda" or all(v.device.type == "cpu" for v in integers):
        most_units = padded[1] - 1 if padded and ranges is None else None
        batch = check_batch(*integers, blank, logits.shape[-1], padded[0] if padded else None, most_units)
        if padded is None:
            check_packed_rows(batch, logits.shape[0])
        elif ranges is not None:
            band, width = check_band(ranges, batch, padded[0])
            if width != padded[1]:
                raise ValueError(f"rnnt loss: ranges are {width} units wide, but the logits {padded[1]}.")
    logits = logits.contiguous()
    computation: LossComputation
    if device == "cuda":
        from .cuda.launch import CudaLoss

        computation = CudaLoss(logits, batch, blank, padded, band, options, return_occupancy)
    elif device == "cpu":
        from .cpu.launch import CpuLoss

        computation = CpuLoss(batch, padded, band, options, return_occupancy, logits.shape[-1])
    else:
        raise ValueError(f"rnnt loss: there is no implementation for the device {logits.device}.")
    reduced = ReducedLoss(computation, target_lengths, reduction)
    loss, occupancy = BoundLoss.apply(reduced, logits)
    return (loss, occupancy) if return_occupancy else loss


class RNNTLoss(torch.nn.Module):
    """`rnnt_loss` as a module, with the arguments of torchaudio's `RNNTLoss`.

    Arguments:
        blank, clamp, reduction, fused_log_softmax: as those of `rnnt_loss`.
        options: the keyword arguments of `rnnt_loss`. Raises TypeError for any other.
    """

    def __init__(
        self, blank: int = -1, clamp: float = -1.0, reduction: str = "mean", fused_log_softmax: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = {
            "blank": blank, "clamp": clamp, "reduction": reduction, "fused_log_softmax": fused_log_softmax, **options
        }  # fmt: skip
        inspect.signature(rnnt_loss).bind(None, None, None, None, **self.options)  # A wrong name is an error here.

    def forward(self, logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor) -> Any:
        return rnnt_loss(logits, targets, logit_lengths, target_lengths, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

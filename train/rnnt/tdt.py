"""`tdt_loss`: the token-and-duration transducer (Xu et al. 2023, arXiv 2304.06795), on the stages of `rnnt_loss`.

An arc emits the blank or the next unit and moves on by one of the durations, each with its own probability:

    alpha(t, u) = logadd over d > 0 of  alpha(t-d, u)   + blank(t-d, u)   + dur(d | t-d, u)   - sigma
                  and over all d of     alpha(t-d, u-1) + label(t-d, u-1) + dur(d | t-d, u-1) - sigma
    log P(y)    = logadd over d > 0 of  alpha(T-d, U)   + blank(T-d, U)   + dur(d | T-d, U)   - sigma

Guarantees: values and gradients equal those of `tdt_reference`.
Try: `pytest tests/train/rnnt/test_tdt.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .autograd import BoundLoss, LossComputation, ReducedLoss
from .checks import DTYPES, check_batch, make_options


def tdt_loss(
    token_logits: Tensor, duration_logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor,
    blank: int = -1, durations: Sequence[int] = (0, 1, 2, 3, 4), sigma: float = 0.0, reduction: str = "mean", *,
    fastemit_lambda: float = 0.0, delay_penalty: float = 0.0, return_occupancy: bool = False,
) -> Any:  # fmt: skip
    """Return the token-and-duration loss of two softmaxes.

    Arguments:
        token_logits: [B, T, U+1, V].
        duration_logits: [B, T, U+1, D], of the same type.
        durations: D different numbers of frames, 0 or more, one of them above 0.
        sigma: subtracted from the log-probability of each arc.

    The other arguments, the results and the errors are those of `rnnt_loss`, also for NaN and infinity. "mean" is over
    utterances.
    """
    steps = tuple(int(d) for d in durations)
    options = make_options(reduction, fastemit_lambda, delay_penalty, sigma=sigma, durations=steps)
    if token_logits.dtype not in DTYPES or token_logits.dtype != duration_logits.dtype:
        raise TypeError(
            f"tdt loss: token logits are {token_logits.dtype}, duration logits {duration_logits.dtype}. "
            "They must share a floating dtype."
        )
    if token_logits.dim() != 4 or token_logits.shape[:3] != duration_logits.shape[:3]:
        raise ValueError(
            f"tdt loss: the logits have shapes {tuple(token_logits.shape)} and {tuple(duration_logits.shape)}. "
            "Expected [B, T, U+1, V] for tokens and [B, T, U+1, D] for durations."
        )
    if not len(steps) == len(set(steps)) == duration_logits.shape[3]:
        raise ValueError(f"tdt loss: {duration_logits.shape[3]} duration logits need as many different durations.")
    if min(steps, default=-1) < 0 or max(steps) == 0:
        raise ValueError(f"tdt loss: durations are {list(steps)}. Expected 0 or more, and one above 0.")
    if token_logits.shape[0] != targets.shape[0]:
        raise ValueError(f"tdt loss: logits have {token_logits.shape[0]} rows, targets {targets.shape[0]}.")
    padded = (token_logits.shape[1], token_logits.shape[2])
    batch = check_batch(targets, logit_lengths, target_lengths, blank, token_logits.shape[3], padded[0], padded[1] - 1)
    inputs = token_logits.contiguous(), duration_logits.contiguous()
    computation: LossComputation
    if token_logits.device.type == "cpu":
        from .cpu.launch import CpuTdtLoss

        computation = CpuTdtLoss(batch, padded, None, options, return_occupancy, token_logits.shape[3])
    elif token_logits.device.type == "cuda":
        from .cuda.launch import CudaTdtLoss

        computation = CudaTdtLoss(token_logits, batch, blank, padded, None, options, return_occupancy)
    else:
        raise ValueError(f"tdt loss: there is no implementation for the device {token_logits.device}.")
    reduced = ReducedLoss(computation, target_lengths, reduction)
    loss, occupancy = BoundLoss.apply(reduced, *inputs)
    return (loss, occupancy) if return_occupancy else loss

"""What a transducer's alignments cost: the loss of its kind (RNN-T or token-and-duration), and CTC on its encoder.

Invariant: one place knows which loss goes with which joint; costs are one number an utterance, computed in float32
whatever autocast does. Exercised by `stillhouse train` and `stillhouse align`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import BLANK, Transducer
from .rnnt import rnnt_loss_joint, tdt_loss


def transducer_costs(
    model: Transducer,
    encoder: Tensor,
    predictor: Tensor,
    targets: Tensor,
    lengths: Tensor,
    target_lengths: Tensor,
    *,
    eps: float = 1e-6,
    fastemit: float = 0.0,
    sigma: float = 0.0,
    ranges: Tensor | None = None,
    want_occupancy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Costs [B] and, if asked for, occupancies [B, U, T]: P(unit u is emitted at frame t).

    encoder [B, T, J] and predictor [B, U + 1, J], projected to the joint's width. targets and both lengths on the CPU.
    eps, ranges: of the RNN-T loss (see rnnt_loss_joint); sigma: of the token-and-duration loss, whose logits
    [B, T, U + 1, V] are all in memory.
    """
    encoder, predictor, joint = encoder.float(), predictor.float(), model.joint
    if model.durations:
        with torch.autocast(encoder.device.type, enabled=False):
            tokens, durations = joint.with_durations(encoder[:, :, None], predictor[:, None])
        result = tdt_loss(
            tokens,
            durations,
            targets,
            lengths,
            target_lengths,
            blank=BLANK,
            durations=model.durations,
            sigma=sigma,
            reduction="none",
            fastemit_lambda=fastemit,
            return_occupancy=want_occupancy,
        )
    else:
        result = rnnt_loss_joint(
            encoder,
            predictor,
            joint.output.weight,
            joint.output.bias,
            targets,
            lengths,
            target_lengths,
            blank=BLANK,
            reduction="none",
            combine=joint.combine,
            eps=eps,
            fastemit_lambda=fastemit,
            ranges=ranges,
            return_occupancy=want_occupancy,
        )
    return result if want_occupancy else (result, None)


def ctc_cost(scores: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC loss summed over the batch, of scores [B, T, V] before the softmax; utterances too short for it cost 0."""
    return F.ctc_loss(
        scores.float().log_softmax(-1).transpose(0, 1),
        targets.to(scores.device).long(),
        lengths,
        target_lengths.to(scores.device).long(),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )

"""The losses of a transducer: RNN-T or token-and-duration by its kind, and CTC on its encoder.

Guarantees: each utterance has its own cost, computed in float32 also under autocast.
Try: `stillhouse train CONFIG --set loss.kind=tdt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..rnnt import rnnt_loss, rnnt_loss_joint, tdt_loss
from .transducer import BLANK

MOST_LOGITS = 1 << 26  # logits in memory at a time: 256 MiB, unless one utterance has more


class JointModel(Protocol):
    """What the losses use of a model: `size` units, `durations` (none for an RNN-T), and a joint network.

    The joint network has the methods of `Joint`. Its `activation` is "tanh" or "relu" if a fused loss may compute
    logits from `output`, and None if only the network itself can.
    """

    size: int
    durations: tuple[int, ...]

    @property
    def joint(self) -> Any: ...


def transducer_costs(
    model: JointModel,
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
    blank: int = BLANK,
) -> tuple[Tensor, Tensor | None]:
    """Return costs [B] and, with `want_occupancy`, occupancies [B, U, T]: how probably frame t emits unit u.

    Encoder [B, T, J] and predictor [B, U + 1, J] are projected to the joint network's width J. The targets [B, U] and
    both lengths are on the CPU. `eps` and `ranges` are for the RNN-T loss (see rnnt_loss_joint), and `sigma` is for the
    token-and-duration loss. Its logits, and those of a joint network that no fused loss knows, are in memory for a few
    utterances at a time.
    """
    encoder, predictor, joint = encoder.float(), predictor.float(), model.joint
    known = (targets, lengths, target_lengths)
    options: dict[str, Any] = {"blank": blank, "reduction": "none", "fastemit_lambda": fastemit}
    options["return_occupancy"] = want_occupancy
    if model.durations or joint.activation is None:
        own: dict[str, Any] = {"sigma": sigma} if model.durations else {"eps": eps}
        costs_of: Callable[..., tuple[Tensor, Tensor | None]] = partial(_costs_of_logits, model, **own, **options)
        cells = MOST_LOGITS // (model.size + len(model.durations))
        parts = list(_slices(lengths.tolist(), target_lengths.tolist(), cells))
        if len(parts) > 1 and torch.is_grad_enabled():
            # The backward pass computes the logits of each part again, so that only one part's are in memory.
            costs_of = partial(checkpoint, costs_of, use_reentrant=False, preserve_rng_state=False)
        results = [costs_of(encoder[p], predictor[p], *(v[p] for v in known)) for p in parts]
        costs = torch.cat([costs for costs, _ in results])
        if not want_occupancy:
            return costs, None
        units, frames = targets.shape[1], encoder.shape[1]
        padded = [F.pad(o, (0, frames - o.shape[2], 0, units - o.shape[1])) for _, o in results if o is not None]
        return costs, torch.cat(padded)
    output = (joint.output.weight, joint.output.bias)
    result = rnnt_loss_joint(
        encoder, predictor, *output, *known,
        activation=joint.activation, combine=joint.combine, eps=eps, ranges=ranges, **options,
    )  # fmt: skip
    return result if want_occupancy else (result, None)


def _costs_of_logits(
    model: JointModel,
    encoder: Tensor,
    predictor: Tensor,
    targets: Tensor,
    lengths: Tensor,
    target_lengths: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The costs of utterances whose logits fit into memory. The occupancies end with the longest utterance."""
    frames, units = int(lengths.max()), int(target_lengths.max())
    grid = encoder[:, :frames, None], predictor[:, None, : units + 1]
    known = (targets[:, :units], lengths, target_lengths)
    with torch.autocast(encoder.device.type, enabled=False):
        if model.durations:
            tokens, durations = model.joint.with_durations(*grid)
            result = tdt_loss(tokens, durations, *known, durations=model.durations, **options)
        else:
            result = rnnt_loss(model.joint(*grid), *known, **options)
    return result if options["return_occupancy"] else (result, None)


def _slices(frames: list[int], units: list[int], cells: int) -> Iterator[slice]:
    """Slices of the batch, of one utterance at least, whose padded lattices [count, T, U + 1] have `cells` at most."""
    start, longest, most = 0, 0, 0
    for k, (t, u) in enumerate(zip(frames, units)):
        longest, most = max(longest, t), max(most, u + 1)
        if k > start and (k + 1 - start) * longest * most > cells:
            yield slice(start, k)
            start, longest, most = k, t, u + 1
    yield slice(start, len(frames))


def ctc_cost(scores: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Return the CTC loss of scores [B, T, V] before the softmax, summed over the batch.

    An utterance that is too short for its transcript costs 0.
    """
    return F.ctc_loss(
        scores.float().log_softmax(-1).transpose(0, 1),
        targets.to(scores.device).long(),
        lengths,
        target_lengths.to(scores.device).long(),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )


def consistency_cost(scores: Tensor, lengths: Tensor) -> Tensor:
    """Return how far the two halves of a batch are from one another, summed over its frames (arXiv 2410.05101).

    Arguments:
        scores: [2B, T, V] before the softmax. Utterances b and B + b are two copies of one.
        lengths: frames of each [2B].

    In each frame it is the sum of the divergences KL(other || own) of the two copies. The other copy's distribution is
    a target, to which no gradient flows.
    """
    own = scores.float().log_softmax(-1)
    other = own.detach().roll(len(own) // 2, 0)
    spoken = torch.arange(own.shape[1], device=own.device) < lengths.to(own.device)[:, None]
    return (F.kl_div(own, other, reduction="none", log_target=True).sum(-1) * spoken).sum()

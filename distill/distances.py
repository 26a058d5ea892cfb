"""Distances between a head's prediction and the teacher's target, one number for each position.

Guarantees: a distance is a mean over dimensions, never a sum, so views of different widths have equal weight. It is
computed in float32 whatever autocast does.
Try: `pytest tests/distill/test_distances.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.errors import ConfigError

CODES = 256  # of a codebook

# (prediction [M, D], target [≥ M, D], key int64 [≥ M]) -> [M]. Targets after the M-th are contrasts of other ranks.
Distance = Callable[..., Tensor]


def cosine(prediction: Tensor, target: Tensor, key: Tensor) -> Tensor:
    """Return 1 - cosine similarity, in [0, 2]."""
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


def l1(prediction: Tensor, target: Tensor, key: Tensor) -> Tensor:
    return (prediction - target).abs().mean(-1)


def smooth_l1(prediction: Tensor, target: Tensor, key: Tensor) -> Tensor:
    """Return Huber's distance: quadratic within 1 of the target, linear outside. Targets have deviation 1."""
    return F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)


def mse(prediction: Tensor, target: Tensor, key: Tensor) -> Tensor:
    return (prediction - target).square().mean(-1)


def contrastive(temperature: float) -> Distance:
    """Return InfoNCE: choose the position's own target among those of the batch, by cosine over `temperature`.

    Other occurrences of the same token (equal keys) are neither positives nor negatives, they are left out. So are
    neighbouring frames, whose keys are at most `reach` apart. It needs a matrix [M, M] for each view.
    After Sunder et al. 2022, "Tokenwise contrastive pretraining".
    """

    def distance(prediction: Tensor, target: Tensor, key: Tensor, reach: int = 0) -> Tensor:
        logits = F.normalize(prediction, dim=-1) @ F.normalize(target, dim=-1).T / temperature
        same = (key[: len(prediction), None] - key[None, :]).abs_() <= reach
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        return torch.logsumexp(logits, -1) - logits.diagonal()

    return distance


def codes(prediction: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Return the cross-entropy of the codes behind each position, as a mean over the codebooks.

    A position with several frames or tokens behind it has the mean of their cross-entropies, weighted with `share`.
    After Guo et al. 2022 (arXiv 2211.00508), "Predicting multi-codebook vector quantization indexes".

    Arguments:
        prediction: [M, C * 256], the logits of C codebooks.
        target: uint8 [M, K, C], the codes of K frames or tokens behind each position.
        share: float32 [M, K], their shares of the position, of which each row sums to 1.
    """
    count, _, codebooks = target.shape
    logs = prediction.view(count, codebooks, CODES).log_softmax(2)
    chosen = logs.gather(2, target.transpose(1, 2).long())  # (M, C, K)
    return -(chosen * share[:, None]).sum(2).mean(1)


def distance_named(name: str, *, temperature: float = 0.1) -> Distance:
    """Return the distance of that name, or raise ConfigError. `temperature` > 0 is for `contrastive` alone."""
    if temperature <= 0:
        raise ConfigError("the temperature must be positive", where=temperature)
    named: dict[str, Distance] = {"cosine": cosine, "l1": l1, "smooth_l1": smooth_l1, "mse": mse, "codes": codes}
    if name == "contrastive":
        named[name] = contrastive(temperature)
    if name not in named:
        raise ConfigError(f"there is no distance {name!r}", expected="cosine, l1, smooth_l1, mse, contrastive or codes")
    return named[name]

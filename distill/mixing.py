"""From one loss a view to one loss: `mean`, `learned`, `sample`.

Invariant: the weights of the views in a batch are positive and sum to 1. `sample` draws `count` views a step,
each equally often, so the expectation of its mean is the mean over all views, and what it draws depends on
seed and step alone: a resumed run draws the same. `learned` follows the gradient, so it leans to the views
that are easiest to match, not to those that help most: look at the logged weights. Exercised by: pytest
tests/distill/test_mixing.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..data.errors import ConfigError

MIXINGS = ("mean", "learned", "sample")


class Mixing(nn.Module):
    """Weighs the views of a batch. `sample` weighs as `mean` does: the reader has drawn before."""

    def __init__(self, name: str, views: int) -> None:
        super().__init__()
        if name not in MIXINGS:
            raise ConfigError(f"no mixing {name!r}", expected=", ".join(MIXINGS))
        self.logits = nn.Parameter(torch.zeros(views)) if name == "learned" else None

    def forward(self, losses: list[Tensor], index: list[int]) -> Tensor:
        """The weighted sum of scalar losses, at least one; index int [len(losses)] says of which views."""
        stacked = torch.stack(losses)
        if self.logits is None:
            return stacked.mean()
        logits = self.logits if len(index) == len(self.logits) else self.logits[index]
        return (torch.softmax(logits.float(), 0) * stacked).sum()

    def idle(self) -> Tensor | float:
        """Zero, with a gradient of zero for what `learned` learns: for a batch without any target."""
        return 0.0 if self.logits is None else self.logits.sum() * 0

    def logged(self, addresses: list[str]) -> dict[str, Tensor]:
        """The learned weight of every view, detached; empty for the other mixings."""
        if self.logits is None:
            return {}
        return dict(zip(addresses, torch.softmax(self.logits.detach(), 0), strict=True))


def draw(views: int, count: int, seed: int, step: int) -> list[int]:
    """`count` of `views` views for a step, without repetition, ascending."""
    if not 0 < count <= views:
        raise ConfigError(f"cannot sample {count} of {views} views", remedy="set the sample to fewer views")
    return sorted(np.random.default_rng([seed, step]).permutation(views)[:count].tolist())

"""From one loss per view to one loss: `mean`, `sum`, `learned`, `sample`.

`sample` draws `count` views for each step, each view equally often. So the expectation of its mean is the mean over all
views. The draw depends on seed and step alone, and a resumed run draws the same. `learned` follows the gradient, so it
prefers the views that are easiest to match, not those that help most. Look at the logged weights. With `mean`, each of
thirteen views has a thirteenth of a single view's weight. With `sum`, each has all of it.
Guarantees: the weights of the views in a batch are positive. They sum to 1, or with `sum` each is 1.
Try: `pytest tests/distill/test_mixing.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..data.errors import ConfigError

MIXINGS = ("mean", "sum", "learned", "sample")


class Mixing(nn.Module):
    """The weights of the views in a batch. `sample` has those of `mean`, because the reader draws the views."""

    def __init__(self, name: str, views: int) -> None:
        super().__init__()
        if name not in MIXINGS:
            raise ConfigError(f"there is no mixing {name!r}", expected=", ".join(MIXINGS))
        self.sums = name == "sum"
        self.logits = nn.Parameter(torch.zeros(views)) if name == "learned" else None

    def forward(self, losses: list[Tensor], index: list[int]) -> Tensor:
        """Return the weighted sum of one or more scalar losses. `index` has the view's number of each."""
        stacked = torch.stack(losses)
        if self.logits is None:
            return stacked.sum() if self.sums else stacked.mean()
        logits = self.logits if len(index) == len(self.logits) else self.logits[index]
        return (torch.softmax(logits.float(), 0) * stacked).sum()

    def idle(self) -> Tensor | float:
        """Return zero, with a gradient of zero for learned weights, for a batch without any target."""
        return 0.0 if self.logits is None else self.logits.sum() * 0

    def logged(self, addresses: list[str]) -> dict[str, Tensor]:
        """Return the learned weight of each view, detached. The other mixings have none."""
        if self.logits is None:
            return {}
        return dict(zip(addresses, torch.softmax(self.logits.detach(), 0), strict=True))


def draw(views: int, count: int, seed: int, step: int) -> list[int]:
    """Return `count` of `views` view numbers for a step, without repetition, ascending."""
    if not 0 < count <= views:
        raise ConfigError(f"cannot sample {count} of {views} views", remedy="set the sample to fewer views")
    return sorted(np.random.default_rng([seed, step]).permutation(views)[:count].tolist())

"""Weights averaged over steps: while training (EMA), and over the last checkpoints.

Invariant: parameters are averaged; buffers, such as the normalisation of the features, are the model's own. Exercised
by `stillhouse train CONFIG --set optim.ema=0.999` and `stillhouse decode --checkpoint average:5`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `model`, to be told of each step by `update_parameters`.

    The decay grows to `decay` as min(decay, (1 + n) / (10 + n)) after n steps: the first weights, which the seed made,
    would else weigh on the average for 1 / (1 - decay) steps.
    """

    def blend(averages: Any, current: Any, seen: Any) -> None:
        n = int(seen)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, current, seen)

    return AveragedModel(model, multi_avg_fn=blend)


M = TypeVar("M", bound=nn.Module)


def mean(models: Iterable[M]) -> M:
    """A model whose parameters are the means of those of `models`, each of which is done with before the next one is
    asked for: they may be one module, with other weights loaded each time.
    """
    average: AveragedModel | None = None
    for model in models:
        average = average or AveragedModel(model)
        average.update_parameters(model)
    if average is None:
        raise ValueError("no model to average")
    return cast(M, average.module)

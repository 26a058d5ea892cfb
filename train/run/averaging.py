"""Averages of weights: a moving average during training, and the mean of the last checkpoints.

Guarantees: only parameters are averaged. Buffers, such as the normalisation of the features, stay the model's own.
Try: `stillhouse train CONFIG --set optim.ema=0.999`, `stillhouse decode … --checkpoint average:5`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of `model`. Call its `update_parameters` after each step.

    After n steps the decay is min(decay, (1 + n) / (10 + n)). Otherwise the random first weights would count for
    1 / (1 - decay) steps.
    """

    def blend(averages: Any, current: Any, seen: Any) -> None:
        n = int(seen)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, current, seen)

    return AveragedModel(model, multi_avg_fn=blend)


M = TypeVar("M", bound=nn.Module)


def mean(models: Iterable[M]) -> M:
    """Return a model whose parameters are the means of those of `models`.

    Each model is read before the next one is asked for, so that they may be one module with other weights each time.
    """
    average: AveragedModel | None = None
    for model in models:
        average = average or AveragedModel(model)
        average.update_parameters(model)
    if average is None:
        raise ValueError("no model to average")
    return cast(M, average.module)

"""The schedules of a run: the learning rate and the weight of each transfer at a step.

Guarantees: a schedule depends on the step and the settings alone, so that a resumed run continues it.
Try: `pytest tests/train/test_config.py`.
"""

from __future__ import annotations

import math

from .sections import Config, TransferSettings


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule down to final_lr * lr.

    The steps of text alone have a warm-up of their own and then lr. The schedule begins with the speech, whose encoder
    they have not trained.
    """
    o = config.optim
    if step < config.text.pretrain_steps:
        return o.lr * min(1.0, (step + 1) / max(1, o.warmup_steps))
    step -= config.text.pretrain_steps
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[o.schedule]
    return o.lr * (o.final_lr + (1 - o.final_lr) * shape)


def transfer_weights(step: int, config: Config) -> dict[str, float]:
    """Return lambda of each transfer at a step, counted from 0. In the steps of text alone it is `weight`."""
    spoken = step - config.text.pretrain_steps
    return {n: t.weight if spoken < 0 else transfer_weight(spoken, t) for n, t in config.transfer.transfers.items()}


def transfer_weight(step: int, t: TransferSettings) -> float:
    """Return lambda of a step, counted from 0: linear warm-up to `weight`, then the decay to `final_weight`."""
    if step < t.warmup_steps:
        return t.weight * (step + 1) / t.warmup_steps
    if t.decay is None or t.decay_steps is None:
        return t.weight
    done = min(1.0, (step - t.warmup_steps) / t.decay_steps)
    fallen = done if t.decay == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return t.weight + (t.final_weight - t.weight) * fallen

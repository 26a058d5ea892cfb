"""What changes from step to step by the settings alone: the learning rate and λ.

Invariant: both follow from the step's number, so that a run that goes on needs no state of theirs. Exercised by
`stillhouse train`; pytest tests/train/test_config.py.
"""

from __future__ import annotations

import math

from .config import Config


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule down to final_lr · lr."""
    o = config.optim
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[o.schedule]
    return o.lr * (o.final_lr + (1 - o.final_lr) * shape)


def transfer_weight(step: int, config: Config) -> float:
    """λ of step `step` (from 0): linear warm-up to `weight`, then the decay, if any, to `final_weight`."""
    t = config.transfer
    if step < t.warmup_steps:
        return t.weight * (step + 1) / t.warmup_steps
    if t.decay is None or t.decay_steps is None:
        return t.weight
    done = min(1.0, (step - t.warmup_steps) / t.decay_steps)
    fallen = done if t.decay == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return t.weight + (t.final_weight - t.weight) * fallen

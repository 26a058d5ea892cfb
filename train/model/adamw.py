"""AdamW on the CPU, for one kernel call a group and without `torch._dynamo`.

Guarantees: the bits are those of torch.optim.AdamW with fused=True. Any optimiser of torch.optim imports torch's
compiler when it is made, which takes 2 s at the start of a run and is never used.
Try: `pytest tests/train/model/test_adamw.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CpuAdamW:
    """torch.optim.AdamW, as far as training on a CPU uses it: `param_groups`, `state`, `zero_grad` and `step`.

    Arguments:
        groups: dictionaries with `params` and `weight_decay`. Other keys are kept.
        lr, betas: of every group. A group's `lr` may be changed between steps.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, "betas": betas, "eps": 1e-8} | group for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients, or set them to zero."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), dtype=torch.float32)} | zeros
            step, mean, square = ([self.state[p][name] for p in params] for name in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(step, 1)
            torch._fused_adamw_(
                params, grads, mean, square, [], step, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=False,
            )  # fmt: skip

"""The C++ losses that bench_loss.py compares with ours if they are installed. No package index has them.

Guarantees: a peer gets its inputs in the form that suits it best, prepared before the time is taken.
Try: `make bench-loss`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

NAMES = ("optimized_transducer", "fast_rnnt", "warprnnt_pytorch")
Prepare = Callable[[torch.Tensor], Callable[[], object]]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def loss_steps(y, T, U, blank: int) -> dict[str, Prepare]:
    """Return functions by name that take new logits, packed if the name has that word, and return the step to time."""
    steps: dict[str, Prepare] = {}
    if installed("optimized_transducer"):
        import optimized_transducer

        def packed(z):
            z.requires_grad_()
            loss = optimized_transducer.transducer_loss
            return lambda: loss(z, y, T, U, blank, from_log_softmax=False, reduction="sum").backward()

        steps["optimized_transducer, packed, in place"] = packed
    if installed("fast_rnnt"):
        import fast_rnnt

        units = y.long()
        ends = torch.stack([torch.zeros_like(T), torch.zeros_like(T), U, T], dim=1).long()

        def full(z):
            z.requires_grad_()
            return lambda: fast_rnnt.rnnt_loss(z, units, blank, ends, reduction="sum").backward()

        steps["fast_rnnt"] = full
    if installed("warprnnt_pytorch"):
        import warprnnt_pytorch

        def warp(z):
            z.requires_grad_()
            return lambda: warprnnt_pytorch.rnnt_loss(z, y, T, U, blank, "sum").backward()

        steps["warprnnt_pytorch"] = warp
    return steps


def pruned_step(am, lm, parts, y, T, U, blank: int, width: int) -> Callable[[], object] | None:
    """Return a step of fast_rnnt's pruned loss, from projections on, joint included; None if it is not installed."""
    if not installed("fast_rnnt"):
        return None
    import fast_rnnt

    e, p, w, c = parts
    units = y.long()
    ends = torch.stack([torch.zeros_like(T), torch.zeros_like(T), U, T], dim=1).long()

    def step():
        simple, (px, py) = fast_rnnt.rnnt_loss_simple(lm, am, units, blank, ends, reduction="sum", return_grad=True)
        ranges = fast_rnnt.get_rnnt_prune_ranges(px, py, ends, width)
        e_band, p_band = fast_rnnt.do_rnnt_pruning(e, p, ranges)
        logits = torch.tanh(e_band + p_band) @ w.t() + c
        loss = fast_rnnt.rnnt_loss_pruned(logits, units, ranges, blank, ends, reduction="sum")
        (loss + 0.5 * simple).backward()

    return step

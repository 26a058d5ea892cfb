"""Losses of RNN transducers, which can be used without the rest of Stillhouse.

May import torch, numpy, numba and `extract/cpu_matmul.py`, which imports torch alone. numba's kernels are loaded when
a loss is first computed.
"""

from .joint import rnnt_loss_joint
from .loss import RNNTLoss, rnnt_loss
from .pruned import prune_ranges, rnnt_loss_simple
from .tdt import tdt_loss

__all__ = ["RNNTLoss", "precompile", "prune_ranges", "rnnt_loss", "rnnt_loss_joint", "rnnt_loss_simple", "tdt_loss"]


def precompile(*dtypes: str) -> None:
    """Compile the kernels of `rnnt_loss` and `rnnt_loss_joint`, or load them from numba's cache.

    Arguments:
        dtypes: names of torch's types, such as "float32" (the default) or "bfloat16".
    """
    import torch

    for name in dtypes or ("float32",):
        dtype = getattr(torch, name)
        targets, frames, units = torch.zeros(1, 1).int(), torch.tensor([2]).int(), torch.tensor([1]).int()
        logits = torch.zeros(1, 2, 2, 3, dtype=dtype, requires_grad=True)
        rnnt_loss(logits, targets, frames, units, return_occupancy=True)[0].backward()
        shapes = ((1, 2, 4), (1, 2, 4), (3, 4), (3,))
        e, p, w, c = (torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes)
        rnnt_loss_joint(e, p, w, c, targets, frames, units).backward()

"""The RNN-T loss: rnnt_loss (logits given) and rnnt_loss_joint (logits never exist), usable alone.

Invariant: imports torch, numpy and numba alone, and numba's kernels only when a loss is first computed.
Run: pytest tests/rnnt; see docs/rnnt-loss.md.
"""

from .joint import rnnt_loss_joint
from .loss import rnnt_loss

__all__ = ["rnnt_loss", "rnnt_loss_joint"]

"""Our losses and transfers for transducers of Hugging Face transformers, in its Trainer and in any other loop.

May import data, distill and the folders of train below loop. It never imports transformers: you load the model.
"""

from .attach import attach_transfer
from .checkpoints import TransferCheckpoints
from .collator import TransferCollator
from .heads import TransferHeads

__all__ = ["TransferCheckpoints", "TransferCollator", "TransferHeads", "attach_transfer"]

"""The transfer: states that a store holds of language models become a training loss of the transducer.

May import data and extract.store. It never loads a language model.
"""

from .batch import TransferBatch
from .targets import TargetReader, ViewSpec
from .transfer import Transfer, TransferLoss

__all__ = ["TargetReader", "Transfer", "TransferBatch", "TransferLoss", "ViewSpec"]

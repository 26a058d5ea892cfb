"""The objective: targets, aligners, heads, distances, mixing of views, the transfer loss."""

from .batch import TransferBatch
from .targets import TargetReader, ViewSpec
from .transfer import Transfer, TransferLoss

__all__ = ["TargetReader", "Transfer", "TransferBatch", "TransferLoss", "ViewSpec"]

"""Train, decode, score and export a transducer. May import `distill`, `extract.store` and `data`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop.huggingface import TransferCheckpoints, TransferCollator, TransferHeads, attach_transfer

__all__ = ["TransferCheckpoints", "TransferCollator", "TransferHeads", "attach_transfer"]


def __getattr__(name: str) -> Any:
    # The commands import this package, and what these names stand for imports torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loop import huggingface

    return getattr(huggingface, name)

"""The transducer and its construction from a recipe. May import `train.config`, `train.rnnt`, `distill` and `data`."""

from .transducer import Encoder, Transducer

__all__ = ["Encoder", "Transducer"]

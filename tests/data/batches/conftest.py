"""The corpus of tones, whose features and units the loader reads."""

from tones import tones

__all__ = ["tones"]

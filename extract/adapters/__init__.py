"""Stores for other toolkits: utterance ids, Lhotse cuts, xarray, torch datasets. May import `extract.store`, `data`."""

from .cuts import attach, cut_ids
from .ids import original, store_ids

__all__ = ["attach", "cut_ids", "original", "store_ids"]

"""A store in other people's terms: utterance ids of other toolkits, Lhotse's cuts, xarray, torch datasets."""

from .cuts import attach, cut_ids
from .ids import original, store_ids

__all__ = ["attach", "cut_ids", "original", "store_ids"]

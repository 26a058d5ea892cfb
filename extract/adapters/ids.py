"""Map ids of other toolkits to ids of a store. An augmented copy leads to the utterance that it was made of.

Guarantees: an id that the store knows stays as it is. Only the affixes below are removed from other ids.
Try: `pytest tests/extract/adapters/test_adapters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...data.errors import NoStoreError, UsageError, first_few
from ..store import Store

# Suffixes are Lhotse's (speed, tempo, volume, reverberation, loudness); the prefix is Kaldi's and ESPnet's.
_SUFFIX = re.compile(r"(.+?)(?:[_-](?:(?:sp|tp|vp|ln)-?\d+(?:\.\d+)?|rvb))+")
_PREFIX = re.compile(r"(?:sp|pv)\d+(?:\.\d+)?[_-](.+)")


def original(utterance: str) -> str:
    """Return an id without the affixes of augmentation: "84-1" for "84-1_sp0.9_vp1.2" and "sp0.9-84-1"."""
    for affix in (_SUFFIX, _PREFIX):
        match = affix.fullmatch(utterance)
        utterance = match[1] if match else utterance
    return utterance


def store_ids(store: Store, ids: Sequence[str], on_missing: str = "error") -> list[str]:
    """Return the store's id of each utterance.

    Arguments:
        on_missing: "error", or "keep" to return unknown ids as they are.

    Raises:
        NoStoreError: names the ids that the store knows neither with nor without their affixes.
    """
    if on_missing not in ("error", "keep"):
        raise UsageError(f"on_missing cannot be {on_missing!r}", expected="error or keep")
    unknown = [i for i, row in zip(ids, store.index.rows(ids).tolist()) if row < 0]
    originals = [original(i) for i in unknown]
    rows = store.index.rows(originals).tolist()
    renamed = {i: new for i, new, row in zip(unknown, originals, rows) if row >= 0}
    missing = [i for i in unknown if i not in renamed]
    if missing and on_missing == "error":
        remedy = 'extract this corpus into it, or give on_missing="keep"'
        raise NoStoreError(f"not in this store: {first_few(missing)}", where=store.address, remedy=remedy)
    return [renamed.get(i, i) for i in ids]

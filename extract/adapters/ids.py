"""Ids of other toolkits to ids of a store: copies that augmentation renamed are the utterance that they were made of.

Invariant: an id that the store knows is itself, whatever it looks like; nothing is guessed beyond the affixes below.
Exercised by: pytest tests/extract/adapters/test_adapters.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ...data.errors import NoStoreError, UsageError, first_few
from ..store import Store

# utt_sp0.9 (Lhotse: also tempo, volume, reverberation, loudness), utt-sp0.9, and Kaldi's and ESPnet's sp0.9-utt
_BEHIND = re.compile(r"(.+?)(?:[_-](?:(?:sp|tp|vp|ln)-?\d+(?:\.\d+)?|rvb))+")
_BEFORE = re.compile(r"(?:sp|pv)\d+(?:\.\d+)?[_-](.+)")


def original(utterance: str) -> str:
    """The id without the affixes of augmentation: "84-1_sp0.9_vp1.2" and "sp0.9-84-1" as "84-1"."""
    behind = _BEHIND.fullmatch(utterance)
    utterance = behind[1] if behind else utterance
    before = _BEFORE.fullmatch(utterance)
    return before[1] if before else utterance


def store_ids(store: Store, ids: Sequence[str], on_missing: str = "error") -> list[str]:
    """The store's id of each utterance; with on_missing="keep", unknown ids as they are.

    Errors: NoStoreError naming those that the store knows neither as they are nor without their affixes.
    """
    if on_missing not in ("error", "keep"):
        raise UsageError(f"on_missing cannot be {on_missing!r}", expected="error or keep")
    out = list(ids)
    unknown = np.flatnonzero(np.asarray(store.index.rows(out)) < 0).tolist() if out else []
    for i in unknown:
        out[i] = original(out[i])
    missing = [ids[i] for i, r in zip(unknown, store.index.rows([out[i] for i in unknown]).tolist()) if r < 0]
    if missing and on_missing == "error":
        raise NoStoreError(
            f"not in this store: {first_few(missing)}",
            where=store.address,
            remedy="extract this corpus into it, or give on_missing",
        )
    for i in unknown:
        if ids[i] in missing:
            out[i] = ids[i]
    return out

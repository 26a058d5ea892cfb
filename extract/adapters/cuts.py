"""Lhotse cuts: find the utterance of a store for each supervision of a batch.

Guarantees: a copy with another speed leads to the utterance that it was made of. The id comes from the field that
`attach` wrote, or from that field of a cut with one supervision, or from the supervision's id. Lhotse is not imported.
Try: `pytest tests/extract/adapters/test_adapters.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

from ..store import Store
from .ids import store_ids

FIELD = "stillhouse_id"


def attach(cuts: Any, store: Store, field: str = FIELD) -> Any:
    """Return the CutSet with the store's id of each supervision in the custom field `field`.

    Call it before any augmentation, because copies (`perturb_speed`, `mix`, `pad`, …) keep custom fields. It works on
    lazy CutSets and in worker processes.

    Raises:
        NoStoreError: when cuts are read, for a supervision that is not in the store.
    """
    return cuts.map(partial(_with_ids, store=store, field=field))  # Unlike a lambda, it can be pickled.


def _with_ids(cut: Any, store: Store, field: str) -> Any:
    def with_id(supervision: Any) -> Any:
        custom = supervision.custom or {}
        utterance = custom.get(field) or store_ids(store, [supervision.id])[0]
        return dataclasses.replace(supervision, custom={**custom, field: utterance})

    return cut.map_supervisions(with_id)


def cut_ids(
    store: Store, cuts: Iterable[Any], field: str = FIELD, on_missing: str = "error"
) -> tuple[list[str], list[str]]:
    """Return the store ids and the texts of all supervisions of cuts, in the order of Lhotse's batches.

    Arguments:
        cuts: batch["supervisions"]["cut"] of a batch (with return_cuts=True), or any CutSet.
        on_missing: see `store_ids`.
    """
    pairs = [(s, cut) for cut in _distinct(cuts) for s in cut.supervisions]
    ids = [(s.custom or {}).get(field) or _field_of_cut(cut, field) or s.id for s, cut in pairs]
    return store_ids(store, ids, on_missing), [s.text or "" for s, _ in pairs]


def _field_of_cut(cut: Any, field: str) -> Any:
    """The cut's own field if it has one supervision, because NeMo's loader keeps a manifest's keys there."""
    custom = getattr(cut, "custom", None) if len(cut.supervisions) == 1 else None
    return (custom or {}).get(field)


def _distinct(cuts: Iterable[Any]) -> Iterator[Any]:
    """Each cut once. A batch's list repeats a cut of n supervisions n times in a row, but a CutSet does not."""
    for _, group in groupby(cuts, key=id):
        same = list(group)
        times, left = divmod(len(same), max(1, len(same[0].supervisions)))
        yield from same[: len(same) if left else times]

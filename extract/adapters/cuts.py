"""Lhotse's cuts: which utterance of a store each supervision of a batch is.

Invariant: a supervision is looked up by the field that `attach` wrote, which every copy of it keeps, or by that of a
cut that holds nothing else, or else by its id; all ways lead a copy with another speed to the utterance it was made of.
Lhotse itself is not imported: cuts are taken for what they say they are. Exercised by: pytest
tests/extract/adapters/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from ..store import Store
from .ids import store_ids

FIELD = "stillhouse_id"


def attach(cuts: Any, store: Store, field: str = FIELD) -> Any:
    """The same CutSet, the store's id of each supervision in its custom field `field`.

    Before any augmentation: copies (`perturb_speed`, `mix`, `pad`, …) keep custom fields, however they are renamed.
    Works on lazy CutSets, and in worker processes. Errors, when cuts are read: NoStoreError for one that is not there.
    """
    return cuts.map(_Attach(store, field))


@dataclasses.dataclass(frozen=True)
class _Attach:
    """Of one cut; pickles, as lambdas do not."""

    store: Store
    field: str

    def __call__(self, cut: Any) -> Any:
        return cut.map_supervisions(self._supervision)

    def _supervision(self, supervision: Any) -> Any:
        custom = supervision.custom or {}
        found = custom.get(self.field) or store_ids(self.store, [supervision.id])[0]
        return dataclasses.replace(supervision, custom={**custom, self.field: found})


def cut_ids(
    store: Store, cuts: Iterable[Any], field: str = FIELD, on_missing: str = "error"
) -> tuple[list[str], list[str]]:
    """(store ids, texts) of all supervisions of these cuts, in order, as Lhotse's batches have them.

    cuts: what a batch has in batch["supervisions"]["cut"] (return_cuts=True), or any CutSet.
    """
    found = [(s, cut) for cut in _listed(cuts) for s in cut.supervisions]
    ids = [(s.custom or {}).get(field) or _alone(cut, field) or s.id for s, cut in found]
    return store_ids(store, ids, on_missing), [s.text or "" for s, _ in found]


def _alone(cut: Any, field: str) -> Any:
    """The cut's own field, where it has but one supervision: NeMo's loader keeps a manifest's keys there."""
    custom = getattr(cut, "custom", None) if len(cut.supervisions) == 1 else None
    return (custom or {}).get(field)


def _listed(cuts: Iterable[Any]) -> Iterator[Any]:
    """In a batch's list a cut of n supervisions stands n times, one behind the other; in a CutSet once."""
    for _, group in groupby(cuts, key=id):
        same = list(group)
        times, left = divmod(len(same), max(1, len(same[0].supervisions)))
        yield from same[: len(same) if left else times]

"""Rows that a store has already: a new row whose pass would be fed what the row that it replaces was fed is a copy.

Invariant: a copy has the same input hash, and its bytes match their checksum; what is damaged is run again.
Run: `pytest tests/extract/pipeline/test_refresh.py -k copied`.
"""

from __future__ import annotations

import numpy as np

from ...data.errors import StoreError
from ..store.format.index import Index
from ..store.format.int8 import Quantised
from ..store.format.plan import Plan, WorkItem
from ..store.reader import Store
from ..store.views import View
from ..store.writer import ItemWriter
from ..teacher.contexts import Window

Block = np.ndarray | Quantised


class Reuse:
    """What the rows of a unit can be copied from."""

    def __init__(self, plan: Plan, index: Index) -> None:
        self._plan, self._index = plan, index
        self._store: Store | None = None

    def copies(self, item: WorkItem, input_hash: np.ndarray) -> dict[int, dict[int, Block]]:
        """{utterance of the unit: {layer: its rows as stored}} of those that need no pass. input_hash uint64 [U]: of
        what a pass would be fed.
        """
        rows = np.arange(item.shard.first, item.shard.last)
        sources = np.array([self._index.source_of(r) for r in rows.tolist()])
        if not len(sources) or (sources < 0).all() or item.teacher not in self._plan.teachers:
            return {}
        if self._store is None:
            self._store = Store.open(self._plan.paths.root, checksums=True)
        store, views = self._store, [View(item.teacher, item.context, k) for k in item.layers]
        hashes, commits = store.input_hashes(views[0]), store.commits(item.teacher, item.context)
        found: dict[int, dict[int, Block]] = {}
        for u in np.flatnonzero(sources >= 0).tolist():
            source = int(sources[u])
            shard = store.shard_of(item.teacher, source)
            if hashes[source] == input_hash[u] and commits.has(shard, item.layers):
                try:
                    found[u] = {v.layer: block(*store.stored_rows(np.array([source]), v)) for v in views}
                except StoreError:
                    continue  # damaged: it is run again
        return found


def block(values: np.ndarray, scale: np.ndarray | None) -> Block:
    return values if scale is None else Quantised(values, scale, np.zeros((len(values), 4), np.float32))


def write(writer: ItemWriter, copies: dict[int, dict[int, Block]]) -> None:
    for utterance, layers in copies.items():
        for layer, block in layers.items():
            if len(block):
                writer.write(layer, utterance, 0, block)


def without(windows: list[Window], utterances: set[int]) -> list[Window]:
    """The windows that others come out of."""
    for w in windows:
        w.kept = [k for k in w.kept if k.utterance not in utterances]
    return [w for w in windows if w.kept]

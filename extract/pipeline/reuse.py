"""Copy rows of a store: a new row is a copy if the model would read the same for it as for the row that it replaces.

Guarantees: a copy has the same input hash, and its bytes match their checksum. A damaged row is run again.
Try: `pytest tests/extract/pipeline/test_refresh.py -k moved`.
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

Copies = dict[int, dict[int, np.ndarray | Quantised]]  # {utterance of a work item: {layer: its rows as stored}}


class Reuse:
    """Finds rows that a work item can copy."""

    def __init__(self, plan: Plan, index: Index) -> None:
        self._plan, self._index = plan, index
        self._store: Store | None = None

    def copies(self, item: WorkItem, input_hash: np.ndarray) -> Copies:
        """Return the utterances of an item that need no pass of the model.

        `input_hash`, uint64 [U], is the hash of what the model would read for each utterance of the item.
        """
        rows = np.arange(item.shard.first, item.shard.last)
        sources = np.array([self._index.source_of(r) for r in rows.tolist()])
        if not len(sources) or (sources < 0).all() or item.teacher not in self._plan.teachers:
            return {}
        if self._store is None:
            self._store = Store.open(self._plan.paths.files, checksums=True)
        store, views = self._store, [View(item.teacher, item.context, k) for k in item.layers]
        hashes, commits = store.inputs_seen(views[0])[0], store.commits(item.teacher, item.context)
        copies: Copies = {}
        for u in np.flatnonzero(sources >= 0).tolist():
            source = int(sources[u])
            shard = store.shard_of(item.teacher, source)
            if hashes[source] == input_hash[u] and commits.has(shard, item.layers):
                try:
                    copies[u] = {v.layer: stored_block(*store.stored_rows(np.array([source]), v)) for v in views}
                except StoreError:
                    continue  # It is damaged, so the model runs it again.
        return copies


def stored_block(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray | Quantised:
    """Return rows as `ItemWriter.write` takes them."""
    return values if scale is None else Quantised(values, scale, np.zeros((len(values), 4), np.float32))


def write_copies(writer: ItemWriter, copies: Copies) -> None:
    """Write copied rows into a work item's files."""
    for utterance, layers in copies.items():
        for layer, block in layers.items():
            if len(block):
                writer.write(layer, utterance, 0, block)


def windows_without(windows: list[Window], utterances: set[int]) -> list[Window]:
    """Return the windows that other utterances come out of."""
    for w in windows:
        w.kept = [k for k in w.kept if k.utterance not in utterances]
    return [w for w in windows if w.kept]

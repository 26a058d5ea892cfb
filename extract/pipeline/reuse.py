"""Copy rows that a store has already, instead of running the model: single rows, or whole work items.

Guarantees: a copy has the input hash of its source, and its bytes match their checksum. A new row of a changed corpus
is a copy if the model would read the same for it as for the row that it replaces.
Try: `pytest tests/extract/pipeline/test_refresh.py -k moved`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...data.errors import StoreError
from ..store.disk.layout import Dtype, dtype_of
from ..store.format.index import Index
from ..store.format.plan import Plan, WorkItem
from ..store.format.quantised import Quantised
from ..store.reader import Store
from ..store.views import View
from ..store.writer import ItemWriter
from ..teacher.contexts import Window

READ_BYTES = 16 << 20  # at a time: an object store answers many requests at once
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
        dtype = dtype_of(self._plan.teachers[item.teacher].dtype)
        for u in np.flatnonzero(sources >= 0).tolist():
            source = int(sources[u])
            shard = int(store.shard_of(item.teacher, source))
            if hashes[source] == input_hash[u] and commits.has(shard, item.layers):
                try:
                    source_row = np.array([source])
                    copies[u] = {v.layer: stored_block(dtype, *store.stored_rows(source_row, v)) for v in views}
                except StoreError:
                    continue  # It is damaged, so the model runs it again.
        return copies


def stored_block(dtype: Dtype, values: np.ndarray, scale: np.ndarray | None) -> np.ndarray | Quantised:
    """Return rows as `ItemWriter.write` takes them."""
    return Quantised(values, scale, np.zeros((len(values), 4), np.float32)) if dtype.quantised else values


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


def copy_item(
    plan: Plan, scratch: Path, item: WorkItem, sources: Sequence[tuple[Store, int]], ids: Sequence[str]
) -> None:
    """Write and commit a work item out of rows of stores.

    Arguments:
        plan: the plan of the store that is written.
        scratch: a folder on its disk.
        item: the work item.
        sources: (store opened with checksums, row) of each utterance of the item.
        ids: the utterances' ids.

    Raises:
        StoreError: names the view and the utterance whose bytes are damaged.
    """
    shard, record = item.shard, plan.teachers[item.teacher]
    lengths = np.zeros(len(sources), dtype=np.int64)
    for store, where, rows in by_store(sources):
        lengths[where] = store.row_lengths(item.teacher, rows)
    starts = shard.number * item.generation.shard_rows + np.cumsum(lengths) - lengths
    inputs: tuple[np.ndarray, ...]
    inputs = np.zeros(len(ids), np.uint64), np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    with ItemWriter(plan.paths, scratch, record, item, starts, lengths, list(ids)) as writer:
        for part in _parts(sources, lengths, max(1, READ_BYTES // writer.row_bytes)):
            store, rows = sources[part[0]][0], np.array([sources[u][1] for u in part])
            for layer in item.layers:
                values, scale = store.stored_rows(rows, View(item.teacher, item.context, layer))
                end = 0
                for u in part:
                    own = slice(end, end := end + int(lengths[u]))
                    block = stored_block(writer.dtype, values[own], None if scale is None else scale[own])
                    writer.write(layer, u, 0, block)
        for store, where, rows in by_store(sources):
            for array, stored in zip(inputs, store.inputs_seen(View(item.teacher, item.context, item.layers[0]))):
                array[where] = stored[rows]
        for layer in item.layers if writer.dtype.quantised else ():
            writer.loss[layer] += _losses(item, layer, sources, lengths)
        writer.commit(*inputs, item.generation.number)


def by_store(sources: Sequence[tuple[Store, int]]) -> Iterator[tuple[Store, np.ndarray, np.ndarray]]:
    """Yield each store with its positions among `sources` and its rows: one look-up a store, however many rows."""
    number = {id(store): store for store, _ in sources}
    of = np.array([id(store) for store, _ in sources], dtype=np.int64)
    rows = np.array([row for _, row in sources], dtype=np.int64)
    for key, store in number.items():
        where = np.flatnonzero(of == key)
        yield store, where, rows[where]


def _parts(sources: Sequence[tuple[Store, int]], lengths: np.ndarray, most: int) -> Iterator[list[int]]:
    """Utterances with tokens that are read together: of one store, and about `most` tokens."""
    part: list[int] = []
    for u in np.flatnonzero(lengths).tolist():
        if part and (sources[u][0] is not sources[part[0]][0] or lengths[part].sum() + lengths[u] > most):
            yield part
            part = []
        part.append(u)
    if part:
        yield part


def _losses(item: WorkItem, layer: int, sources: Sequence[tuple[Store, int]], lengths: np.ndarray) -> np.ndarray:
    """The loss of these quantised rows. It is recorded by shard, so each row counts its share of the shard's rows."""
    total = np.zeros(4)
    for store, where, rows in by_store(sources):
        shards, records = store.shard_of(item.teacher, rows), store.commits(item.teacher, item.context).of
        for number in np.unique(shards).tolist():
            commit = records.get((number, layer))
            if commit is not None and str(layer) in commit.losses and commit.rows[1] > commit.rows[0]:
                copied = int(lengths[where[shards == number]].sum())
                total += np.array(commit.losses[str(layer)]) * (copied / (commit.rows[1] - commit.rows[0]))
    return total

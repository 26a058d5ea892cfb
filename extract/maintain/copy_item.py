"""Copy the rows of a work item byte for byte from stores that have them, instead of running the model.

Guarantees: copied bytes match the checksum of what they were copied from. The input hash and the context that each
utterance saw are copied, too.
Try: `pytest tests/extract/maintain/test_maintain.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..pipeline.reuse import stored_block
from ..store.format.plan import Plan, WorkItem
from ..store.reader import Store
from ..store.views import View
from ..store.writer import ItemWriter

READ_BYTES = 16 << 20  # at a time: an object store answers many requests at once


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
    lengths = np.array([s.row_length(item.teacher, r) for s, r in sources], dtype=np.int64)
    starts = shard.number * item.generation.shard_rows + np.cumsum(lengths) - lengths
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    inputs = np.zeros(len(ids), np.uint64), np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    inputs_seen = {id(s): s.inputs_seen(View(item.teacher, item.context, item.layers[0])) for s, _ in sources}
    with ItemWriter(plan.paths, scratch, record, item, starts, lengths, list(ids)) as writer:
        for part in _parts(sources, lengths, max(1, READ_BYTES // writer.row_bytes)):
            store, rows = sources[part[0]][0], np.array([sources[u][1] for u in part])
            for layer in item.layers:
                values, scale = store.stored_rows(rows, View(item.teacher, item.context, layer))
                end = 0
                for u in part:
                    own = slice(end, end := end + int(lengths[u]))
                    writer.write(layer, u, 0, stored_block(values[own], None if scale is None else scale[own]))
        for u, (store, row) in enumerate(sources):
            for array, stored in zip(inputs, inputs_seen[id(store)]):
                array[u] = stored[row]
        for layer in item.layers if writer.dtype.scaled else ():
            writer.loss[layer] += _losses(item, layer, sources, lengths)
        writer.commit(*inputs, item.generation.number)


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
    """The int8 loss of these rows. It is recorded by shard, so each row counts its share of the shard's rows."""
    total = np.zeros(4)
    for (store, row), n in zip(sources, lengths.tolist()):
        number = store.shard_of(item.teacher, row)
        commit = store.commits(item.teacher, item.context).of.get((number, layer))
        if commit is not None and str(layer) in commit.losses and commit.rows[1] > commit.rows[0]:
            total += np.array(commit.losses[str(layer)]) * (n / (commit.rows[1] - commit.rows[0]))
    return total

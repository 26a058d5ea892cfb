"""Units of work whose rows are in a store already: copied byte for byte instead of run.

Invariant: a copy's bytes match the checksum of what they were copied from, and what is recorded of its pass (input
hash, context seen) comes along. Run: `pytest tests/extract/maintain/test_maintain.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..pipeline.reuse import block
from ..store.format.plan import Plan, WorkItem
from ..store.reader import Store
from ..store.views import View
from ..store.writer import ItemWriter

READ_BYTES = 16 << 20  # at a time: an object store answers many requests at once


def copy_item(
    plan: Plan, scratch: Path, item: WorkItem, sources: Sequence[tuple[Store, int]], ids: Sequence[str]
) -> None:
    """Write and commit a unit out of rows of stores: one (store opened with checksums, row) an utterance.

    Errors: StoreError naming view and utterance where what is to be copied is damaged.
    """
    shard, record = item.shard, plan.teachers[item.teacher]
    lengths = np.array([s.row_length(item.teacher, r) for s, r in sources], dtype=np.int64)
    starts = shard.number * item.generation.shard_rows + np.cumsum(lengths) - lengths
    passes: tuple[np.ndarray, np.ndarray, np.ndarray]
    passes = np.zeros(len(ids), np.uint64), np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    fed = {id(s): s.inputs_seen(View(item.teacher, item.context, item.layers[0])) for s, _ in sources}
    with ItemWriter(plan.paths, scratch, record, item, starts, lengths, list(ids)) as writer:
        for part in _parts(sources, lengths, max(1, READ_BYTES // writer.row_bytes)):
            store, rows = sources[part[0]][0], np.array([sources[u][1] for u in part])
            for layer in item.layers:
                values, scale = store.stored_rows(rows, View(item.teacher, item.context, layer))
                end = 0
                for u in part:
                    here = slice(end, end := end + int(lengths[u]))
                    writer.write(layer, u, 0, block(values[here], None if scale is None else scale[here]))
        for u, (store, row) in enumerate(sources):
            for into, every in zip(passes, fed[id(store)]):
                into[u] = every[row]
        for layer in item.layers if writer.dtype.scaled else ():
            writer.loss[layer] += _losses(item, layer, sources, lengths)
        writer.commit(*passes, item.generation.number)


def _parts(sources: Sequence[tuple[Store, int]], lengths: np.ndarray, most: int) -> Iterator[list[int]]:
    """Utterances that have tokens, those of one store together: what is read at a time, about `most` tokens."""
    part: list[int] = []
    for u in np.flatnonzero(lengths).tolist():
        if part and (sources[u][0] is not sources[part[0]][0] or lengths[part].sum() + lengths[u] > most):
            yield part
            part = []
        part.append(u)
    if part:
        yield part


def _losses(item: WorkItem, layer: int, sources: Sequence[tuple[Store, int]], lengths: np.ndarray) -> np.ndarray:
    """What int8 cost these rows: recorded a shard, so each row counts its share of its shard's."""
    total = np.zeros(4)
    for (store, row), n in zip(sources, lengths.tolist()):
        number = store.shard_of(item.teacher, row)
        commit = store.commits(item.teacher, item.context).of.get((number, layer))
        if commit is not None and str(layer) in commit.losses and commit.rows[1] > commit.rows[0]:
            total += np.array(commit.losses[str(layer)]) * (n / (commit.rows[1] - commit.rows[0]))
    return total

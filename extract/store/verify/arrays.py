"""Verify the small arrays as files: their metadata can be read, and every chunk is there and whole.

Guarantees: nothing is written. What a reader of plain Zarr could not read, or would take for the fill value, is found.
Try: `stillhouse inspect verify STORE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ....data.errors import StillhouseError, StoreError
from ..disk.layout import dtype_of
from ..disk.paths import Paths
from ..format.arrays import RawArray
from ..format.plan import TeacherRecord
from .sums import INPUT_ARRAYS, TABLES

_EDITION = ("id_hash", "id_row", "order", "session", "source")
# Arrays that are whole when a plan is written, beside those of rows. Chunks of the others come with the commits.
_VOCABULARY = ("vocab_id", "embedding", "vocab_piece")


def array_damage(
    paths: Paths, record: TeacherRecord, contexts: set[int], rows: np.ndarray, shards: set[int]
) -> Iterator[tuple[str, Path]]:
    """Yield (what, where) of all that is wrong with a teacher's arrays.

    `contexts` are the positions of complete contexts. Only the utterances in `rows` and `shards` can be read.
    """
    teacher, group = record.name, paths.data / record.name
    planned = record.row_arrays if record.is_speech else (*record.row_arrays, *_VOCABULARY)
    states = dtype_of(record.dtype).array
    for name in sorted({p.name for p in group.iterdir() if p.is_dir()} | {states, *planned, *INPUT_ARRAYS}):
        path = group / name
        try:
            array = _opened(paths, teacher, name)
            if not array.plain:
                continue  # `hidden`, `code` and `scale` are checked by work item; others are compressed copies.
            indices = array.indices()
        except StoreError as e:
            yield e.what, path / "zarr.json"
            continue
        by_row = name in ("start", "length", "audio_source")
        served = set((rows.astype(np.int64) // max(1, array.chunks[0 if by_row else -1])).tolist())
        for index in indices:
            needed = name in planned or (name in INPUT_ARRAYS and index[0] in contexts)
            if name in ("token_id", "span"):
                needed = index[0] in shards
            elif by_row or name in INPUT_ARRAYS:
                needed = needed and index[0 if by_row else -1] in served
            yield from _chunk_damage(array, array.file(*index), needed)


def table_chunk_damage(paths: Paths, editions: set[int], utterances: int) -> Iterator[tuple[str, Path]]:
    """Yield (what, where) of all that is wrong with the first tables of utterances and those of `editions`.

    Only the first `utterances` rows count. Raises StoreError, OSError, ValueError or IndexError for a damaged table.
    """
    groups = [(), *(("editions", str(e)) for e in sorted(editions - {0}))]
    arrays = [
        _opened(paths, "utterances", *group, name) for group in groups for name in (_EDITION if group else TABLES)
    ]
    rows = {"text_hash": utterances, "id_offset": utterances + 1}
    rows["id_bytes"] = int(arrays[0].read()[utterances])
    for array in arrays:
        if array.plain:
            for n in range(-(-rows.get(array.path.name, array.shape[0]) // array.chunks[0])):
                yield from _chunk_damage(array, array.file(n), True)


def _opened(paths: Paths, *name: str) -> RawArray:
    """Open an array. Raises StoreError where its metadata cannot be read, or is not an array's."""
    try:
        array = RawArray(paths, *name)
        nodes = [array.meta.get(key) for key in ("zarr_format", "node_type")]
    except (StillhouseError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        what = e.what if isinstance(e, StillhouseError) else str(e)
        raise StoreError(f"its metadata cannot be read: {what}", where=paths.data.joinpath(*name)) from e
    if nodes != [3, "array"]:
        raise StoreError("its metadata is not an array's", where=array.path)
    return array


def _chunk_damage(array: RawArray, file: Path, needed: bool) -> Iterator[tuple[str, Path]]:
    expected = int(np.prod(array.chunks)) * array.dtype.itemsize
    if not file.exists():
        if needed:
            yield "a chunk is missing", file
    elif file.stat().st_size != expected:
        yield f"a chunk has {file.stat().st_size:,} bytes, expected {expected:,}", file

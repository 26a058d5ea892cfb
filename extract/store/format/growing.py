"""Arrays that grow at their end: rows of utterances, tokens and vocabulary that a changed corpus adds.

Invariant: what lies before the first new row is not touched, on disk or off it; nothing behind the rows that a
generation counts means anything, so whoever grows a store may die at any moment and the next one writes there again.
Run: `pytest tests/extract/pipeline/test_refresh.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..disk.durable import explain_full_disk, fsync_all, open_sized, pwrite_all, read_json, write_json
from .arrays import RawArray
from .block_sums import record_sums


def grow(path: Path, shape: dict[int, int], exactly: bool = False) -> None:
    """Give an array's axes (number → length) at least these lengths; chunks that nobody wrote read as the fill."""
    meta = read_json(path / "zarr.json")
    longer = [shape.get(axis, n) if exactly else max(n, shape.get(axis, 0)) for axis, n in enumerate(meta["shape"])]
    if longer != meta["shape"]:
        meta["shape"] = longer
        write_json(path / "zarr.json", meta)


def append(path: Path, values: np.ndarray, first: int, last: bool = False) -> None:
    """Write rows [first, first + len(values)) of an array whose chunks hold whole rows, and sync them.

    `last`: the array ends there, whatever a planner that died has put behind.
    """
    if not len(values):
        return
    grow(path, {0: first + len(values)}, exactly=last)
    array = RawArray(path)
    values = np.ascontiguousarray(values, dtype=array.dtype)
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    length, done, written = array.chunks[0], 0, []
    while done < len(values):
        number, inside = divmod(first + done, length)
        part = values[done : done + length - inside]
        file = array.file(number, *(0 for _ in array.shape[1:]))
        with explain_full_disk(file):
            fd = open_sized(file, length * row_bytes)
            try:
                pwrite_all(fd, memoryview(part.data).cast("B"), inside * row_bytes)
            finally:
                os.close(fd)
        written += [file, *(p for p in file.parents if p.is_relative_to(path))]
        done += len(part)
    fsync_all(written)
    record_sums(path, values, first)

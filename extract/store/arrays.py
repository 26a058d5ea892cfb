"""The small arrays of a store (everything but `hidden`), read and written as raw chunk files.

Invariant: what is read here equals what zarr-python reads; an array whose codecs are not plain bytes (someone's
compressed copy) is handed to zarr. Run: `pytest tests/extract/test_layout.py`.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import StoreError
from .files import allocate, pwrite_all, read_json, room, write_bytes, write_json
from .remote import local, mirror_of

_NUMPY = {
    "int8": "i1",
    "float16": "<f2",
    "float32": "<f4",
    "uint8": "u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
} | {
    "int32": "<i4",
    "int64": "<i8",
}


class RawArray:
    """One Zarr array on disk: `shape`, `chunks`, `dtype`, and whole reads by leading index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.meta: dict[str, Any] = read_json(path / "zarr.json")
        except FileNotFoundError as e:
            raise StoreError("an array is missing", where=path) from e
        self.shape = tuple(self.meta["shape"])
        self.chunks = tuple(self.meta["chunk_grid"]["configuration"]["chunk_shape"])
        self.dtype = np.dtype(_NUMPY[self.meta["data_type"]])
        self.plain = [c["name"] for c in self.meta["codecs"]] == ["bytes"]
        fill = self.meta["fill_value"]
        self.fill = np.nan if fill == "NaN" else fill

    def file(self, *index: int) -> Path:
        return local(self.path.joinpath("c", *map(str, index)))

    def files(self, *lead: int) -> list[Path]:
        """Where the chunks behind the leading indices lie or will; the last axis alone may have several."""
        return [self.path.joinpath("c", *map(str, (*lead, n))) for n in range(-(-self.shape[-1] // self.chunks[-1]))]

    def read(self, *lead: int) -> np.ndarray:
        """The array behind the leading indices, whole: a memory map where one chunk holds it, else a copy.

        Leading axes must have chunks of length 1. A chunk without a file reads as the fill value.
        """
        if not self.plain:
            return self._read_with_zarr(*lead)
        shape, chunks = self.shape[len(lead) :], self.chunks[len(lead) :]
        grid = [range(-(-n // c)) for n, c in zip(shape, chunks)]
        if shape and 0 not in shape and chunks == shape and self.file(*lead, *(0 for _ in shape)).is_file():
            return self._map(shape, *lead, *(0 for _ in shape))
        out = np.full(shape, self.fill, dtype=self.dtype)
        for index in itertools.product(*grid):
            if self.file(*lead, *index).is_file():
                part = self._map(chunks, *lead, *index)
                where = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunks, shape))
                out[where] = part[tuple(slice(0, s.stop - s.start) for s in where)]
        return out

    def chunk(self, *index: int) -> np.ndarray:
        """One whole chunk, memory-mapped, as a plain array (slices of np.memmap cost a microsecond each)."""
        return self._map(self.chunks, *index)

    def _map(self, shape: tuple[int, ...], *index: int) -> np.ndarray:
        path = self.file(*index)
        expected = int(np.prod(shape)) * self.dtype.itemsize
        try:
            size = path.stat().st_size
        except FileNotFoundError as e:
            raise StoreError("a chunk is missing", where=path, remedy="stillhouse inspect verify STORE") from e
        if size != expected:
            raise StoreError("a chunk has the wrong size", where=path, expected=f"{expected:,} bytes")
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r", shape=shape))

    def _read_with_zarr(self, *lead: int) -> np.ndarray:
        import zarr

        if mirror_of(self.path) is not None:
            raise StoreError("its codecs are not ours", where=self.path, remedy="copy the store to a disk to read it")
        return np.asarray(zarr.open_array(self.path, mode="r")[lead])

    def write_range(self, values: np.ndarray, *lead: int, first: int) -> list[Path]:
        """Write `values` at [*lead, first:first+len] in place; the last axis may have several chunks.

        Returns the files and folders to be synced before anything may rely on the range. Writers of different units
        write disjoint ranges, and nothing reads a range before its commit.
        """
        values = np.ascontiguousarray(values, dtype=self.dtype)
        length, item = self.chunks[-1], self.dtype.itemsize
        done, written = 0, []
        while done < len(values):
            index, inside = divmod(first + done, length)
            part = values[done : done + length - inside]
            path = self.file(*lead, index)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                written += [p for p in path.parents if p.is_relative_to(self.path)]
            with room(path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    allocate(fd, length * item)
                    pwrite_all(fd, memoryview(part.data).cast("B"), inside * item)
                finally:
                    os.close(fd)
            written.append(path)
            done += len(part)
        return written


def create_array(path: Path, meta: dict[str, Any], values: np.ndarray | None = None) -> None:
    """Write `zarr.json` and, where `values` are given, every chunk of them."""
    if values is not None:
        array_shape, chunks = tuple(meta["shape"]), tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
        dtype = np.dtype(_NUMPY[meta["data_type"]])
        if values.shape != array_shape:
            raise ValueError(f"values of shape {values.shape} for an array of {array_shape}")
        for index in itertools.product(*(range(-(-n // c)) for n, c in zip(array_shape, chunks))):
            block = np.full(chunks, 0, dtype=dtype)
            part = values[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks))]
            block[tuple(slice(0, n) for n in part.shape)] = part
            write_bytes(path.joinpath("c", *map(str, index)), block.tobytes())
    write_json(path / "zarr.json", meta)

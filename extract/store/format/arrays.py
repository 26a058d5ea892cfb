"""The small arrays of a store (everything but `hidden`), read and written as raw chunk files.

Guarantees: what is read here equals what zarr-python reads. An array whose codecs are not plain bytes (a compressed
copy) is read through zarr. Arrays grow at their end: what lies before the first new row is never touched, and rows
behind those that a generation counts mean nothing, so a planner may die at any moment.
Try: `pytest tests/extract/store/test_layout.py tests/extract/pipeline/test_refresh.py`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import StoreError
from ....data.files.atomic import sync
from ..disk.checksums import with_checksum
from ..disk.durable import WriteBatch, explain_full_disk, open_sized, pwrite_all, write_bytes
from ..disk.layout import ZARR_DTYPES
from ..disk.paths import Paths
from .block_sums import RowSums, sum_rows

_NUMPY = {zarr: np.dtype(short).newbyteorder("<") for short, zarr in ZARR_DTYPES.items()}

# The arrays of a store, by the number of their axes and the types that their numbers may have.
_ARRAYS: dict[tuple[int, tuple[str, ...]], tuple[str, ...]] = {
    (1, ("uint8",)): ("id_bytes", "vocab_piece"),
    (1, ("int32",)): ("id_row", "session", "order", "source", "length", "token_id", "vocab_id"),
    (1, ("int64",)): ("id_offset", "start"),
    (1, ("uint64",)): ("id_hash", "text_hash"),
    (2, ("int32",)): ("span", "context_left", "context_right"),
    (2, ("int64",)): ("audio_source",),
    (2, ("uint64",)): ("input_hash",),
    (2, ("float16",)): ("embedding",),
    (3, ("float16",)): ("scale",),
    (3, ("float32",)): ("norm_mean", "norm_std"),
    (3, ("uint32",)): ("crc32c",),
    (4, ("float16", "uint16", "float32", "int8")): ("hidden",),
    (4, ("uint8",)): ("code",),
    (5, ("float16",)): ("codebook",),
}
_KNOWN = {name: kind for kind, names in _ARRAYS.items() for name in names}
_UNASKED = 1 << 30  # bytes that an array may declare before its files are counted
_VERIFY = "stillhouse inspect verify STORE"


class RawArray:
    """One Zarr array of a store, as "minilm", "token_id": `shape`, `chunks`, `dtype`, and whole reads."""

    def __init__(self, paths: Paths, *name: str) -> None:
        self.path, self.files = paths.data.joinpath(*name), paths.files
        try:
            self.meta: dict[str, Any] = self.files.read_json(self.path / "zarr.json")
        except (FileNotFoundError, NotADirectoryError) as e:
            raise StoreError("an array is missing", where=self.files.place(self.path)) from e
        try:
            self.shape = tuple(self.meta["shape"])
            self.chunks = tuple(self.meta["chunk_grid"]["configuration"]["chunk_shape"])
            self.dtype = _NUMPY[self.meta["data_type"]]
            self.plain = [c["name"] for c in self.meta["codecs"]] == ["bytes"]
            fill = self.meta["fill_value"]
            self.fill = np.nan if fill == "NaN" else fill
            if not self._sound():
                raise ValueError(f"{self.shape} in chunks of {self.chunks}")
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise StoreError(
                f"an array's metadata is damaged: {e!r:.80}", where=self.files.place(self.path / "zarr.json")
            ) from e

    def _sound(self) -> bool:
        """Return whether shape, chunks, type and fill can be those of such an array."""
        rank, types = _KNOWN.get(self.path.name, (len(self.shape), (self.meta["data_type"],)))
        numbers = [*self.shape, *self.chunks]
        if not all(type(n) is int and 0 <= n < 1 << 53 for n in numbers) or self.meta["data_type"] not in types:
            return False
        if not len(self.shape) == len(self.chunks) == rank or any(n and not c for n, c in zip(self.shape, self.chunks)):
            return False
        if isinstance(self.fill, bool) or not isinstance(self.fill, int | float):
            return False
        with np.errstate(all="ignore"):
            np.full(1, self.fill, self.dtype)  # OverflowError, ValueError where it does not fit
        return isinstance(self.meta.get("attributes", {}), dict)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Yield the index of every chunk. Raises StoreError where the metadata declare more than the files can hold."""
        grid = [-(-n // c) if n else 0 for n, c in zip(self.shape, self.chunks)]
        self._refuse_boundless(self.shape, math.prod(grid))
        return itertools.product(*map(range, grid))

    def file(self, *index: int) -> Path:
        """Return the file of a chunk, brought to this disk. It may not exist."""
        return self.files.local(self.path.joinpath("c", *map(str, index)))

    def chunk_paths(self, *lead: int) -> list[Path]:
        """Return where the chunks behind the leading indices lie or will lie; only the last axis may have several."""
        return [self.path.joinpath("c", *map(str, (*lead, n))) for n in range(-(-self.shape[-1] // self.chunks[-1]))]

    def read(self, *lead: int, written: Sequence[tuple[int, int]] = ()) -> np.ndarray:
        """Return the array behind the leading indices: a memory map where one chunk holds it, else a copy.

        Leading axes must have chunks of length 1. The ranges `written` [first, last) of the next axis have been
        written, so that their chunks have files. Any other chunk without a file reads as the fill value.
        Raises StoreError.
        """
        if any(not 0 <= i < n for i, n in zip(lead, self.shape)):
            raise StoreError(f"its shape {self.shape} has no {lead}", where=self.path, remedy=_VERIFY)
        if not self.plain:
            return self._read_with_zarr(*lead)
        shape, chunks = self.shape[len(lead) :], self.chunks[len(lead) :]
        grid = [range(-(-n // c) if n else 0) for n, c in zip(shape, chunks)]
        if shape and 0 not in shape and chunks == shape and self.file(*lead, *(0 for _ in shape)).is_file():
            return self._map(shape, *lead, *(0 for _ in shape))
        self._refuse_boundless(shape, math.prod(map(len, grid)), *lead)
        out = np.full(shape, self.fill, dtype=self.dtype)
        for index in itertools.product(*grid):
            begin, end = (index[0] * chunks[0], (index[0] + 1) * chunks[0]) if index else (0, 0)
            if any(max(a, begin) < min(b, end) for a, b in written) or self.file(*lead, *index).is_file():
                part = self._map(chunks, *lead, *index)
                where = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunks, shape))
                out[where] = part[tuple(slice(0, s.stop - s.start) for s in where)]
        return out

    def _refuse_boundless(self, shape: tuple[int, ...], chunks: int, *lead: int) -> None:
        """Raise StoreError where the metadata declare far more than the files hold, before memory is asked for."""
        if math.prod(shape) * self.dtype.itemsize <= _UNASKED and chunks <= _UNASKED // 64:
            return
        files = self.files.count_files(self.path.joinpath("c", *map(str, lead)))
        if files is not None and chunks > 4 * files + 4:
            what = f"its metadata declare {shape} numbers in {chunks:,} chunks, and only {files:,} have files"
            raise StoreError(what, where=self.path / "zarr.json", remedy=_VERIFY)

    def chunk(self, *index: int) -> np.ndarray:
        """Return one whole chunk, memory-mapped, as a plain array (slices of np.memmap cost a microsecond each)."""
        return self._map(self.chunks, *index)

    def _map(self, shape: tuple[int, ...], *index: int) -> np.ndarray:
        path = self.file(*index)
        expected = int(np.prod(shape)) * self.dtype.itemsize
        try:
            size = path.stat().st_size
        except FileNotFoundError as e:
            raise StoreError("a chunk is missing", where=self._place(index), remedy=_VERIFY) from e
        except OSError as e:
            raise StoreError(f"a chunk cannot be opened: {e.strerror}", where=self._place(index), remedy=_VERIFY) from e
        if size != expected:
            raise StoreError("a chunk has the wrong size", where=self._place(index), expected=f"{expected:,} bytes")
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r", shape=shape))

    def _place(self, index: tuple[int, ...]) -> str:
        return self.files.place(self.path.joinpath("c", *map(str, index)))

    def _read_with_zarr(self, *lead: int) -> np.ndarray:
        import zarr

        if self.files.count_files(self.path) is None:
            raise StoreError("its codecs are not ours", where=self.path, remedy="copy the store to a disk to read it")
        try:
            return np.asarray(zarr.open_array(self.path, mode="r")[lead])
        except Exception as e:  # Codecs raise anything for bytes that they cannot decode.
            raise StoreError(f"zarr cannot read it: {e}", where=self.path, remedy=_VERIFY) from e

    def write_rows(self, values: np.ndarray, *lead: int, first: int) -> list[Path]:
        """Write rows [first, first + len(values)) of the axis behind the leading indices, in place.

        Returns the files and folders to be synced before anything may rely on the rows. Writers of different work items
        write disjoint ranges, and nothing reads a range before its commit.
        """
        values = np.ascontiguousarray(values, dtype=self.dtype)
        axis, trailing = len(lead), self.shape[len(lead) + 1 :]
        length, row_bytes = self.chunks[axis], self.dtype.itemsize * math.prod(trailing)
        done, written = 0, []
        while done < len(values):
            number, inside = divmod(first + done, length)
            part = values[done : done + length - inside]
            path = self.file(*lead, number, *(0 for _ in trailing))
            if not path.exists():
                written += [p for p in path.parents if p.is_relative_to(self.path)]
            with explain_full_disk(path):
                fd = open_sized(path, length * row_bytes)
                try:
                    pwrite_all(fd, memoryview(part.data).cast("B"), inside * row_bytes)
                finally:
                    os.close(fd)
            written.append(path)
            done += len(part)
        return written


class ArrayWriter:
    """Writes the arrays of a plan, and keeps the checksums of all rows. Without a batch, each new file is synced."""

    def __init__(self, paths: Paths, batch: WriteBatch | None = None) -> None:
        self.paths, self._write = paths, write_bytes if batch is None else batch.write
        self.sums: dict[str, list[RowSums]] = {}  # by array, as "minilm/token_id"

    def write_json(self, path: Path, value: dict[str, Any]) -> None:
        """Write a JSON file with its checksum."""
        self._write(path, with_checksum(value, path.name))

    def create(self, name: tuple[str, ...], meta: dict[str, Any], values: np.ndarray | None = None) -> None:
        """Write an array's `zarr.json` and, where `values` are given, every chunk of them."""
        path = self.paths.data.joinpath(*name)
        if values is not None:
            shape, chunks = tuple(meta["shape"]), tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
            values = np.asarray(values, _NUMPY[meta["data_type"]])
            if values.shape != shape:
                raise ValueError(f"values of shape {values.shape} for an array of {shape}")
            for index in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunks))):
                block = np.full(chunks, 0, dtype=values.dtype)
                part = values[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks))]
                block[tuple(slice(0, n) for n in part.shape)] = part
                self._write(path.joinpath("c", *map(str, index)), block.tobytes())
            self.sums["/".join(name)] = sum_rows(values, 0)
        self.write_json(path / "zarr.json", meta)

    def grow(self, name: tuple[str, ...], shape: dict[int, int], exactly: bool = False) -> None:
        """Give an array's axes (number → length) at least these lengths. Chunks without a file read as the fill."""
        path = self.paths.data.joinpath(*name, "zarr.json")
        meta = self.paths.files.read_json(path)
        longer = [shape.get(axis, n) if exactly else max(n, shape.get(axis, 0)) for axis, n in enumerate(meta["shape"])]
        if longer != meta["shape"]:
            meta["shape"] = longer
            self.write_json(path, meta)

    def append(self, name: tuple[str, ...], values: np.ndarray, first: int, last: bool = False) -> None:
        """Write rows [first, first + len(values)) of an array whose chunks hold whole rows, and sync them.

        With `last` the array ends there, whatever a planner that died has put behind.
        """
        if not len(values):
            return
        self.grow(name, {0: first + len(values)}, exactly=last)
        array = RawArray(self.paths, *name)
        sync(*array.write_rows(values, first=first))
        before = self.sums.get("/".join(name), []) if first else []
        self.sums["/".join(name)] = [*before, *sum_rows(np.asarray(values, array.dtype), first)]

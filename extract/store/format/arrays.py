"""The small arrays of a store (everything but `hidden`), read and written as raw chunk files.

Invariant: what is read here equals what zarr-python reads; an array whose codecs are not plain bytes (someone's
compressed copy) is handed to zarr. Run: `pytest tests/extract/store/test_layout.py`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import StoreError
from ..disk.durable import explain_full_disk, open_sized, pwrite_all, read_json, write_bytes, write_json
from ..remote.paths import local, mirror_of
from .block_sums import record_sums

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

# Arrays of ours: how many axes they have, and what their numbers may be
_KNOWN: dict[str, tuple[int, tuple[str, ...]]] = {
    "id_bytes": (1, ("uint8",)),
    "id_offset": (1, ("int64",)),
    "id_hash": (1, ("uint64",)),
    "id_row": (1, ("int32",)),
    "text_hash": (1, ("uint64",)),
    "session": (1, ("int32",)),
    "order": (1, ("int32",)),
    "source": (1, ("int32",)),
    "start": (1, ("int64",)),
    "length": (1, ("int32",)),
    "token_id": (1, ("int32",)),
    "span": (2, ("int32",)),
    "vocab_id": (1, ("int32",)),
    "vocab_piece": (1, ("uint8",)),
    "embedding": (2, ("float16",)),
    "hidden": (4, ("float16", "uint16", "float32", "int8")),
    "scale": (3, ("float16",)),
    "norm_mean": (3, ("float32",)),
    "norm_std": (3, ("float32",)),
    "input_hash": (2, ("uint64",)),
    "context_left": (2, ("int32",)),
    "context_right": (2, ("int32",)),
    "crc32c": (3, ("uint32",)),
}
_UNASKED = 1 << 30  # bytes that an array may have without anyone looking whether they can be
_VERIFY = "stillhouse inspect verify STORE"


class RawArray:
    """One Zarr array on disk: `shape`, `chunks`, `dtype`, and whole reads by leading index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.meta: dict[str, Any] = read_json(path / "zarr.json")
        except (FileNotFoundError, NotADirectoryError) as e:
            raise StoreError("an array is missing", where=path) from e
        try:
            self.shape = tuple(self.meta["shape"])
            self.chunks = tuple(self.meta["chunk_grid"]["configuration"]["chunk_shape"])
            self.dtype = np.dtype(_NUMPY[self.meta["data_type"]])
            self.plain = [c["name"] for c in self.meta["codecs"]] == ["bytes"]
            fill = self.meta["fill_value"]
            self.fill = np.nan if fill == "NaN" else fill
            if not self._sound():
                raise ValueError(f"{self.shape} in chunks of {self.chunks}")
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise StoreError(f"an array's metadata is damaged: {e!r:.80}", where=path / "zarr.json") from e

    def _sound(self) -> bool:
        """Whether shape, chunks, type and fill can be those of such an array."""
        rank, types = _KNOWN.get(self.path.name, (len(self.shape), (self.meta["data_type"],)))
        numbers = [*self.shape, *self.chunks]
        if not all(type(n) is int and 0 <= n < 1 << 53 for n in numbers) or self.meta["data_type"] not in types:
            return False
        if not len(self.shape) == len(self.chunks) == rank:
            return False
        if not all(c or not n for n, c in zip(self.shape, self.chunks)):
            return False
        if isinstance(self.fill, bool) or not isinstance(self.fill, int | float):
            return False
        with np.errstate(all="ignore"):
            np.full(1, self.fill, self.dtype)  # OverflowError, ValueError where it does not fit
        return isinstance(self.meta.get("attributes", {}), dict)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Of all chunks. Errors: StoreError where the metadata declare far more than the files can hold."""
        grid = [-(-n // c) if n else 0 for n, c in zip(self.shape, self.chunks)]
        self._refuse_boundless(self.shape, math.prod(grid))
        return itertools.product(*map(range, grid))

    def file(self, *index: int) -> Path:
        return local(self.path.joinpath("c", *map(str, index)))

    def files(self, *lead: int) -> list[Path]:
        """Where the chunks behind the leading indices lie or will; the last axis alone may have several."""
        return [self.path.joinpath("c", *map(str, (*lead, n))) for n in range(-(-self.shape[-1] // self.chunks[-1]))]

    def read(self, *lead: int) -> np.ndarray:
        """The array behind the leading indices, whole: a memory map where one chunk holds it, else a copy.

        Leading axes must have chunks of length 1. A chunk without a file reads as the fill value.
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
            if self.file(*lead, *index).is_file():
                part = self._map(chunks, *lead, *index)
                where = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunks, shape))
                out[where] = part[tuple(slice(0, s.stop - s.start) for s in where)]
        return out

    def _refuse_boundless(self, shape: tuple[int, ...], chunks: int, *lead: int) -> None:
        """Errors: StoreError where the metadata declare far more than the files can hold, before any memory is asked
        for. (What is not committed yet has no files, and its shape is small.)
        """
        if math.prod(shape) * self.dtype.itemsize <= _UNASKED and chunks <= _UNASKED // 64:
            return
        folder = self.path.joinpath("c", *map(str, lead))
        there = sum(1 for p in folder.rglob("*") if p.is_file()) if mirror_of(self.path) is None else chunks
        if chunks > 4 * there + 4:
            raise StoreError(
                f"its metadata declare {shape} numbers in {chunks:,} chunks, of which {there:,} are there",
                where=self.path / "zarr.json",
                remedy=_VERIFY,
            )

    def chunk(self, *index: int) -> np.ndarray:
        """One whole chunk, memory-mapped, as a plain array (slices of np.memmap cost a microsecond each)."""
        return self._map(self.chunks, *index)

    def _map(self, shape: tuple[int, ...], *index: int) -> np.ndarray:
        path = self.file(*index)
        expected = int(np.prod(shape)) * self.dtype.itemsize
        try:
            size = path.stat().st_size
        except FileNotFoundError as e:
            raise StoreError("a chunk is missing", where=path, remedy=_VERIFY) from e
        except OSError as e:
            raise StoreError(f"a chunk cannot be opened: {e.strerror}", where=path, remedy=_VERIFY) from e
        if size != expected:
            raise StoreError("a chunk has the wrong size", where=path, expected=f"{expected:,} bytes")
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r", shape=shape))

    def _read_with_zarr(self, *lead: int) -> np.ndarray:
        import zarr

        if mirror_of(self.path) is not None:
            raise StoreError("its codecs are not ours", where=self.path, remedy="copy the store to a disk to read it")
        try:
            return np.asarray(zarr.open_array(self.path, mode="r")[lead])
        except Exception as e:  # whatever a codec says of bytes that it cannot decode
            raise StoreError(f"zarr cannot read it: {e}", where=self.path, remedy=_VERIFY) from e

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
                written += [p for p in path.parents if p.is_relative_to(self.path)]
            with explain_full_disk(path):
                fd = open_sized(path, length * item)
                try:
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
        record_sums(path, np.asarray(values, dtype))
    write_json(path / "zarr.json", meta)

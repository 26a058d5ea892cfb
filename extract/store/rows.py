"""Rows of one teacher's arrays, and ranges of shard files straight into memory.

Invariant: a row's place is `start` alone: shard start // S, byte (start % S) · row size; nothing is decoded.
Run: `pytest tests/extract/test_reader.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from stillhouse.data.errors import StoreError

from .arrays import RawArray
from .layout import dtype_of
from .plan import Plan


class TeacherRows:
    """What `gather` needs of one teacher: start, length, token ids and spans, memory-mapped."""

    def __init__(self, plan: Plan, name: str) -> None:
        teacher, latest = plan.teachers[name], plan.latest(name)
        self.group = plan.paths.data / name
        self.width, self.dtype = teacher.width, dtype_of(teacher.dtype)
        self.row_bytes = self.width * self.dtype.bytes
        self.shard_rows, self.shards = latest.shard_rows, latest.shards
        self.start = RawArray(self.group / "start").read()
        self.length = RawArray(self.group / "length").read()
        self.token_id = RawArray(self.group / "token_id")
        self.span = RawArray(self.group / "span")
        self.present: dict[tuple[str, int], np.ndarray] = {}
        self._parts: dict[tuple[str, int], np.ndarray] = {}
        self._crc: dict[tuple[int, int], np.ndarray] = {}

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        return self.start[np.maximum(rows, 0)] // self.shard_rows

    def crc32c(self, context: int, layer: int) -> np.ndarray:
        if (context, layer) not in self._crc:
            self._crc[context, layer] = RawArray(self.group / "crc32c").read(context, layer)
        return self._crc[context, layer]

    def tokens(self, array: RawArray, rows: np.ndarray) -> np.ndarray:
        """[ΣN, …] of a token array, packed in the order of `rows`."""
        start, length = self.start[rows].tolist(), self.length[rows].tolist()
        out = np.empty((sum(length), *array.shape[1:]), dtype=array.dtype)
        at = 0
        for s, n in zip(start, length):
            number = s // self.shard_rows
            out[at : at + n] = self._part(array, number)[s - number * self.shard_rows :][:n]
            at += n
        return out

    def _part(self, array: RawArray, number: int) -> np.ndarray:
        key = (array.path.name, number)
        if key not in self._parts:
            if array.plain and array.chunks[0] == self.shard_rows:
                index = (number, *(0 for _ in array.shape[1:]))
                self._parts[key] = array._map(array.chunks, *index)
            else:
                self._parts[key] = array.read()[number * self.shard_rows : (number + 1) * self.shard_rows]
        return self._parts[key]


def read_runs(
    fd: int, path: Path, offsets: list[int], sizes: list[int], targets: list[int], buffer: memoryview
) -> None:
    """preadv each run of ranges that touch in the file, straight into their places in `buffer`."""
    i, n = 0, len(offsets)
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None and n > 1:
        for offset, size in zip(offsets, sizes):
            advise(fd, offset, size, os.POSIX_FADV_WILLNEED)
    while i < n:
        first, end = offsets[i], offsets[i] + sizes[i]
        parts = [buffer[targets[i] : targets[i] + sizes[i]]]
        i += 1
        while i < n and offsets[i] == end and len(parts) < 512:
            parts.append(buffer[targets[i] : targets[i] + sizes[i]])
            end += sizes[i]
            i += 1
        got = os.preadv(fd, parts, first)
        if got != end - first:
            _read_rest(fd, path, parts, first, got)


def _read_rest(fd: int, path: Path, parts: list[memoryview], first: int, got: int) -> None:
    """A signal or a huge run may cut a read short; an end of file may not."""
    at = first
    for part in parts:
        skip = max(0, min(len(part), first + got - at))
        while skip < len(part):
            more = os.preadv(fd, [part[skip:]], at + skip)
            if more == 0:
                raise StoreError("a committed shard file is too short", where=path)
            skip += more
        at += len(part)

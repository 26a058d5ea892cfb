"""Rows of one teacher's arrays, and ranges of shard files straight into memory.

Invariant: a row's place is `start` alone: shard start // S, byte (start % S) · row size; nothing is decoded.
Run: `pytest tests/extract/test_reader.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stillhouse.data.errors import StoreError

from .arrays import RawArray
from .handles import Handle
from .layout import dtype_of
from .plan import Plan

# A range of a shard file and where its parts go: (file offset, bytes, [(begin, end) in the output buffer, …]).
Run = tuple[int, int, list[tuple[int, int]]]
MOST_PARTS = 512  # of one preadv; IOV_MAX is 1,024


class Places:
    """Where a batch of utterances lies and where it goes, worked out once for all layers.

    start int64 [B] and length [B] are rows of a teacher's token axis; `into` int64 [B] rows of the packed output;
    `runs` lists each shard's ranges in the order of the file, those that touch joined.
    """

    def __init__(self, start: np.ndarray, length: np.ndarray, shard_rows: int, row_bytes: int) -> None:
        self.start, self.length = start, length.astype(np.int64)
        ends = np.cumsum(self.length)
        self.into = ends - self.length
        self.total = int(ends[-1]) if len(ends) else 0
        self.shard = start // shard_rows
        order = np.argsort(start, kind="stable")
        order = order[self.length[order] > 0]
        shards, starts = self.shard[order].tolist(), start[order].tolist()
        sizes = (self.length[order] * row_bytes).tolist()
        targets = (self.into[order] * row_bytes).tolist()
        self.runs: list[tuple[int, list[Run]]] = []
        last_shard, end = -1, -1
        for number, s, size, target in zip(shards, starts, sizes, targets):
            offset = (s - number * shard_rows) * row_bytes
            part = (target, target + size)
            if number != last_shard:
                self.runs.append((number, [(offset, size, [part])]))
            else:
                runs = self.runs[-1][1]
                if offset == end and len(runs[-1][2]) < MOST_PARTS:
                    first, before, parts = runs[-1]
                    parts.append(part)
                    runs[-1] = (first, before + size, parts)
                else:
                    runs.append((offset, size, [part]))
            last_shard, end = number, offset + size


class TeacherRows:
    """What `gather` needs of one teacher: start, length, token ids and spans, memory-mapped."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.record, latest = plan.teachers[name], plan.latest(name)
        self.paths, self.group = plan.paths, plan.paths.data / name
        self.width, self.dtype = self.record.width, dtype_of(self.record.dtype)
        self.row_bytes = self.width * self.dtype.bytes
        self.shard_rows, self.shards = latest.shard_rows, latest.shards
        self.start = RawArray(self.group / "start").read()
        self.length = RawArray(self.group / "length").read()
        self.token_id = RawArray(self.group / "token_id")
        self.span = RawArray(self.group / "span")
        self.present: dict[tuple[str, int], np.ndarray] = {}
        self._parts: dict[tuple[str, int], np.ndarray] = {}
        self._crc: dict[tuple[int, int], np.ndarray] = {}
        self._files: dict[tuple[int, int, int], Path] = {}

    def path(self, context: int, layer: int, shard: int) -> Path:
        key = (context, layer, shard)
        if key not in self._files:
            self._files[key] = self.paths.hidden(self.record.name, *key)
        return self._files[key]

    def crc32c(self, context: int, layer: int) -> np.ndarray:
        if (context, layer) not in self._crc:
            self._crc[context, layer] = RawArray(self.group / "crc32c").read(context, layer)
        return self._crc[context, layer]

    def tokens(self, array: RawArray, places: Places) -> np.ndarray:
        """[ΣN, …] of a token array, packed in the order of the batch."""
        out = np.empty((places.total, *array.shape[1:]), dtype=array.dtype)
        name, parts, rows = array.path.name, self._parts, self.shard_rows
        for s, n, at, number in zip(
            places.start.tolist(), places.length.tolist(), places.into.tolist(), places.shard.tolist()
        ):
            part = parts.get((name, number))
            if part is None:
                part = self._part(array, number)
            first = s - number * rows
            out[at : at + n] = part[first : first + n]
        return out

    def _part(self, array: RawArray, number: int) -> np.ndarray:
        """A token array's rows of one shard."""
        rows = self.shard_rows
        if array.plain and array.chunks[0] == rows:
            part = array.chunk(number, *(0 for _ in array.shape[1:]))
        else:
            part = array.read()[number * rows : (number + 1) * rows]
        self._parts[array.path.name, number] = part
        return part


_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
SAMPLED = 8
Job = tuple[Handle, memoryview, Run]  # a range of a file and the output buffer that it goes into


def fetch(jobs: list[Job]) -> None:
    """Bring ranges of files straight into their places.

    Where a few of them turn out to be in memory, the rest is copied out of the memory map (the kernel's own copy
    takes twice as long); otherwise what is not in memory is asked for all at once and then read.
    Errors: StoreError where a file ends too early.
    """
    if not jobs:
        return
    step = max(1, len(jobs) // SAMPLED)
    cold = _read_hot(jobs[::step])
    rest = (job for i, job in enumerate(jobs) if i % step)
    if cold:
        _read_cold(cold + _read_hot(rest))
        return
    for handle, buffer, (offset, _, parts) in rest:
        mapped = handle.map
        for a, b in parts:
            end = offset + b - a
            buffer[a:b] = mapped[offset:end]
            offset = end


def _read_hot(jobs: Iterable[Job]) -> list[Job]:
    """Read what is in memory already. Returns the ranges that would have to wait for a disk."""
    cold: list[Job] = []
    for job in jobs:
        handle, buffer, (offset, size, parts) = job
        try:
            got = os.preadv(handle.fd, [buffer[a:b] for a, b in parts], offset, _NOWAIT)
        except OSError:  # EAGAIN: not in memory; EOPNOTSUPP: a file system that cannot tell
            got = 0
        if got != size:
            cold.append(job)
    return cold


def _read_cold(jobs: list[Job]) -> None:
    """Ask the kernel for all ranges at once, then read them."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        for handle, _, (offset, size, _parts) in jobs:
            advise(handle.fd, offset, size, os.POSIX_FADV_WILLNEED)
    for handle, buffer, (offset, _, parts) in jobs:
        at = offset
        for a, b in parts:
            while a < b:
                got = os.preadv(handle.fd, [buffer[a:b]], at)
                if got == 0:
                    raise StoreError("a committed shard file is too short", where=handle.path)
                a, at = a + got, at + got

"""Rows of one teacher's arrays, and ranges of shard files straight into memory.

Invariant: a row's place is `start` alone: shard start // S, byte (start % S) · row size; nothing is decoded.
Run: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from ....data.errors import StoreError
from ..disk.layout import dtype_of
from ..format.arrays import RawArray
from ..format.int8 import SCALE_BYTES
from ..format.plan import Plan
from .handles import Handle, most_handles

# A range of a shard file and where its parts go: (file offset, bytes, [(begin, end) in the output buffer, …]).
Run = tuple[int, int, list[tuple[int, int]]]
MOST_PARTS = 512  # of one preadv; IOV_MAX is 1,024


class RowRanges:
    """Where a batch of utterances lies and where it goes, worked out once for all layers.

    start int64 [B] and length [B] are rows of a teacher's token axis; `into` int64 [B] rows of the packed output;
    `shard` int64 [B], and `inside` int64 [B] the first row in it.
    """

    def __init__(self, start: np.ndarray, length: np.ndarray, shard_rows: int) -> None:
        self.start, self.length = start, length.astype(np.int64)
        ends = np.cumsum(self.length)
        self.into = ends - self.length
        self.total = int(ends[-1]) if len(ends) else 0
        self.shard = start // shard_rows
        self.inside = start - self.shard * shard_rows
        self.shards = np.unique(self.shard[self.length > 0]).tolist()

    def copies(self, row_bytes: int) -> CopyPlan:
        """For every utterance: (shard, bytes [from, to) in its file, bytes [from, to) in the output), as lists."""
        source, target, size = self.inside * row_bytes, self.into * row_bytes, self.length * row_bytes
        return CopyPlan(
            self.shard.tolist(), source.tolist(), (source + size).tolist(), target.tolist(), (target + size).tolist()
        )

    def runs(self, row_bytes: int) -> list[tuple[int, list[Run]]]:
        """Each shard's ranges in the order of the file, those that touch joined."""
        order = np.argsort(self.start, kind="stable")
        order = order[self.length[order] > 0]
        out: list[tuple[int, list[Run]]] = []
        last_shard, end = -1, -1
        for number, offset, size, target in zip(
            self.shard[order].tolist(),
            (self.inside[order] * row_bytes).tolist(),
            (self.length[order] * row_bytes).tolist(),
            (self.into[order] * row_bytes).tolist(),
        ):
            part = (target, target + size)
            if number != last_shard:
                out.append((number, [(offset, size, [part])]))
            else:
                runs = out[-1][1]
                if offset == end and len(runs[-1][2]) < MOST_PARTS:
                    first, before, parts = runs[-1]
                    parts.append(part)
                    runs[-1] = (first, before + size, parts)
                else:
                    runs.append((offset, size, [part]))
            last_shard, end = number, offset + size
        return out


@dataclass(frozen=True)
class CopyPlan:
    """See `Places.copies`."""

    shard: list[int]
    source: list[int]
    source_end: list[int]
    target: list[int]
    target_end: list[int]

    def fill(self, out: memoryview, by_shard: dict[int, memoryview]) -> None:
        """Copy out of memory; utterances of shards that `by_shard` lacks are left alone."""
        if by_shard.keys() >= set(self.shard):  # nearly always; a lookup an utterance is a fifth of a short one's cost
            maps = map(by_shard.__getitem__, self.shard)
            for mapped, s, t, a, b in zip(maps, self.source, self.source_end, self.target, self.target_end):
                out[a:b] = mapped[s:t]
            return
        for number, s, t, a, b in zip(self.shard, self.source, self.source_end, self.target, self.target_end):
            if number in by_shard:
                out[a:b] = by_shard[number][s:t]

    def fill_and_sum(self, out: np.ndarray, by_shard: dict[int, memoryview]) -> list[int]:
        """The same into uint8 [bytes]; and every utterance's crc32c, taken while its bytes are in the processor's
        cache.
        """
        buffer, value = as_bytes(out), google_crc32c.value
        if out.size <= _SMALL:  # all of them are
            self.fill(buffer, by_shard)
            return [value(out[a:b]) for a, b in zip(self.target, self.target_end)]
        sums = []
        for number, s, t, a, b in zip(self.shard, self.source, self.source_end, self.target, self.target_end):
            if number in by_shard:
                buffer[a:b] = by_shard[number][s:t]
            sums.append(value(out[a:b]))
        return sums


_SMALL = 1 << 18  # bytes that stay in the cache until they are looked at again


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
        if len(self.start) != len(self.length) or self.span.shape != (self.token_id.shape[0], 2):
            raise damaged(self.group)
        self.present: dict[tuple[str, int], np.ndarray] = {}
        self._parts: dict[str, dict[int, memoryview]] = {}
        self._most_parts = most_handles() // 2
        self._arrays: dict[tuple[str, int, int], np.ndarray] = {}
        self._files: dict[tuple[str, int, int, int], Path] = {}

    def places(self, rows: np.ndarray | slice) -> RowRanges:
        """Errors: StoreError where start or length lead out of the store."""
        start, length = self.start[rows], self.length[rows]
        if len(start) and (start.min() < 0 or length.min() < 0 or (start + length).max() > self.token_id.shape[0]):
            raise damaged(self.group)
        return RowRanges(start, length, self.shard_rows)

    def shard_of(self, rows: np.ndarray | slice) -> np.ndarray:
        """int64: the shard that each row lies in. Errors: StoreError where `start` leads out of the store."""
        start = np.asarray(self.start[rows])
        if len(start) and not 0 <= int(start.min()) <= int(start.max()) <= len(self.shards) * self.shard_rows:
            raise damaged(self.group)
        return np.minimum(start // self.shard_rows, max(0, len(self.shards) - 1))

    def row_size(self, array: str) -> int:
        """Bytes of a row of `hidden` or `scale`."""
        return SCALE_BYTES if array == "scale" else self.row_bytes

    def path(self, array: str, context: int, layer: int, shard: int) -> Path:
        """The shard file of `hidden` or `scale`."""
        key = (array, context, layer, shard)
        if key not in self._files:
            where = self.paths.scale if array == "scale" else self.paths.hidden
            self._files[key] = where(self.record.name, context, layer, shard)
        return self._files[key]

    def of_layer(self, array: str, context: int, layer: int) -> np.ndarray:
        """`crc32c` [U], `norm_mean` or `norm_std` [D] of a view."""
        key = (array, context, layer)
        if key not in self._arrays:
            self._arrays[key] = RawArray(self.group / array).read(context, layer)
        return self._arrays[key]

    def tokens(self, array: RawArray, places: RowRanges) -> np.ndarray:
        """[ΣN, …] of a token array, packed in the order of the batch."""
        out = np.empty((places.total, *array.shape[1:]), dtype=array.dtype)
        parts = self._parts.setdefault(array.path.name, {})
        here = {}
        for number in places.shards:
            if number not in parts:
                if len(parts) >= self._most_parts:  # a map holds a file descriptor
                    parts.pop(next(iter(parts)))
                parts[number] = self._part(array, number)
            here[number] = parts[number]
        row_bytes = array.dtype.itemsize * (out.shape[1] if out.ndim == 2 else 1)
        places.copies(row_bytes).fill(as_bytes(out), here)
        return out

    def _part(self, array: RawArray, number: int) -> memoryview:
        """A token array's rows of one shard."""
        rows = self.shard_rows
        if array.plain and array.chunks[0] == rows:
            return as_bytes(array.chunk(number, *(0 for _ in array.shape[1:])))
        return as_bytes(np.ascontiguousarray(array.read()[number * rows : (number + 1) * rows]))


def damaged(group: Path) -> StoreError:
    remedy = "stillhouse inspect verify STORE; extract into a new store"
    return StoreError("start or length is damaged", where=group, remedy=remedy)


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array."""
    return memoryview(array.data).cast("B") if array.size else memoryview(bytearray())


_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
PROBED = 8


class ShardRead:
    """One array of one view on its way into `out`: open files of the shards that a batch needs, and where rows go."""

    def __init__(self, handles: dict[int, Handle], places: RowRanges, row_bytes: int, out: np.ndarray) -> None:
        self.handles, self.places, self.row_bytes = handles, places, row_bytes
        self.out, self.buffer = out, as_bytes(out)
        self.sums: list[int] | None = None  # crc32c of each utterance's rows, where `copy` took them

    def hot(self, probes: int = PROBED) -> bool:
        """Whether as much of it as a few probes can tell is in memory."""
        if any(handle.blocks is not None for handle in self.handles.values()):
            return False
        p = self.places
        held = np.flatnonzero(p.length > 0)
        for u in held[:: max(1, len(held) // probes)].tolist():
            handle = self.handles.get(int(p.shard[u]))
            if handle is None:
                continue
            try:
                os.preadv(handle.fd, [bytearray(1)], int(p.inside[u]) * self.row_bytes, _NOWAIT)
            except OSError:  # EAGAIN: not in memory; EOPNOTSUPP: a file system that cannot tell
                return False
        return True

    def copy(self, copies: CopyPlan, sums: bool = False) -> None:
        """Out of the memory maps: the kernel's own copy takes twice as long."""
        maps = {number: handle.map for number, handle in self.handles.items()}
        if sums:
            self.sums = copies.fill_and_sum(self.out.reshape(-1).view(np.uint8), maps)
        else:
            copies.fill(self.buffer, maps)

    def advise(self, runs: list[tuple[int, list[Run]]]) -> None:
        """Ask the kernel for all ranges at once, so that their waits overlap."""
        advise = getattr(os, "posix_fadvise", None)
        for number, ranges in runs:
            if number not in self.handles:
                continue
            blocks = self.handles[number].blocks
            if blocks is not None:
                blocks.ask((offset, size) for offset, size, _ in ranges)
            elif advise is not None:  # macOS has none
                for offset, size, _ in ranges:
                    advise(self.handles[number].fd, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, runs: list[tuple[int, list[Run]]]) -> None:
        """Errors: StoreError where a file ends too early."""
        for number, ranges in runs:
            if number in self.handles:
                for offset, size, parts in ranges:
                    _read(self.handles[number], self.buffer, offset, size, parts)


def read_all(readings: Sequence[ShardRead]) -> bool:
    """Begin to read several arrays that have the same places. True: they are in memory, `copy` them;
    False: the disk has been asked for all of them, `read` them.
    """
    if all(r.hot(max(1, PROBED // len(readings))) for r in readings):
        return True
    for r in readings:
        r.advise(r.places.runs(r.row_bytes))
    return False


def _read(handle: Handle, buffer: memoryview, offset: int, size: int, parts: list[tuple[int, int]]) -> None:
    if handle.blocks is not None:
        for a, b in parts:
            if handle.blocks.read(buffer[a:b], offset) < b - a:
                raise StoreError("a committed shard file is too short", where=handle.path)
            offset += b - a
        return
    if os.preadv(handle.fd, [buffer[a:b] for a, b in parts], offset) == size:
        return
    for a, b in parts:  # cut short; what came is read again
        while a < b:
            got = os.preadv(handle.fd, [buffer[a:b]], offset)
            if got == 0:
                raise StoreError("a committed shard file is too short", where=handle.path)
            a, offset = a + got, offset + got

"""Rows of one teacher's arrays, and ranges of shard files straight into memory.

Guarantees: `start` alone says where a row lies: shard start // S, byte (start % S) · row size. Nothing is decoded.
Try: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
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
MOST_PARTS = 512  # buffers of one preadv; IOV_MAX is 1,024
PROBED = 8
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_SMALL = 1 << 18  # bytes that stay in the processor's cache until they are read again


class RowRanges:
    """Where a batch of utterances lies and where it goes, computed once for all layers.

    `start` int64 [B] and `length` int64 [B] are rows of a teacher's token axis, `into` int64 [B] rows of the packed
    output. `shard` int64 [B] is each utterance's shard, and `inside` int64 [B] its first row in it.
    """

    def __init__(self, start: np.ndarray, length: np.ndarray, shard_rows: int) -> None:
        self.start, self.length = start, length.astype(np.int64)
        ends = np.cumsum(self.length)
        self.into = ends - self.length
        self.total = int(ends[-1]) if len(ends) else 0
        self.shard = start // shard_rows
        self.inside = start - self.shard * shard_rows
        # np.unique takes five times as long for a batch.
        self.shards = np.flatnonzero(np.bincount(self.shard[self.length > 0])).tolist()

    def copy_plan(self, row_bytes: int) -> CopyPlan:
        """Return, for every utterance, its shard, its bytes in that file, and its bytes in the output."""
        source, target, size = self.inside * row_bytes, self.into * row_bytes, self.length * row_bytes
        return CopyPlan(
            self.shard.tolist(), source.tolist(), (source + size).tolist(), target.tolist(), (target + size).tolist()
        )

    def runs(self, row_bytes: int) -> list[tuple[int, list[Run]]]:
        """Return each shard's ranges in the order of the file, with those that touch joined."""
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
    """The bytes [source, source_end) of shard files that go to [target, target_end) of the output, as lists."""

    shard: list[int]
    source: list[int]
    source_end: list[int]
    target: list[int]
    target_end: list[int]

    def fill(self, out: memoryview, by_shard: dict[int, memoryview]) -> None:
        """Copy out of memory. Utterances of shards that `by_shard` lacks are left alone."""
        for mapped, s, t, a, b in zip(
            map(by_shard.get, self.shard), self.source, self.source_end, self.target, self.target_end
        ):
            if mapped is not None:
                out[a:b] = mapped[s:t]

    def fill_and_sum(self, out: np.ndarray, by_shard: dict[int, memoryview]) -> list[int]:
        """Copy into uint8 [bytes] and return every utterance's crc32c, taken while its bytes are in the cache."""
        buffer, value = as_bytes(out), google_crc32c.value
        if out.size <= _SMALL:
            self.fill(buffer, by_shard)
            return [value(out[a:b]) for a, b in zip(self.target, self.target_end)]
        sums = []
        for mapped, s, t, a, b in zip(
            map(by_shard.get, self.shard), self.source, self.source_end, self.target, self.target_end
        ):
            if mapped is not None:
                buffer[a:b] = mapped[s:t]
            sums.append(value(out[a:b]))
        return sums


class TeacherRows:
    """What `gather` needs of one teacher: start, length, token ids and spans, memory-mapped. Frames have no tokens."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.record, latest = plan.teachers[name], plan.latest(name)
        self.paths = plan.paths
        self.width, self.dtype = self.record.width, dtype_of(self.record.dtype)
        self.row_bytes = self.dtype.row_bytes(self.width)
        self.shard_rows, self.shards = latest.shard_rows, latest.shards
        rows = [(s.first, s.last) for s in self.shards]
        self.start, self.length = (RawArray(self.paths, name, a).read(written=rows) for a in ("start", "length"))
        self.rows = len(self.shards) * self.shard_rows
        if len(self.start) != len(self.length):
            raise self.damaged()
        if not self.record.is_speech:
            self.token_id, self.span = (RawArray(self.paths, name, array) for array in ("token_id", "span"))
            self.rows = self.token_id.shape[0]
            if self.span.shape != (self.rows, 2):
                raise self.damaged()
        self._parts: dict[RawArray, dict[int, memoryview]] = defaultdict(dict)
        self._most_parts = most_handles() // 2
        self._arrays: dict[tuple[str, int, int], np.ndarray] = {}
        self._files: dict[tuple[str, int, int], dict[int, Path]] = {}

    def damaged(self) -> StoreError:
        """Return the error for `start` or `length` that lead out of the store."""
        remedy = "stillhouse inspect verify STORE; extract into a new store"
        return StoreError("start or length is damaged", where=self.paths.data / self.record.name, remedy=remedy)

    def ranges(self, rows: np.ndarray | slice) -> RowRanges:
        """Return where the tokens of rows lie. Raises StoreError where start or length lead out of the store."""
        start, length = self.start[rows], self.length[rows]
        # One look for what is negative in either. The functions of numpy's arrays take longer than their ufuncs.
        if len(start) and (np.minimum.reduce(start | length) < 0 or np.maximum.reduce(start + length) > self.rows):
            raise self.damaged()
        return RowRanges(start, length, self.shard_rows)

    def shard_of(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return the shard of each row, int64. Raises StoreError where `start` leads out of the store."""
        start = np.asarray(self.start[rows])
        if len(start) and not 0 <= int(start.min()) <= int(start.max()) <= len(self.shards) * self.shard_rows:
            raise self.damaged()
        return np.minimum(start // self.shard_rows, max(0, len(self.shards) - 1))

    def row_size(self, array: str) -> int:
        """Return the bytes of a row of `hidden`, `code` or `scale`."""
        return SCALE_BYTES if array == "scale" else self.row_bytes

    def shard_files(self, array: str, context: int, layer: int, shards: list[int]) -> list[Path]:
        """Return shard files of `hidden`, `code` or `scale`."""
        known = self._files.setdefault((array, context, layer), {})
        for shard in shards:
            if shard not in known:
                known[shard] = self.paths.shard_file(array, self.record.name, context, layer, shard)
        return [known[shard] for shard in shards]

    def of_layer(self, array: str, context: int, layer: int) -> np.ndarray:
        """Return `crc32c` [U], or the norms, of a view."""
        key = (array, context, layer)
        if key not in self._arrays:
            self._arrays[key] = RawArray(self.paths, self.record.name, array).read(context, layer)
        return self._arrays[key]

    def audio_source(self, rows: np.ndarray | slice) -> np.ndarray:
        """Return int64 [n, 4], the audio of rows of a speech teacher: see `extract.speech.sounds.Sounds`."""
        return RawArray(self.paths, self.record.name, "audio_source").read()[rows]

    def tokens(self, array: RawArray, ranges: RowRanges) -> np.ndarray:
        """Return [N, …] of a token array, packed in the order of the batch."""
        return self.open_tokens(array, ranges)()

    def open_tokens(self, array: RawArray, ranges: RowRanges) -> Callable[[], np.ndarray]:
        """Return what makes the array that `tokens` returns. Nothing is missing or of a wrong size then."""
        parts = self._parts[array]
        needed = {}
        for number in ranges.shards:
            part = parts.get(number)
            if part is None:
                if len(parts) >= self._most_parts:  # A map holds a file descriptor.
                    parts.pop(next(iter(parts)))
                part = parts[number] = self._part(array, number)
            needed[number] = part

        def packed() -> np.ndarray:
            out = np.empty((ranges.total, *array.shape[1:]), dtype=array.dtype)
            row_bytes = array.dtype.itemsize * (out.shape[1] if out.ndim == 2 else 1)
            ranges.copy_plan(row_bytes).fill(as_bytes(out), needed)
            return out

        return packed

    def _part(self, array: RawArray, number: int) -> memoryview:
        """Return a token array's rows of one shard."""
        rows = self.shard_rows
        if array.plain and array.chunks[0] == rows:
            return as_bytes(array.chunk(number, *(0 for _ in array.shape[1:])))
        return as_bytes(np.ascontiguousarray(array.read()[number * rows : (number + 1) * rows]))


def as_bytes(array: np.ndarray) -> memoryview:
    """Return the memory of a C-contiguous array."""
    return memoryview(array.data).cast("B") if array.size else memoryview(bytearray())


class ShardRead:
    """One array of one view that is being read into `out`: the open shard files, and where their rows go."""

    def __init__(self, handles: dict[int, Handle], ranges: RowRanges, row_bytes: int, out: np.ndarray) -> None:
        self.handles, self.ranges, self.row_bytes = handles, ranges, row_bytes
        self.out, self.buffer = out, as_bytes(out)
        self.sums: list[int] | None = None  # the crc32c of each utterance's rows, where `copy` took them

    def hot(self, probes: int = PROBED) -> bool:
        """Return whether the rows are in memory, as far as a few probes can tell."""
        if any([handle.blocks is not None for handle in self.handles.values()]):
            return False
        r, into = self.ranges, [bytearray(1)]
        present = np.flatnonzero(r.length)
        some = present[:: max(1, len(present) // probes)]
        try:
            for shard, offset in zip(r.shard[some].tolist(), (r.inside[some] * self.row_bytes).tolist()):
                if shard in self.handles:
                    os.preadv(self.handles[shard].fd, into, offset, _NOWAIT)
        except OSError:  # EAGAIN: it is not in memory. EOPNOTSUPP: this file system cannot tell.
            return False
        return True

    def copy(self, copies: CopyPlan, sums: bool = False) -> None:
        """Copy out of the memory maps, since the kernel's own copy takes twice as long."""
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
            elif advise is not None:  # macOS has none.
                for offset, size, _ in ranges:
                    advise(self.handles[number].fd, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, runs: list[tuple[int, list[Run]]]) -> None:
        """Read all ranges. Raises StoreError where a file ends too early."""
        for number, ranges in runs:
            if number in self.handles:
                for offset, size, parts in ranges:
                    _read(self.handles[number], self.buffer, offset, size, parts)

    def of_utterance(self, utterance: int) -> memoryview:
        """Return the output's bytes of one utterance."""
        begin, length = (int(a[utterance]) * self.row_bytes for a in (self.ranges.into, self.ranges.length))
        return self.buffer[begin : begin + length]

    def read_again(self, utterance: int, renew: bool) -> bool:
        """Read one utterance's rows of a remote file again, with `renew` from the object store and not from its cache.

        Returns False for a file that is on a disk.
        """
        r, size = self.ranges, self.row_bytes
        handle = self.handles.get(int(r.shard[utterance]))
        if handle is None or handle.blocks is None:
            return False
        offset, length, target = (int(a[utterance]) * size for a in (r.inside, r.length, r.into))
        if renew:
            handle.blocks.renew(offset, length)
        _read(handle, self.buffer, offset, length, [(target, target + length)])
        return True

    def place(self, utterance: int) -> str | None:
        """Return where an utterance's rows are in an object store; None: they are on a disk."""
        r = self.ranges
        handle = self.handles.get(int(r.shard[utterance]))
        if handle is None or handle.blocks is None:
            return None
        first, length = (int(a[utterance]) * self.row_bytes for a in (r.inside, r.length))
        return f"{handle.blocks.where} bytes {first}-{first + length - 1}"


def read_all(reads: Sequence[ShardRead]) -> bool:
    """Begin to read arrays of the same ranges. True: all are in memory, to `copy`. False: `read` them from the disk."""
    if all(r.hot(max(1, PROBED // len(reads))) for r in reads):
        return True
    for r in reads:
        r.advise(r.ranges.runs(r.row_bytes))
    return False


def _read(handle: Handle, buffer: memoryview, offset: int, size: int, parts: list[tuple[int, int]]) -> None:
    if handle.blocks is not None:
        for a, b in parts:
            if handle.blocks.read(buffer[a:b], offset) < b - a:
                raise StoreError("a committed shard file is too short", where=handle.blocks.where)
            offset += b - a
        return
    if os.preadv(handle.fd, [buffer[a:b] for a, b in parts], offset) == size:
        return
    for a, b in parts:  # The read was cut short, so all of it is read again.
        while a < b:
            got = os.preadv(handle.fd, [buffer[a:b]], offset)
            if got == 0:
                raise StoreError("a committed shard file is too short", where=handle.path)
            a, offset = a + got, offset + got

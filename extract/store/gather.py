"""Read states of utterances from shard files into packed matrices.

Shards are raw matrices, so one `preadv` for a run of rows goes straight into the output. A shard in another layout is
read through zarr.

Guarantees: what is read was committed, is complete, and equals what zarr-python reads at the same rows.
Try: `pytest tests/extract/store/test_reader.py tests/extract/store/test_int8.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from ...data.errors import StoreError, UsageError
from . import display
from .disk.layout import dtype_of, to_float32
from .disk.paths import Paths
from .format.int8 import dequantise
from .format.pq import decode_pq, decoding_table
from .read.buffers import BATCH_BUFFERS
from .read.handles import RENEWALS, Handle, Handles
from .read.rows import RowRanges, ShardRead, TeacherRows, read_all
from .views import View

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
VIEWS_AT_ONCE = 16  # so that no batch needs more descriptors than a process has


@dataclass(frozen=True)
class Gathered:
    """A batch out of a store. N is the number of tokens of the batch's utterances, or frames, for each teacher.

    lengths: {teacher: int32 [B]}; states: {view: [N, D]}; token_id: {teacher: int32 [N]};
    span: {teacher: int32 [N, 2]}, code points of the manifest's raw text. Views of one teacher share its tokens, which
    are copied out of the store's memory maps when they are first looked at.
    Speech teachers have no token_id and span: the middle of frame k is at offset_s + k / rate_hz seconds.
    """

    lengths: dict[str, np.ndarray]
    states: dict[View, np.ndarray]
    token_id: Mapping[str, np.ndarray]
    span: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        return display.gathered_text(self)

    def _repr_html_(self) -> str:
        return display.gathered_html(self)


class DamagedRowError(Exception):
    """A row's stored bytes differ from their checksum. `places`: the bytes in an object store that they came from."""

    def __init__(self, view: View, row: int, places: list[str]) -> None:
        super().__init__(f"{view.address} row {row}")
        self.view, self.row, self.places = view, row, places

    def named(self, utterance_id: str) -> StoreError:
        """Return the error for people."""
        again = f", and still are when they are fetched again: {', '.join(self.places)}" if self.places else ""
        where, remedy = f"{self.view} {utterance_id}", "stillhouse inspect verify STORE names all that is damaged"
        return StoreError(f"stored bytes are damaged{again}", where=where, remedy=remedy)


class StateReader:
    """Reads the states of one store. With `checksums`, it raises DamagedRowError where stored bytes are damaged."""

    def __init__(self, paths: Paths, checksums: bool, norms: Callable[[str, str, int], tuple[np.ndarray, ...]]) -> None:
        self.paths, self.checksums, self._norms = paths, checksums, norms
        self.handles = Handles(paths.files)
        self._decoders: dict[tuple[View, Any], Callable[[np.ndarray, np.ndarray | None, np.ndarray], None]] = {}

    def read(
        self,
        t: TeacherRows,
        views: Mapping[View, tuple[int, int]],
        rows: np.ndarray,
        ranges: RowRanges,
        dtype: str | None,
        allocate: Allocate,
    ) -> dict[View, np.ndarray]:
        """Return {view: [N, D]} of views of one teacher, given with their positions on the axes C and L.

        `dtype` is that of `Store.gather`, or "codes" for the codes of pq, uint8 [N, M].
        Their ranges are asked for together, so that waits for cold ones overlap.
        """
        if dtype == "codes" and not t.dtype.codes:
            what, expected = f"its states are stored in {t.dtype.logical}, without codes", "a view extracted as pq:M"
            raise UsageError(what, where=next(iter(views)).address, expected=expected)
        states: dict[View, np.ndarray] = {}
        items = list(views.items())
        for first in range(0, len(items), VIEWS_AT_ONCE):
            states |= self._read(t, items[first : first + VIEWS_AT_ONCE], rows, ranges, dtype, allocate)
        return states

    def stored(
        self, t: TeacherRows, view: View, axes: tuple[int, int], rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return states [N, D], for pq codes [N, M], as their bytes are on disk, and for int8 the scales float16 [N].

        Rows may be dead; their shards must be committed.
        """
        ranges = t.ranges(rows)
        out, scale, reads = self._buffers(t, axes, ranges, BATCH_BUFFERS.empty)
        self._fill([reads])
        if self.checksums:
            self._check(t, view, axes, rows, ranges, out, scale, reads)
        return out, scale

    def _read(
        self,
        t: TeacherRows,
        views: list[tuple[View, tuple[int, int]]],
        rows: np.ndarray,
        ranges: RowRanges,
        dtype: str | None,
        allocate: Allocate,
    ) -> dict[View, np.ndarray]:
        logical = dtype or ("float32" if t.dtype.quantised else t.dtype.logical)
        direct = logical in (t.dtype.logical, "codes")
        buffers = [self._buffers(t, axes, ranges, allocate if direct else BATCH_BUFFERS.empty) for _, axes in views]
        states: dict[View, np.ndarray] = {}

        def finish(number: int) -> None:
            """Check and convert a view while its bytes are in the processor's cache."""
            (view, axes), (stored, scale, reads) = views[number], buffers[number]
            if self.checksums:
                self._check(t, view, axes, rows, ranges, stored, scale, reads)
            if direct:
                states[view] = stored
                return
            out = allocate((ranges.total, t.width), np.dtype(dtype_of(logical).stored))
            if t.dtype.quantised:
                if ranges.total:  # Views without any states have no norms yet.
                    self._decoder(view, out.dtype)(stored, scale, out)
            else:
                np.copyto(out, to_float32(stored, t.dtype.logical), casting="same_kind")
            states[view] = out

        self._fill([reads for _, _, reads in buffers], finish)
        return states

    def _decoder(self, view: View, dtype: Any) -> Callable[[np.ndarray, np.ndarray | None, np.ndarray], None]:
        """Return what fills an array of this dtype from rows of a view as they are stored, and their scales."""
        if (view, dtype) not in self._decoders:
            norms = self._norms(view.teacher, view.context, view.layer)
            table = decoding_table(*norms, dtype=dtype) if len(norms) > 2 else None

            def fill(values: np.ndarray, scale: np.ndarray | None, out: np.ndarray) -> None:
                if table is not None:
                    decode_pq(values, table, out)
                elif scale is not None:
                    mean, std = norms
                    dequantise(values, scale, mean, std, out)

            self._decoders[view, dtype] = fill
        return self._decoders[view, dtype]

    def _buffers(
        self, t: TeacherRows, axes: tuple[int, int], ranges: RowRanges, allocate: Allocate
    ) -> tuple[np.ndarray, np.ndarray | None, list[ShardRead]]:
        """Return arrays for a view's states as stored and their scales (None: there are none), and what fills them."""
        out = allocate((ranges.total, t.dtype.columns(t.width)), np.dtype(t.dtype.stored))
        scale = np.empty(ranges.total, np.float16) if t.dtype.scaled else None
        reads = []
        for name, array in ((t.dtype.array, out), ("scale", scale)):
            if array is None:
                continue
            handles: dict[int, Handle] = {}
            for number, handle in zip(ranges.shards, self._handles(t, name, axes, ranges.shards)):
                if handle is None:
                    self._read_with_zarr(t, name, axes, ranges, number, array)
                else:
                    handles[number] = handle
            if handles:
                reads.append(ShardRead(handles, ranges, t.row_size(name), array))
        return out, scale, reads

    def _handles(self, t: TeacherRows, name: str, axes: tuple[int, int], shards: list[int]) -> list[Handle | None]:
        paths, size = t.shard_files(name, *axes, shards), t.row_size(name)
        opened = self.handles.opened(paths)
        if opened is None:
            opened = [self.handles.open(p, t.shard_rows, size, t.shards[n].rows) for n, p in zip(shards, paths)]
        return opened

    def _fill(self, views: list[list[ShardRead]], finish: Callable[[int], None] = lambda _: None) -> None:
        """Fill the arrays of several views, and call `finish` with the number of each."""
        every = [r for reads in views for r in reads]
        hot = read_all(every)
        sizes = {r.row_bytes for r in every}
        copies = {size: every[0].ranges.copy_plan(size) for size in sizes} if hot else {}
        runs = {} if hot else {size: every[0].ranges.runs(size) for size in sizes}
        for number, reads in enumerate(views):
            for r in reads:
                if hot:
                    r.copy(copies[r.row_bytes], self.checksums)
                else:
                    r.read(runs[r.row_bytes])
            finish(number)

    def _read_with_zarr(
        self, t: TeacherRows, name: str, axes: tuple[int, int], ranges: RowRanges, shard: int, out: np.ndarray
    ) -> None:
        import zarr

        path = self.paths.array(t.record.name, name)
        try:
            array = zarr.open_array(path, mode="r")
            for u in np.flatnonzero((ranges.shard == shard) & (ranges.length > 0)):
                s, n, at = int(ranges.start[u]), int(ranges.length[u]), int(ranges.into[u])
                out[at : at + n] = array[*axes, s : s + n]
        except Exception as e:  # Codecs raise anything for bytes that they cannot decode.
            remedy = "stillhouse inspect verify STORE"
            raise StoreError(f"zarr cannot read shard {shard}: {e}", where=path, remedy=remedy) from e

    def _check(
        self,
        t: TeacherRows,
        view: View,
        axes: tuple[int, int],
        rows: np.ndarray,
        ranges: RowRanges,
        states: np.ndarray,
        scale: np.ndarray | None,
        reads: list[ShardRead],
    ) -> None:
        stored = t.of_layer("crc32c", *axes)[rows].tolist()
        sums = next((r.sums for r in reads if r.out is states), None)
        if sums is None:
            sums = _checksums(states, ranges, t.row_bytes)
        if scale is not None:
            sums = _checksums(scale, ranges, t.row_size("scale"), sums)
        if sums != stored:
            for u, (n, actual, expected) in enumerate(zip(ranges.length.tolist(), sums, stored)):
                if n and actual != expected and not self._read_again(u, expected, scale, reads):
                    places = [place for r in reads if (place := r.place(u)) is not None]
                    raise DamagedRowError(view, int(rows[u]), places)

    def _read_again(self, u: int, expected: int, scale: np.ndarray | None, reads: list[ShardRead]) -> bool:
        """Read an utterance's rows again where they are copies on this disk. Return whether they are right then.

        The first time they are read from the cache, where an utterance before may have had the block fetched again.
        """
        for attempt in range(RENEWALS + 1):
            if not any([r.read_again(u, renew=attempt > 0) for r in reads]):
                return False
            parts = [r.of_utterance(u) for r in sorted(reads, key=lambda r: r.out is scale)]
            if google_crc32c.value(b"".join(parts)) == expected:
                return True
        return False


def _checksums(array: np.ndarray, ranges: RowRanges, row_bytes: int, before: list[int] | None = None) -> list[int]:
    """Return the crc32c of each utterance's rows; `before`: of the bytes that come before them."""
    data = array.reshape(-1).view(np.uint8)
    at = (ranges.into * row_bytes).tolist()
    end = ((ranges.into + ranges.length) * row_bytes).tolist()
    if before is None:
        return [google_crc32c.value(data[a:b]) for a, b in zip(at, end)]
    return [google_crc32c.extend(c, data[a:b]) for a, b, c in zip(at, end, before)]

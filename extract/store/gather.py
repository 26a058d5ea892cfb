"""The reading of states: which are there, which files they lie in, from there into packed matrices, checksums.

Invariant: what is gathered was committed, is complete, and equals what zarr-python reads at the same rows. Shards are
raw matrices, so one `preadv` a run of rows goes straight into the output; a shard in another layout is left to zarr.
Run: `pytest tests/extract/store/test_reader.py tests/extract/store/test_int8.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from ...data.errors import NoStoreError, StoreError, UsageError, first_few
from . import display as notebook
from .base import Opened
from .disk.layout import dtype_of, to_float32
from .format.int8 import dequantise
from .read.buffers import BATCH_BUFFERS
from .read.handles import Handle
from .read.rows import RowRanges, ShardRead, TeacherRows, read_all
from .views import View

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
_VIEWS_AT_ONCE = 16  # no batch may need more descriptors than a process has


@dataclass(frozen=True)
class Gathered:
    """A batch out of a store. N is the number of tokens of an utterance, ΣN of the batch, per teacher.

    lengths: {teacher: int32 [B]}; states: {view: [ΣN, D]}; token_id: {teacher: int32 [ΣN]};
    span: {teacher: int32 [ΣN, 2]}, code points of the manifest's raw text. Views of one teacher share its tokens.
    """

    lengths: dict[str, np.ndarray]
    states: dict[View, np.ndarray]
    token_id: dict[str, np.ndarray]
    span: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return notebook.gathered_text(self)

    def _repr_html_(self) -> str:
        return notebook.gathered_html(self)


class Gathering(Opened):
    """An open store of which states can be read."""

    def gather(
        self, ids: Sequence[str], views: Sequence[View], dtype: str | None = None, allocate: Allocate | None = None
    ) -> Gathered:
        """States, lengths, token ids and spans of utterances, packed in the order of `ids`.

        dtype     "float32" or "float16"; None: as stored (bfloat16 as uint16 bits; int8 as float32)
        allocate  (shape, numpy dtype) -> the array that a view's states go into, as in pinned memory; C-contiguous.
                  None: np.empty, in memory of earlier batches whose arrays are all gone (memory.py)
        Errors: NoStoreError for an unknown id or view, or naming utterances that are not committed; StoreError
        naming view and utterance where bytes are damaged.
        """
        if dtype not in (None, "float32", "float16"):
            raise UsageError(f"states as {dtype!r}", expected="float32, float16 or None")
        try:
            return self._gather(ids, views, dtype, allocate or BATCH_BUFFERS.empty)
        except StoreError as e:
            self._explain(e)
            raise

    def _gather(self, ids: Sequence[str], views: Sequence[View], dtype: str | None, allocate: Allocate) -> Gathered:
        by_edition: dict[int, np.ndarray] = {}
        lengths, token_id, span = {}, {}, {}
        states: dict[View, np.ndarray] = {}
        for name in dict.fromkeys(v.teacher for v in views):
            t, edition = self._rows_of(name), self.plan.edition(name)
            if edition not in by_edition:
                by_edition[edition] = self.rows(ids, name)
            rows = by_edition[edition]
            places = t.places(rows)
            lengths[name] = t.length[rows]
            token_id[name], span[name] = t.tokens(t.token_id, places), t.tokens(t.span, places)
            mine = [v for v in dict.fromkeys(views) if v.teacher == name]
            for first in range(0, len(mine), _VIEWS_AT_ONCE):
                states |= self._states(mine[first : first + _VIEWS_AT_ONCE], rows, t, places, dtype, allocate)
        return Gathered(lengths, states, token_id, span)

    def stored(self, ids: Sequence[str], view: View) -> tuple[np.ndarray, np.ndarray | None]:
        """States [ΣN, D] as their bytes are on disk, and of int8 the scales float16 [ΣN]. Errors: as `gather`."""
        rows = self.rows(ids, view.teacher)
        self._check_present(view, rows, self._rows_of(view.teacher).places(rows))
        return self.stored_rows(rows, view)

    def stored_rows(self, rows: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray | None]:
        """The same by row, also of rows that are dead: of shards that the caller knows to be committed."""
        t = self._rows_of(view.teacher)
        places = t.places(rows)
        out, scale, readings = self._buffers(view, t, places)
        self._fetch([readings])
        if self.checksums:
            self._check(view, rows, places, out, scale, readings)
        return out, scale

    def _states(
        self,
        views: list[View],
        rows: np.ndarray,
        t: TeacherRows,
        places: RowRanges,
        dtype: str | None,
        allocate: Allocate,
    ) -> dict[View, np.ndarray]:
        """{view: [ΣN, D]} of views of one teacher; their ranges are brought together, so that cold ones overlap."""
        logical = dtype or ("float32" if t.dtype.scaled else t.dtype.logical)
        direct = logical == t.dtype.logical
        for view in views:
            self._check_present(view, rows, places)
        buffers = [self._buffers(view, t, places, allocate if direct else BATCH_BUFFERS.empty) for view in views]
        states: dict[View, np.ndarray] = {}

        def arrived(number: int) -> None:
            """A view's bytes are best looked at while they are in the processor's cache."""
            view, (stored, scale, readings) = views[number], buffers[number]
            if self.checksums:
                self._check(view, rows, places, stored, scale, readings)
            if direct:
                states[view] = stored
                return
            out = allocate((places.total, t.width), np.dtype(dtype_of(logical).stored))
            if scale is not None:
                mean, std = (t.of_layer(name, *self._axes(view)) for name in ("norm_mean", "norm_std"))
                dequantise(stored, scale, mean, std, out)
            else:
                np.copyto(out, to_float32(stored, t.dtype.logical), casting="same_kind")
            states[view] = out

        self._fetch([readings for _, _, readings in buffers], arrived)
        return states

    def _check_present(self, view: View, rows: np.ndarray, places: RowRanges) -> None:
        present = self._present(view)
        if not present[places.shards].all():
            missing = [self.index.id(int(r)) for r, s in zip(rows, places.shard) if not present[s]]
            raise NoStoreError(
                f"not extracted yet: {first_few(missing)}", where=view.address, remedy="finish it: stillhouse extract"
            )

    def _buffers(
        self, view: View, t: TeacherRows, places: RowRanges, allocate: Allocate = BATCH_BUFFERS.empty
    ) -> tuple[np.ndarray, np.ndarray | None, list[ShardRead]]:
        """Arrays for a view's states as stored and their scales (None: there are none), and what will fill them."""
        axes = self._axes(view)
        out = allocate((places.total, t.width), np.dtype(t.dtype.stored))
        scale = np.empty(places.total, np.float16) if t.dtype.scaled else None
        readings = []
        for name, array in (("hidden", out), ("scale", scale)):
            if array is None:
                continue
            handles: dict[int, Handle] = {}
            for number in places.shards:
                path, used = t.path(name, *axes, number), t.shards[number].rows
                handle = self._handles.open(path, t.shard_rows, t.row_size(name), used)
                if handle is None:
                    self._read_with_zarr(name, view, places, number, array)
                else:
                    handles[number] = handle
            if handles:
                readings.append(ShardRead(handles, places, t.row_size(name), array))
        return out, scale, readings

    def _fetch(self, views: list[list[ShardRead]], arrived: Callable[[int], None] = lambda _: None) -> None:
        """Fill the arrays of several views; `arrived` is called with each one's number."""
        every = [r for readings in views for r in readings]
        hot = read_all(every)
        copies = {size: every[0].places.copies(size) for size in {r.row_bytes for r in every}} if hot else {}
        runs = {} if hot else {size: every[0].places.runs(size) for size in {r.row_bytes for r in every}}
        for number, readings in enumerate(views):
            for r in readings:
                if hot:
                    r.copy(copies[r.row_bytes], self.checksums)
                else:
                    r.read(runs[r.row_bytes])
            arrived(number)

    def _read_with_zarr(self, name: str, view: View, places: RowRanges, shard: int, out: np.ndarray) -> None:
        import zarr

        path, (c, layer) = self.paths.array(view.teacher, name), self._axes(view)
        try:
            array = zarr.open_array(path, mode="r")
            for u in np.flatnonzero((places.shard == shard) & (places.length > 0)):
                s, n, at = int(places.start[u]), int(places.length[u]), int(places.into[u])
                out[at : at + n] = array[c, layer, s : s + n]
        except Exception as e:  # whatever a codec says of bytes that it cannot decode
            raise StoreError(
                f"zarr cannot read shard {shard}: {e}", where=path, remedy="stillhouse inspect verify STORE"
            ) from e

    def _check(
        self,
        view: View,
        rows: np.ndarray,
        places: RowRanges,
        states: np.ndarray,
        scale: np.ndarray | None,
        readings: list[ShardRead],
    ) -> None:
        t = self._rows_of(view.teacher)
        stored = t.of_layer("crc32c", *self._axes(view))[rows].tolist()
        sums = next((r.sums for r in readings if r.out is states), None)
        if sums is None:
            sums = _checksums(states, places, t.row_bytes)
        if scale is not None:
            sums = _checksums(scale, places, t.row_size("scale"), sums)
        if sums != stored:
            for u, (n, got, want) in enumerate(zip(places.length.tolist(), sums, stored)):
                if n and got != want:
                    raise StoreError(
                        "stored bytes are damaged",
                        where=f"{view.address} {self.index.id(int(rows[u]))}",
                        remedy="stillhouse inspect verify STORE names all that is damaged",
                    )


def _checksums(array: np.ndarray, places: RowRanges, row_bytes: int, before: list[int] | None = None) -> list[int]:
    """crc32c of each utterance's rows, behind the bytes that `before` is of."""
    data = array.reshape(-1).view(np.uint8)
    at = (places.into * row_bytes).tolist()
    end = ((places.into + places.length) * row_bytes).tolist()
    if before is None:
        return [google_crc32c.value(data[a:b]) for a, b in zip(at, end)]
    return [google_crc32c.extend(c, data[a:b]) for a, b, c in zip(at, end, before)]

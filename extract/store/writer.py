"""Write one work item: shard files, their checksums, then the commit.

Guarantees: no reader sees a part of an item. Files are filled under tmp/, synced and renamed to their keys, folders are
synced, and only then the commit record is linked. Memory holds one block of states.
Try: `pytest tests/extract/pipeline/test_crash.py`.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ...data.errors import StoreError
from ...data.files.atomic import sync
from .disk.durable import allocate, explain_full_disk, pwrite_all
from .disk.layout import INNER_ROWS, Dtype, crc32c, dtype_of, footer, shard_bytes, to_float32
from .disk.paths import Paths
from .format.arrays import RawArray
from .format.commits import Commit, Commits, link_commit
from .format.int8 import SCALE_BYTES
from .format.plan import TeacherRecord, WorkItem
from .format.quantised import Quantised


@functools.cache
def versions() -> dict[str, str]:
    """Return the library versions that are recorded beside states. They are not part of a fingerprint."""
    return {name: version(name) for name in ("stillhouse", "torch", "transformers", "tokenizers", "numpy")}


def encode(states: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return float32 [N, D] as it is stored. bfloat16 rounds to nearest even, as torch does.

    int8 and pq have functions of their own: `quantise` and `encode_pq`.
    """
    if dtype.logical == "bfloat16":
        bits = np.ascontiguousarray(states, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(states), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):
        return states.astype(dtype.stored)


def is_finite(encoded: np.ndarray, dtype: Dtype) -> bool:
    """Return whether all values are finite: numpy's isfinite is ten times as slow on float16."""
    if dtype.bytes == 2:
        exponent = 0x7F80 if dtype.logical == "bfloat16" else 0x7C00
        return (encoded.view(np.uint16) & exponent).max(initial=0) != exponent
    return (encoded.view(np.uint32) & 0x7F800000).max(initial=0) != 0x7F800000


class ItemWriter:
    """Fills the shard files of a work item: `write` for every utterance and layer, then `commit`.

    `starts`, `lengths` and `ids` are the store's start, length and ids of the item's utterances.
    """

    def __init__(
        self,
        paths: Paths,
        scratch: Path,
        teacher: TeacherRecord,
        item: WorkItem,
        starts: np.ndarray,
        lengths: np.ndarray,
        ids: list[str],
    ) -> None:
        self.paths, self.scratch, self.teacher, self.item = paths, scratch, teacher, item
        self.dtype = dtype_of(teacher.dtype)
        self.row_bytes = self.dtype.row_bytes(teacher.width)
        self.ids, self.lengths = ids, lengths
        shard, rows = item.shard, item.generation.shard_rows
        self.starts = starts - shard.number * rows
        self.files: dict[int, Path] = {}
        self.scale_files: dict[int, Path] = {}
        self._fds: dict[int, int] = {}
        self.written = {layer: np.zeros(shard.rows, dtype=bool) for layer in item.layers}
        self.crc = {layer: np.zeros(len(lengths), dtype=np.uint32) for layer in item.layers}
        scaled = item.layers if self.dtype.scaled else ()
        self.scale = {
            layer: np.full(shard.rows + -shard.rows % INNER_ROWS, np.nan, dtype=np.float16) for layer in scaled
        }
        self.loss = {layer: np.zeros(4) for layer in (item.layers if self.dtype.quantised else ())}
        self._split: set[tuple[int, int]] = set()
        size = shard_bytes(shard.rows, rows, self.row_bytes)
        try:
            for layer in item.layers:
                path = scratch / f"{teacher.name}.{item.context.replace(':', '-')}.{layer}.{shard.number}"
                with explain_full_disk(path):
                    self._fds[layer] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                    allocate(self._fds[layer], size)
                self.files[layer] = path
        except BaseException:
            self.close()
            raise

    def write(
        self, layer: int, utterance: int, first_token: int, block: np.ndarray | Quantised, largest: float = math.nan
    ) -> None:
        """Write [n, D], as `encode`, `quantise` or `encode_pq` returns it, as tokens from `first_token` on.

        Arguments:
            utterance: its position in the work item.
            largest: the largest magnitude among the states that `block` was made from, for the error; NaN: not known.

        Raises:
            StoreError: a value is not finite.
        """
        quantised = block if isinstance(block, Quantised) else None
        if isinstance(block, Quantised):
            block = block.values
        if not (is_finite(block, self.dtype) if quantised is None else quantised.finite):
            raise self._not_finite(layer, utterance, block, largest)
        row = int(self.starts[utterance]) + first_token
        data = memoryview(block.data).cast("B")
        try:
            pwrite_all(self._fds[layer], data, row * self.row_bytes)
        except OSError:
            with explain_full_disk(self.files[layer]):
                raise
        self.written[layer][row : row + len(block)] = True
        if quantised is not None:
            if quantised.scale is not None:
                self.scale[layer][row : row + len(block)] = quantised.scale
            # A decoder's first state can be so long that it alone would decide the shares, and hide the others' error.
            apart = self.teacher.kind == "decoder" and first_token == 0
            self.loss[layer] += quantised.loss[int(apart) :].sum(0, dtype=np.float64)
        if len(block) == self.lengths[utterance]:
            self.crc[layer][utterance] = self._crc(layer, utterance, block)
        else:
            self._split.add((layer, utterance))

    def _not_finite(self, layer: int, utterance: int, block: np.ndarray, largest: float) -> StoreError:
        """The error for a value that cannot be stored: beyond the dtype, or not a number in the model already."""
        name, dtype = self.teacher.name, self.dtype.logical
        what = f"a value of {name}/{self.item.context}/{layer} is not finite in {dtype}"
        if not math.isfinite(largest) and (
            dtype not in ("float16", "int8") or np.isnan(to_float32(block, dtype)).any()
        ):
            what += ": the model itself yields it"
            remedy = "leave the utterance out of the manifest, or use another model"
            if self.teacher.model_dtype != "float32":
                remedy = "give --model-dtype float32"
        else:
            beyond = f" (the largest of its batch is {largest:,.0f})" if math.isfinite(largest) else ""
            what += beyond
            remedy = "give the same command with --dtype bfloat16"
            commits = (Commits(self.paths, name, context).of for context in self.teacher.contexts)
            if not self.paths.files.has_locks or any(shard != "norms" for of in commits for shard, _ in of):
                remedy += f" --name {name}-bfloat16, because the store has states of {name} in {dtype}"
        return StoreError(what, where=self.ids[utterance], remedy=remedy)

    def leave_out(self, utterances: np.ndarray) -> None:
        """Fill the rows of utterances that cannot be read any more. Their scales stay NaN."""
        for utterance in utterances.tolist():
            row, count = int(self.starts[utterance]), int(self.lengths[utterance])
            block = self.dtype.fill_rows(count, self.teacher.width)
            for layer in self.item.layers if count else ():
                pwrite_all(self._fds[layer], memoryview(block.data).cast("B"), row * self.row_bytes)
                self.written[layer][row : row + count] = True
                self.crc[layer][utterance] = self._crc(layer, utterance, block)

    def _crc(self, layer: int, utterance: int, data: np.ndarray | bytes) -> int:
        """Return the crc32c of an utterance's rows, followed by their int8 scales."""
        if not self.dtype.scaled:
            return crc32c(data)
        at = int(self.starts[utterance])
        return crc32c(self.scale[layer][at : at + int(self.lengths[utterance])], crc32c(data))

    def commit(
        self, input_hash: np.ndarray, context_left: np.ndarray, context_right: np.ndarray, generation: int
    ) -> bool:
        """Make the item exist and return True, or False where another writer's commit came first."""
        teacher, item = self.teacher, self.item
        shard, rows = item.shard, item.generation.shard_rows
        for layer in item.layers:
            if not self.written[layer].all():
                hole = int(np.argmin(self.written[layer]))
                raise StoreError(f"row {hole} was never written", where=f"{item} layer {layer}")
            self._finish_file(layer, shard.rows, rows)
            if self.dtype.scaled:
                self._write_scale(layer, rows)
        sync(*self.files.values(), *self.scale_files.values())
        changed: list[Path] = []
        c = teacher.contexts.index(item.context)
        for layer in item.layers:
            axes = teacher.name, c, teacher.layers.index(layer), shard.number
            moves = [(self.files[layer], self.paths.shard_file(self.dtype.array, *axes), 4)]
            if self.dtype.scaled:
                moves.append((self.scale_files[layer], self.paths.scale(*axes), 3))
            for source, target, folders in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                changed += target.parents[:folders]  # the folders of (shard,) layer and context, and c/
        sums = {str(k): crc32c(v.astype("<u4").tobytes()) for k, v in self.crc.items()}
        inputs = {"input_hash": input_hash, "context_left": context_left, "context_right": context_right}
        for name, values in inputs.items():
            array = RawArray(self.paths, teacher.name, name)
            changed += array.write_rows(values, c, first=shard.first)
            sums[name] = crc32c(np.asarray(values, array.dtype).tobytes())
        crc = RawArray(self.paths, teacher.name, "crc32c")
        for layer in item.layers:
            changed += crc.write_rows(self.crc[layer], c, teacher.layers.index(layer), first=shard.first)
        sync(*changed)
        record = Commit(
            teacher=teacher.name,
            context=item.context,
            shard=shard.number,
            generation=generation,
            layers=list(item.layers),
            utterances=[shard.first, shard.last],
            rows=[shard.number * rows, shard.number * rows + shard.rows],
            files={str(layer): shard_bytes(shard.rows, rows, self.row_bytes) for layer in item.layers},
            checksums=sums,
            writer={"host": socket.gethostname(), "pid": os.getpid(), "machine": platform.machine()},
            versions=versions(),
            losses={str(k): v.tolist() for k, v in self.loss.items()},
        )
        return link_commit(self.paths, self.scratch, record)

    def _finish_file(self, layer: int, used: int, rows: int) -> None:
        """Write the fill value up to the chunk's end, then the shard's index."""
        fd = self._fds[layer]
        for utterance in sorted(u for k, u in self._split if k == layer):
            size, at = int(self.lengths[utterance]) * self.row_bytes, int(self.starts[utterance]) * self.row_bytes
            self.crc[layer][utterance] = self._crc(layer, utterance, os.pread(fd, size, at))
        with explain_full_disk(self.files[layer]):
            tail = -used % INNER_ROWS
            if tail:
                fill = self.dtype.fill_rows(tail, self.teacher.width)
                pwrite_all(fd, memoryview(fill.data).cast("B"), used * self.row_bytes)
            end = (used + tail) * self.row_bytes
            pwrite_all(fd, memoryview(footer(used, rows, self.row_bytes)), end)
        os.close(self._fds.pop(layer))

    def _write_scale(self, layer: int, rows: int) -> None:
        """Write a layer's scales as the shard file that they become."""
        hidden = self.files[layer]
        path = self.scale_files[layer] = hidden.with_name(f"{hidden.name}.scale")
        with explain_full_disk(path), open(path, "wb") as f:
            f.write(self.scale[layer].data)
            f.write(footer(self.item.shard.rows, rows, SCALE_BYTES))

    def close(self) -> None:
        """Delete what has not been committed."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        for path in (*self.files.values(), *self.scale_files.values()):
            path.unlink(missing_ok=True)

    def __enter__(self) -> ItemWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

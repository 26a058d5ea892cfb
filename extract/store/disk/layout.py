"""Dtypes, hashes, shards and the Zarr v3 metadata of a store's arrays.

Guarantees: every array is uncompressed (only the bytes codec), so a chunk file is a raw little-endian matrix for
`pread`, and zarr-python, tensorstore and xarray open the same files. Shards of `hidden` end in the index of the
sharding codec: one (offset, length) for each chunk, then a crc32c. This module imports neither zarr nor torch.
Try: `pytest tests/extract/store/test_layout.py`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from ....data.errors import StoreError, UsageError

FORMAT = "stillhouse-store"
VERSION = 1
LATER_VERSION = 2  # of a store that has states of frames, or codes in their place, which earlier readers do not know
INNER_ROWS = 64  # rows of `hidden` a chunk inside a shard
MAX_SHARD_BYTES = 128 << 20
MIN_SHARD_ROWS = 2048
MISSING = 2**64 - 1  # offset and length of a chunk that a shard does not hold
_TYPES = ("int8", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32")
ZARR_DTYPES = {np.dtype(name).str[1:]: name for name in _TYPES}  # by numpy's short names, as in "f2"
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_WIDENED = 1 << 17  # numbers at a time: 512 KiB of float32 stay in the processor's cache


@dataclass(frozen=True)
class Dtype:
    """How the numbers of a view are stored: `logical` is what they mean, `stored` is what numpy and Zarr see."""

    logical: str
    stored: str
    zarr: str
    fill: Any
    codes: int = 0  # M of pq:M (see format/pq.py)

    @property
    def bytes(self) -> int:
        return np.dtype(self.stored).itemsize

    @property
    def array(self) -> str:
        """The array that has the rows."""
        return "code" if self.codes else "hidden"

    @property
    def norms(self) -> tuple[str, ...]:
        """The arrays that have what a view's states are standardised and decoded by."""
        return ("norm_mean", "norm_std", "codebook") if self.codes else ("norm_mean", "norm_std")

    @property
    def quantised(self) -> bool:
        """Whether the norms of a view must be there before its first state is written."""
        return self.scaled or self.codes > 0

    @property
    def scaled(self) -> bool:
        """Whether rows have scales (see format/int8.py)."""
        return self.logical == "int8"

    def columns(self, width: int) -> int:
        """Return the numbers that a row of states of this width has."""
        return self.codes or width

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of states of this width, without its scale."""
        return self.columns(width) * self.bytes

    def fill_rows(self, rows: int, width: int) -> np.ndarray:
        value = np.nan if self.fill == "NaN" else self.fill
        return np.full((rows, self.columns(width)), value, dtype=self.stored)

    def check_width(self, width: int) -> None:
        """Raise UsageError if pq cannot cut states of this width into M parts of equal length."""
        if self.codes and width % self.codes:
            parts = [m for m in range(1, min(width, MOST_CODES) + 1) if width % m == 0]
            raise UsageError(
                f"{self.logical} cannot cut states of width {width} into {self.codes} equal parts",
                expected=f"pq:M with M among {', '.join(map(str, parts))}",
            )


DTYPES = {
    "float16": Dtype("float16", "<f2", "float16", "NaN"),
    # zarr-python has no bfloat16: its bits as uint16, with `logical_dtype` among the attributes. 0x7FC0 is its NaN.
    "bfloat16": Dtype("bfloat16", "<u2", "uint16", 0x7FC0),
    "float32": Dtype("float32", "<f4", "float32", "NaN"),
    "int8": Dtype("int8", "|i1", "int8", 0),  # the scale of rows that hold nothing is NaN
}
MOST_CODES = 512  # of a row


@functools.cache
def dtype_of(name: str) -> Dtype:
    """Return a dtype by its name, of which pq:M are many. Raises UsageError for an unknown one."""
    if name in DTYPES:
        return DTYPES[name]
    kind, _, number = name.partition(":")
    if kind == "pq":
        codes = int(number) if re.fullmatch("[1-9][0-9]{0,3}", number) else 0
        if not 0 < codes <= MOST_CODES:
            what = f"{name!r} does not say how many codes a row has"
            raise UsageError(what, expected=f"pq:M with M from 1 to {MOST_CODES}, as in pq:32")
        return Dtype(name, "|u1", "uint8", 0, codes)
    raise UsageError(f"unknown store dtype {name!r}", expected=" or ".join([*DTYPES, "pq:M"]))


def to_float32(states: np.ndarray, logical: str) -> np.ndarray:
    """Return stored states, as `gather` returns them, as float32. bfloat16 alone comes as uint16 bits."""
    if logical == "bfloat16":
        return (states.astype(np.uint32) << 16).view(np.float32)
    if logical == "float16":
        return _widen(states)
    return states.astype(np.float32, copy=False)


def _widen(half: np.ndarray) -> np.ndarray:
    """Convert float16 to float32 through integers, five times as fast as numpy.

    Exponent and fraction are shifted into place, and a multiplication corrects the bias, exactly for subnormals, too.
    """
    half = np.ascontiguousarray(half)
    out = np.empty(half.shape, np.float32)
    source, target = half.reshape(-1), out.reshape(-1)
    for a in range(0, source.size, _WIDENED):
        part, whole = source[a : a + _WIDENED], target[a : a + _WIDENED]
        if (part.view(np.uint16) & 0x7C00).max() == 0x7C00:  # an infinity or a NaN
            whole[...] = part
            continue
        bits = whole.view(np.int32)
        bits[...] = part.view(np.int16)
        bits <<= 13
        bits &= -0x70002000  # the sign, spread by the cast, back to one bit
        whole *= np.float32(2.0**112)
    return out


def hash64(data: bytes) -> int:
    """Return the first 64 bits of BLAKE2b, little endian: the hash of ids, texts and inputs."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hash_id(utterance_id: str) -> int:
    return hash64(utterance_id.encode())


def hash_text(text: str) -> int:
    """Return the hash of a manifest's raw text, which `Store.text_hash` has."""
    return hash64(b"text\0" + text.encode())


def crc32c(data: np.ndarray | bytes, before: int | None = None) -> int:
    """Return the crc32c of bytes or of a contiguous array; `before`: the crc32c of the bytes before them."""
    return google_crc32c.value(data) if before is None else google_crc32c.extend(before, data)


def check_teacher_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name == "utterances":
        expected = "letters, digits, `_`, `-`, `.`, and not `utterances`"
        raise UsageError(f"{name!r} cannot name a teacher in a store", expected=expected)
    return name


def group_json(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def array_json(
    shape: tuple[int, ...],
    dtype: str,
    chunks: tuple[int, ...],
    dimensions: tuple[str, ...],
    *,
    fill: Any = 0,
    inner: tuple[int, ...] | None = None,
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the `zarr.json` of an uncompressed array. With `inner`, chunk files are shards of inner chunks.

    `dtype` is numpy's short name without the byte order, as in "f2".
    """
    codecs: list[dict[str, Any]] = [_BYTES]
    if inner is not None:
        index_codecs = [_BYTES, {"name": "crc32c"}]
        settings = {"chunk_shape": list(inner), "codecs": [_BYTES], "index_codecs": index_codecs}
        codecs = [{"name": "sharding_indexed", "configuration": {**settings, "index_location": "end"}}]
    elif dtype == "u1":
        codecs = [{"name": "bytes"}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": ZARR_DTYPES[dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "dimension_names": list(dimensions),
        "attributes": attributes or {},
        "storage_transformers": [],
    }


def hidden_json(
    contexts: int, layers: int, rows: int, width: int, shard_rows: int, dtype: Dtype, axis: str = "token"
) -> dict[str, Any]:
    """Return the metadata of `hidden` [C, L, N, D]: shards of (1, 1, S, D), chunks of (1, 1, 64, D), fill NaN.

    That of `code` [C, L, N, M] of a pq store is the same with M for D, and fill 0.
    """
    columns, last = dtype.columns(width), "part" if dtype.codes else "dimension"
    shape, dimensions = (contexts, layers, rows, columns), ("context", "layer", axis, last)
    chunks, inner = (1, 1, shard_rows, columns), (1, 1, INNER_ROWS, columns)
    stored, attributes = np.dtype(dtype.stored).str[1:], {"logical_dtype": dtype.logical}
    return array_json(shape, stored, chunks, dimensions, fill=dtype.fill, inner=inner, attributes=attributes)


def scale_json(contexts: int, layers: int, rows: int, shard_rows: int, axis: str = "token") -> dict[str, Any]:
    """Return the metadata of `scale` [C, L, N] of int8 stores, sharded as `hidden` is, fill NaN."""
    shape, dimensions = (contexts, layers, rows), ("context", "layer", axis)
    return array_json(shape, "f2", (1, 1, shard_rows), dimensions, fill="NaN", inner=(1, 1, INNER_ROWS))


def codebook_json(contexts: int, layers: int, width: int, codes: int) -> dict[str, Any]:
    """Return the metadata of `codebook` [C, L, M, 256, D/M] of pq stores, a chunk for each view, fill NaN."""
    book = (codes, 256, width // codes)
    dimensions = ("context", "layer", "part", "number", "within")
    return array_json((contexts, layers, *book), "f2", (1, 1, *book), dimensions, fill="NaN")


def shard_rows(total_rows: int, longest: int, width: int, dtype: Dtype, longest_id: str | None = None) -> int:
    """Return S: about a sixteenth of the rows, at least 2,048 and the longest utterance, at most 128 MiB."""

    def up(n: int) -> int:
        return max(1, math.ceil(n / INNER_ROWS)) * INNER_ROWS

    most = max(INNER_ROWS, MAX_SHARD_BYTES // dtype.row_bytes(width) // INNER_ROWS * INNER_ROWS)
    if up(longest) > most:
        what = f"an utterance with {longest} states does not fit into a shard of {most} rows"
        raise StoreError(what, where=longest_id, remedy="split the utterance in the manifest")
    return min(most, max(up(math.ceil(total_rows / 16)), MIN_SHARD_ROWS, up(longest)))


def footer(used_rows: int, total_rows: int, row_bytes: int) -> bytes:
    """Return the index at a shard's end: chunk i at i · 64 rows, chunks beyond `used_rows` missing; then a crc32c."""
    used, total = math.ceil(used_rows / INNER_ROWS), total_rows // INNER_ROWS
    index = np.full((total, 2), MISSING, dtype="<u8")
    index[:used, 0] = np.arange(used, dtype=np.uint64) * (INNER_ROWS * row_bytes)
    index[:used, 1] = INNER_ROWS * row_bytes
    data = index.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def footer_bytes(total_rows: int) -> int:
    return total_rows // INNER_ROWS * 16 + 4


def shard_bytes(used_rows: int, total_rows: int, row_bytes: int) -> int:
    """Return the size of a shard file as this package writes it."""
    return math.ceil(used_rows / INNER_ROWS) * INNER_ROWS * row_bytes + footer_bytes(total_rows)


def identity_rows(data: bytes, total_rows: int, row_bytes: int) -> int | None:
    """Return the rows of a shard with this footer; None: its chunks are not in order. Raises StoreError for damage."""
    body = data[:-4]
    # The checksum of no bytes at all would be right.
    if len(data) != footer_bytes(total_rows) or crc32c(body) != int.from_bytes(data[-4:], "little"):
        raise StoreError("the index at the end of a shard is damaged", remedy="stillhouse inspect verify STORE")
    index = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
    used = int(np.argmax(index[:, 0] == MISSING)) if (index[:, 0] == MISSING).any() else len(index)
    same = data == footer(used * INNER_ROWS, total_rows, row_bytes)
    return used * INNER_ROWS if same else None

"""Dtypes, hashes, shards and the Zarr v3 metadata of a store's arrays.

Guarantees: every array is uncompressed (only the bytes codec), so a chunk file is a raw little-endian matrix for
`pread`, and zarr-python, tensorstore and xarray open the same files. Shards of `hidden` end in the index of the
sharding codec: one (offset, length) for each chunk, then a crc32c. This module imports neither zarr nor torch.
Try: `pytest tests/extract/store/test_layout.py`.
"""

from __future__ import annotations

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
FRAME_VERSION = 2  # of a store that has a speech teacher, whose states are those of frames
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

    @property
    def bytes(self) -> int:
        return np.dtype(self.stored).itemsize

    @property
    def scaled(self) -> bool:
        """Whether rows need their scales and the view's norms (see format/int8.py)."""
        return self.logical == "int8"

    def fill_rows(self, rows: int, width: int) -> np.ndarray:
        value = np.nan if self.fill == "NaN" else self.fill
        return np.full((rows, width), value, dtype=self.stored)


DTYPES = {
    "float16": Dtype("float16", "<f2", "float16", "NaN"),
    # zarr-python has no bfloat16: its bits as uint16, with `logical_dtype` among the attributes. 0x7FC0 is its NaN.
    "bfloat16": Dtype("bfloat16", "<u2", "uint16", 0x7FC0),
    "float32": Dtype("float32", "<f4", "float32", "NaN"),
    "int8": Dtype("int8", "|i1", "int8", 0),  # the scale of rows that hold nothing is NaN
}


def dtype_of(name: str) -> Dtype:
    if name not in DTYPES:
        raise UsageError(f"unknown store dtype {name!r}", expected=" or ".join(DTYPES))
    return DTYPES[name]


def to_float32(states: np.ndarray, logical: str) -> np.ndarray:
    """Return stored states, as `gather` returns them, as float32. bfloat16 comes as uint16 bits, int8 as float32."""
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
    """Return the metadata of `hidden` [C, L, N, D]: shards of (1, 1, S, D), chunks of (1, 1, 64, D), fill NaN."""
    shape, dimensions = (contexts, layers, rows, width), ("context", "layer", axis, "dimension")
    chunks, inner = (1, 1, shard_rows, width), (1, 1, INNER_ROWS, width)
    stored, attributes = np.dtype(dtype.stored).str[1:], {"logical_dtype": dtype.logical}
    return array_json(shape, stored, chunks, dimensions, fill=dtype.fill, inner=inner, attributes=attributes)


def scale_json(contexts: int, layers: int, rows: int, shard_rows: int, axis: str = "token") -> dict[str, Any]:
    """Return the metadata of `scale` [C, L, N] of int8 stores, sharded as `hidden` is, fill NaN."""
    shape, dimensions = (contexts, layers, rows), ("context", "layer", axis)
    return array_json(shape, "f2", (1, 1, shard_rows), dimensions, fill="NaN", inner=(1, 1, INNER_ROWS))


def shard_rows(total_rows: int, longest: int, width: int, dtype: Dtype, longest_id: str | None = None) -> int:
    """Return S: about a sixteenth of the rows, at least 2,048 and the longest utterance, at most 128 MiB."""

    def up(n: int) -> int:
        return max(1, math.ceil(n / INNER_ROWS)) * INNER_ROWS

    most = max(INNER_ROWS, MAX_SHARD_BYTES // (width * dtype.bytes) // INNER_ROWS * INNER_ROWS)
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

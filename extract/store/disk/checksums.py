"""Checksums of JSON files, kept in the files themselves; and which single bit is wrong where a crc32c differs.

Invariant: a seal is the crc32c of the file as this package writes it with its seal as 0, so neither white space nor who
wrote it matters; files without one (written before there were seals) are not checked. What is put right has its
checksum again, or stays as it is. Run: `pytest tests/extract/store/test_damage.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .layout import crc32c

CHECKSUM_KEY = "crc32c"
_STATED = re.compile(rb'"crc32c": (\d+)')


def with_checksum(value: dict[str, Any], name: str) -> bytes:
    """The file `name` of a JSON object, its seal last; zarr.json has it among its attributes, where it may be."""
    value = without_checksum(value, name)
    if name == "zarr.json":
        bare = {**value, "attributes": {**value.get("attributes", {}), CHECKSUM_KEY: 0}}
        return _dumped({**bare, "attributes": {**bare["attributes"], CHECKSUM_KEY: crc32c(_dumped(bare))}})
    return _dumped({**value, CHECKSUM_KEY: crc32c(_dumped({**value, CHECKSUM_KEY: 0}))})


def _dumped(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def without_checksum(value: Any, name: str) -> Any:
    """The object without its seal."""
    if not isinstance(value, dict):
        return value
    if name == "zarr.json":
        attributes = value.get("attributes")
        if isinstance(attributes, dict) and CHECKSUM_KEY in attributes:
            return {**value, "attributes": {k: v for k, v in attributes.items() if k != CHECKSUM_KEY}}
        return value
    return {k: v for k, v in value.items() if k != CHECKSUM_KEY}


def checksum_error(value: Any, name: str) -> str | None:
    """What is wrong with a JSON file that could be read; None: nothing, or it has no seal."""
    holder = value
    for key in ("attributes", CHECKSUM_KEY) if name == "zarr.json" else (CHECKSUM_KEY,):
        if not isinstance(holder, dict):
            return "it is no JSON object"
        if key not in holder:
            almost = [k for k in holder if _one_bit_apart(k.encode(errors="replace"), key.encode())]
            return f"it has {almost[0]!r} in place of {key!r}" if almost else None
        holder = holder[key]
    try:
        whole = json.loads(with_checksum(value, name))
    except (TypeError, ValueError, RecursionError):
        return "it is no JSON of a store"
    right = (whole["attributes"] if name == "zarr.json" else whole)[CHECKSUM_KEY]
    return None if holder == right else "what it says differs from its checksum"


def has_checksum(value: Any, name: str) -> bool:
    """Whether a JSON file has a checksum at all."""
    return without_checksum(value, name) != value


def _one_bit_apart(a: bytes, b: bytes) -> bool:
    return len(a) == len(b) and (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count() == 1


# --- one bit ------------------------------------------------------------------------------------------------------

_POLYNOMIAL = 0x82F63B78


def _table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ _POLYNOMIAL * (n & 1)
        table.append(n)
    return table


_TABLE = _table()
_BY_TOP = {value >> 24: n for n, value in enumerate(_TABLE)}
_OF_BIT = {_TABLE[1 << bit]: bit for bit in range(8)}  # what a bit of the last byte changes in a crc32c


def flipped_bit(data: bytes, wanted: Any) -> tuple[int, int] | None:
    """(byte, bit) that alone makes the crc32c of `data` another one than wanted; None where no single bit does, or
    where what a record says is wanted is no checksum.

    The difference of the two is that of the bit, shifted through the bytes behind it: it is shifted back byte by byte.
    """
    if not isinstance(wanted, int) or not 0 <= wanted < 1 << 32:
        return None
    rest = crc32c(data) ^ wanted
    for at in range(len(data) - 1, -1, -1):
        bit = _OF_BIT.get(rest)
        if bit is not None:
            return at, bit
        n = _BY_TOP[rest >> 24]
        rest = (rest ^ _TABLE[n]) << 8 & 0xFFFFFFFF | n
    return None


def turned(data: bytes, at: int, bit: int) -> bytes:
    """The same bytes with one bit the other way round."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def mended(data: bytes, name: str) -> bytes | None:
    """A sealed JSON file in which a single bit is wrong, as it was; None where that is not what is wrong with it."""
    for candidate in _candidates(data):
        try:
            value = json.loads(candidate)
            if has_checksum(value, name) and checksum_error(value, name) is None:
                return candidate
        except (ValueError, RecursionError):
            continue
    return None


def _candidates(data: bytes) -> list[bytes]:
    """What the file may have been: a bit of what is sealed, then every bit of the seal itself."""
    found = []
    for stated in reversed(list(_STATED.finditer(data))):
        a, b = stated.span(1)
        if len(stated[1]) > 10:
            continue
        at = flipped_bit(data[:a] + b"0" + data[b:], int(stated[1]) & 0xFFFFFFFF)
        if at is not None:
            byte = at[0] if at[0] < a else at[0] + (b - a) - 1
            found.append(turned(data, byte, at[1]))
    word = b'"crc32c": '
    for begin in range(max(0, len(data) - 4096), len(data) - len(word)):
        here = data[begin : begin + len(word)]
        if here == word or _one_bit_apart(here, word):
            end = min(len(data), begin + len(word) + 12)
            found += [turned(data, at, bit) for at in range(begin, end) for bit in range(8)]
    return found

"""Checksums of JSON files, kept in the files themselves.

Guarantees: a file's checksum is the crc32c of the file as this package writes it with 0 in the checksum's place, so
white space does not matter. Files without one were written before there were checksums, and are not checked.
Try: `pytest tests/extract/store/test_damage.py`.
"""

from __future__ import annotations

import json
from typing import Any

from .layout import crc32c

CHECKSUM_KEY = "crc32c"


def with_checksum(value: dict[str, Any], name: str) -> bytes:
    """Return the file `name` of a JSON object with its checksum: last, or in a zarr.json among the attributes."""
    value = without_checksum(value, name)
    if name == "zarr.json":
        bare = {**value, "attributes": {**value.get("attributes", {}), CHECKSUM_KEY: 0}}
        return _dump({**bare, "attributes": {**bare["attributes"], CHECKSUM_KEY: crc32c(_dump(bare))}})
    return _dump({**value, CHECKSUM_KEY: crc32c(_dump({**value, CHECKSUM_KEY: 0}))})


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def without_checksum(value: Any, name: str) -> Any:
    """Return the object without its checksum."""
    if not isinstance(value, dict):
        return value
    if name == "zarr.json":
        return {k: without_checksum(v, "") if k == "attributes" else v for k, v in value.items()}
    return {k: v for k, v in value.items() if k != CHECKSUM_KEY}


def checksum_error(value: Any, name: str) -> str | None:
    """Return what is wrong with a JSON file that could be read, or None: nothing, or it has no checksum."""
    holder = value
    for key in ("attributes", CHECKSUM_KEY) if name == "zarr.json" else (CHECKSUM_KEY,):
        if not isinstance(holder, dict):
            return "it is no JSON object"
        if key not in holder:
            near = [k for k in holder if _differ_in_one_bit(k, key)]
            return f"it has {near[0]!r} in place of {key!r}" if near else None
        holder = holder[key]
    try:
        rewritten = json.loads(with_checksum(value, name))
    except (TypeError, ValueError, RecursionError):
        return "it is no JSON of a store"
    expected = (rewritten["attributes"] if name == "zarr.json" else rewritten)[CHECKSUM_KEY]
    return None if holder == expected else "its content differs from its checksum"


def has_checksum(value: Any, name: str) -> bool:
    """Return whether a JSON file has a checksum."""
    return without_checksum(value, name) != value


def _differ_in_one_bit(a: str, b: str) -> bool:
    """Whether a key may be another one with a bit turned over, which would hide the checksum."""
    x, y = a.encode(errors="replace"), b.encode()
    return len(x) == len(y) and (int.from_bytes(x, "big") ^ int.from_bytes(y, "big")).bit_count() == 1

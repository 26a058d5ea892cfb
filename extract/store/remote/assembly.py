"""Chunks of arrays that work items write parts of, put together from the parts beside their commit records.

Guarantees: a chunk has its name when it is whole.
Try: `pytest tests/extract/store/test_remote_writing.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .cache import cache_error


def apply_parts(target: Path, meta: dict[str, Any], axes: list[int], member: str, parts: list[Path]) -> None:
    """Write the rows of one chunk that the parts hold into its file, which is made where there is none.

    Arguments:
        meta: the array's zarr.json.
        axes: the index of the chunk.
        member: the array in the parts.
    """
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    length = meta["chunk_grid"]["configuration"]["chunk_shape"][-1]
    whole = np.fromfile(target, dtype) if target.exists() else np.zeros(length, dtype)
    begin = axes[-1] * length
    for part in parts:
        with np.load(part, allow_pickle=False) as saved:
            if member not in saved:
                continue
            first, values = int(saved["first"]), saved[member]
            a, b = max(begin, first), min(begin + length, first + len(values))
            if a < b:
                whole[a - begin : b - begin] = values[a - first : b - first]
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        whole.tofile(draft)
        os.replace(draft, target)
    except OSError as e:
        raise cache_error(e, target) from e

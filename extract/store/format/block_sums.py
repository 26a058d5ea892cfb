"""Checksums of what a plan writes: tokens, vocabulary and tables of utterances, in blocks of 64 rows, beside the plan.

Guarantees: plan/GEN/sums.json holds sums of what was written before store.json named the generation, never of what was
read back. So nothing that is damaged before a store grows counts as intact afterwards. Rows without a sum were written
before there were sums, or mean nothing.
Try: `pytest tests/extract/store/test_damage.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import StoreError
from ..disk.checksums import without_checksum
from ..disk.durable import write_json
from ..disk.json_records import matches_type
from ..disk.layout import crc32c
from ..disk.paths import Paths

BLOCK_ROWS = 64


@dataclass(frozen=True)
class RowSums:
    """Rows [first, last) of an array and the crc32c of each block of them, uint32."""

    first: int
    last: int
    crc: np.ndarray

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first row, end, crc32c) of each block."""
        for n, crc in enumerate(self.crc.tolist()):
            begin = self.first + n * BLOCK_ROWS
            yield begin, min(begin + BLOCK_ROWS, self.last), crc


Sums = dict[str, list[RowSums]]  # by array, as "minilm/token_id"


def sum_rows(values: np.ndarray, first: int) -> list[RowSums]:
    """Return the sums of rows [first, first + len(values)), as a list of one, or of none where there are no rows."""
    if not len(values):
        return []
    data = np.ascontiguousarray(values).tobytes()
    size = len(data) // len(values) * BLOCK_ROWS
    crc = [crc32c(data[a : a + size]) for a in range(0, len(data), size)]
    return [RowSums(first, first + len(values), np.array(crc, np.uint32))]


def write_sums(paths: Paths, number: int, sums: Sums) -> None:
    """Write plan/GEN/sums.json."""
    arrays = {
        name: [[s.first, s.last, s.crc.astype("<u4").tobytes().hex()] for s in parts]
        for name, parts in sorted(sums.items())
        if parts
    }
    write_json(paths.sums(number), {"block_rows": BLOCK_ROWS, "arrays": arrays})


def read_sums(paths: Paths, number: int) -> Sums:
    """Return the sums of a generation: none where it was written before there were any."""
    path = paths.sums(number)
    try:
        value = without_checksum(paths.files.read_json(path), path.name)
    except FileNotFoundError:
        return {}
    arrays = value.get("arrays") if isinstance(value, dict) and value.get("block_rows") == BLOCK_ROWS else None
    if not matches_type(arrays, dict[str, list[list[Any]]]):
        raise _damaged(paths.files.place(path))
    assert isinstance(arrays, dict)
    return {name: [_row_sums(path, part) for part in parts] for name, parts in arrays.items()}


def _row_sums(path: Path, part: list[Any]) -> RowSums:
    if len(part) != 3 or not matches_type(part[:2], list[int]) or not isinstance(part[2], str):
        raise _damaged(path)
    first, last, text = part
    try:
        crc = np.frombuffer(bytes.fromhex(text), "<u4")
    except ValueError:
        raise _damaged(path) from None
    if not 0 <= first < last or len(crc) != -(-(last - first) // BLOCK_ROWS):
        raise _damaged(path)
    return RowSums(first, last, crc)


def _damaged(path: str | Path) -> StoreError:
    return StoreError("the checksums of the plan are damaged", where=path, remedy="stillhouse inspect verify STORE")


def inherited_sums(paths: Paths, before: list[tuple[int, str]], teacher: str, edition: int, written: Sums) -> Sums:
    """Return the sums of a new generation of `teacher`, for which `written` has been written.

    `before` are the earlier generations, [(number, teacher), …], whose sums still hold for what the new one uses.
    """
    known: Sums = {}
    for number, whose in before:
        for name, parts in read_sums(paths, number).items():
            if name.startswith("utterances/") or whose == teacher:
                known[name] = parts
    for name, parts in written.items():
        if parts:
            known[name] = parts if parts[0].first == 0 else [*known.get(name, []), *parts]
    return {name: parts for name, parts in known.items() if _used(name, teacher, edition)}


def _used(name: str, teacher: str, edition: int) -> bool:
    """Whether an array is the generation's: its teacher's, the tables of utterances, and those of its edition."""
    parts = name.split("/")
    if parts[:2] == ["utterances", "editions"]:
        return parts[2] == str(edition)
    return parts[0] in ("utterances", teacher)

"""Checksums of what a plan writes: tokens, vocabulary and tables of utterances, in blocks of rows, with the plan.

Invariant: plan/GEN/sums.json speaks of rows that were written before store.json names the generation, by what was
written and never by what is read back; so nothing that rots before a store grows is taken for sound afterwards. Rows
that no sum speaks of were written before there were sums, or mean nothing.
Run: `pytest tests/extract/store/test_damage.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import StoreError
from ..disk.checksums import without_checksum
from ..disk.durable import read_json, write_json
from ..disk.json_records import matches_type
from ..disk.layout import Paths, crc32c

BLOCK_ROWS = 64


@dataclass(frozen=True)
class RowSums:
    """Rows [first, last) of an array and the crc32c of each block of them, uint32."""

    first: int
    last: int
    crc: np.ndarray

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(first row, end, crc32c) of each."""
        for n, crc in enumerate(self.crc.tolist()):
            begin = self.first + n * BLOCK_ROWS
            yield begin, min(begin + BLOCK_ROWS, self.last), crc


Sums = dict[str, list[RowSums]]  # by array, as "minilm/token_id"

_noting: ContextVar[dict[Path, list[RowSums]] | None] = ContextVar("_noting", default=None)


@contextmanager
def recording_sums() -> Iterator[dict[Path, list[RowSums]]]:
    """The sums of all that `note` is told in here, by the array's folder. Inside another, it is that one."""
    outer = _noting.get()
    if outer is not None:
        yield outer
        return
    found: dict[Path, list[RowSums]] = {}
    token = _noting.set(found)
    try:
        yield found
    finally:
        _noting.reset(token)


def record_sums(path: Path, values: np.ndarray, first: int = 0) -> None:
    """Rows [first, first + len(values)) of an array have been written; first 0: the array is a new one."""
    noting = _noting.get()
    if noting is None or not len(values):
        return
    data = np.ascontiguousarray(values).tobytes()
    size = len(data) // len(values) * BLOCK_ROWS
    crc = [crc32c(data[a : a + size]) for a in range(0, len(data), size)]
    before = noting.get(path, []) if first else []
    noting[path] = [*before, RowSums(first, first + len(values), np.array(crc, np.uint32))]


def write_sums(paths: Paths, number: int, sums: Sums) -> None:
    """Write plan/GEN/sums.json."""
    arrays = {
        name: [[s.first, s.last, s.crc.astype("<u4").tobytes().hex()] for s in parts]
        for name, parts in sorted(sums.items())
    }
    write_json(paths.sums(number), {"block_rows": BLOCK_ROWS, "arrays": arrays})


def read_sums(paths: Paths, number: int) -> Sums:
    """Those of a generation; none where it was written before there were any. Errors: StoreError where damaged."""
    path = paths.sums(number)
    try:
        value = without_checksum(read_json(path), path.name)
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict) or value.get("block_rows") != BLOCK_ROWS:
        raise _damaged(path)
    arrays = value.get("arrays")
    if not matches_type(arrays, dict[str, list[list[Any]]]):
        raise _damaged(path)
    assert isinstance(arrays, dict)
    return {name: [_summed(path, part) for part in parts] for name, parts in arrays.items()}


def _summed(path: Path, part: list[Any]) -> RowSums:
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


def _damaged(path: Path) -> StoreError:
    return StoreError("the checksums of the plan are damaged", where=path, remedy="stillhouse inspect verify STORE")


def inherited_sums(
    paths: Paths, before: list[tuple[int, str]], teacher: str, edition: int, made: dict[Path, list[RowSums]]
) -> Sums:
    """The sums of a new generation of `teacher`: what earlier ones, [(number, teacher), …], said of what it still
    uses, and what has been `made` since. `edition` is its table of utterances.
    """
    known: Sums = {}
    for number, whose in before:
        for name, parts in read_sums(paths, number).items():
            if name.startswith("utterances/") or whose == teacher:
                known[name] = parts
    for path, parts in made.items():
        name = path.relative_to(paths.data).as_posix()
        known[name] = parts if parts[0].first == 0 else [*known.get(name, []), *parts]
    return {name: parts for name, parts in known.items() if _used(name, teacher, edition)}


def _used(name: str, teacher: str, edition: int) -> bool:
    """Whether a generation speaks of an array: its teacher's, the tables of utterances, and those of its edition."""
    parts = name.split("/")
    if parts[:2] == ["utterances", "editions"]:
        return parts[2] == str(edition)
    return parts[0] in ("utterances", teacher)

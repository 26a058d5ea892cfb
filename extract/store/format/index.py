"""From utterance ids to rows of a store: sorted 64-bit hashes, memory-mapped, shared by all processes.

Invariant: a hash that matches proves nothing; the id's bytes are compared after it.
Run: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ....data.errors import StoreError
from ..disk.durable import read_json, write_json
from ..disk.layout import Paths, array_json, group_json, hash64, hash_id
from .arrays import RawArray, create_array
from .growing import append


def write_index(paths: Paths, ids: Sequence[str], text_hashes: np.ndarray, sessions: np.ndarray) -> None:
    """Write the group `utterances` for ids in the order of the store."""
    folder = paths.data / "utterances"
    encoded = [i.encode() for i in ids]
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(b) for b in encoded], out=offsets[1:])
    hashes = np.array([hash_id(i) for i in ids], dtype=np.uint64)
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    columns: dict[str, tuple[np.ndarray, str, tuple[str, ...]]] = {
        "id_bytes": (np.frombuffer(b"".join(encoded), dtype=np.uint8), "u1", ("byte",)),
        "id_offset": (offsets, "i8", ("boundary",)),
        "id_hash": (hashes[order], "u8", ("utterance",)),
        "id_row": (order, "i4", ("utterance",)),
        "text_hash": (text_hashes, "u8", ("utterance",)),
        "session": (sessions, "i4", ("utterance",)),
    }
    for name, (values, dtype, dimensions) in columns.items():
        create_array(folder / name, array_json(values.shape, dtype, values.shape, dimensions), values)
    write_json(folder / "zarr.json", group_json({"order": "of the plan: sessions permuted, utterances in order"}))


def write_edition(
    paths: Paths,
    number: int,
    first: int,
    ids: Sequence[str],
    text_hashes: np.ndarray,
    order: np.ndarray,
    session: np.ndarray,
    served: np.ndarray,
    source: np.ndarray,
) -> None:
    """Append rows [first, first + len(ids)): new utterances, later texts of known ones; and the table of the corpus.

    order int32 [n] are the corpus's rows in its order, session int32 [n] their sessions, served bool [n] which of them
    can be asked for (the others are context alone); source int32 [len(ids)] the row that each new one replaces, or -1.
    Nothing of it counts before a generation names the edition.
    """
    folder = paths.data / "utterances"
    encoded = [i.encode() for i in ids]
    begin = int(RawArray(folder / "id_offset").read()[first])
    offsets = begin + np.cumsum([len(b) for b in encoded], dtype=np.int64)
    append(folder / "id_offset", offsets, first + 1)
    append(folder / "id_bytes", np.frombuffer(b"".join(encoded), dtype=np.uint8), begin)
    append(folder / "text_hash", text_hashes, first)
    known, offset = RawArray(folder / "id_bytes").read(), RawArray(folder / "id_offset").read()
    rows = order[served]
    hashes = np.array([hash64(known[offset[r] : offset[r + 1]].tobytes()) for r in rows.tolist()], dtype=np.uint64)
    by_hash = np.argsort(hashes, kind="stable")
    table = folder / "editions" / str(number)
    columns = {"id_hash": (hashes[by_hash], "u8"), "id_row": (rows[by_hash].astype(np.int32), "i4")}
    columns |= {"order": (order.astype(np.int32), "i4"), "session": (session.astype(np.int32), "i4")}
    columns |= {"source": (source.astype(np.int32), "i4")}
    for name, (values, dtype) in columns.items():
        create_array(table / name, array_json(values.shape, dtype, (max(1, len(values)),), ("utterance",)), values)
    write_json(table / "zarr.json", group_json({"first": first, "rows": first + len(ids)}))
    write_json(folder / "editions" / "zarr.json", group_json({}))


def _bounds(table: Path) -> tuple[int, int]:
    """(first, rows) of an edition. Errors: StoreError where they are not there."""
    facts = read_json(table / "zarr.json")
    facts = facts.get("attributes") if isinstance(facts, dict) else None
    first, rows = (facts.get(key) if isinstance(facts, dict) else None for key in ("first", "rows"))
    if not isinstance(first, int) or not isinstance(rows, int) or not 0 <= first <= rows < 1 << 53:
        raise _damaged(table)
    return first, rows


def _damaged(table: Path) -> StoreError:
    return StoreError("the index of utterances is damaged", where=table, remedy="stillhouse inspect verify STORE")


KNOWN = 1 << 16  # ids that a process remembers


class Index:
    """Looks ids up. `rows(ids)` gives int64 [B], -1 where an id is unknown.

    A row is an utterance with one text, for ever. An edition says which rows are the corpus, in which order and
    sessions: `order` int64 [n], `session_of` int32 [n]. Its length is that of all rows, dead ones included.
    """

    def __init__(self, folder: Path, edition: int = 0) -> None:
        self.edition = edition
        self._known: dict[str, int] = {}  # a batch is looked up several times, and again in the next epoch
        table = self._table = folder / "editions" / str(edition) if edition else folder
        self.hash = RawArray(table / "id_hash").read()
        self.row = RawArray(table / "id_row").read()
        self.session_of = RawArray(table / "session").read()
        # Rows from `first` on came with this edition
        self.first, count = _bounds(table) if edition else (len(self.row), len(self.row))
        self._count = count
        self._order = RawArray(table / "order").read() if edition else None
        self.source = RawArray(table / "source").read() if edition else np.zeros(0, np.int32)
        # Rows that a later edition added, or would have if its planner had not died, are not ours
        self.bytes = RawArray(folder / "id_bytes").read()
        self.offset = RawArray(folder / "id_offset").read()[: count + 1]
        self.text_hash = RawArray(folder / "text_hash").read()[:count]
        whole = len(self.offset) == count + 1 and len(self.text_hash) == count and len(self.hash) == len(self.row)
        whole &= len(self.session_of) == len(self.row if self._order is None else self._order)
        whole &= bool((np.diff(self.offset) > 0).all())  # no id is empty; chunks that are missing read as zeros
        if not whole or (edition and len(self.source) > count - self.first) or int(self.offset[-1]) > len(self.bytes):
            raise _damaged(table)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def order(self) -> np.ndarray:
        return np.arange(len(self)) if self._order is None else self._order.astype(np.int64)

    @cached_property
    def live(self) -> np.ndarray:
        """bool [U]: rows that can be asked for."""
        found = np.zeros(len(self), dtype=bool)
        found[self._sound(self.row)] = True
        return found

    def _sound(self, rows: np.ndarray) -> np.ndarray:
        """Errors: StoreError where they are not rows of this index."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self._count:
            raise _damaged(self._table)
        return rows

    @cached_property
    def position(self) -> np.ndarray:
        """int64 [U]: where a row is in `order`, -1 where it is dead."""
        found = np.full(len(self), -1, dtype=np.int64)
        found[self._sound(self.order)] = np.arange(len(self.order))
        return found

    @cached_property
    def session(self) -> np.ndarray:
        """int32 [U]: by row, -1 where it is dead."""
        if not self.edition:
            return self.session_of
        found = np.full(len(self), -1, dtype=np.int32)
        found[self._sound(self.order)] = self.session_of
        return found

    def source_of(self, row: int) -> int:
        """The row that this one took the place of when its edition came, -1 where there is none."""
        return int(self.source[row - self.first]) if self.first <= row < self.first + len(self.source) else -1

    def id(self, row: int) -> str:
        return self._decoded([self.bytes[self.offset[row] : self.offset[row + 1]].tobytes()])[0]

    def _decoded(self, ids: list[bytes]) -> list[str]:
        try:
            return [i.decode() for i in ids]
        except UnicodeDecodeError:
            raise _damaged(self._table) from None

    def ids(self) -> list[str]:
        """Of all that can be asked for, in the order of the corpus."""
        whole, offset = self.bytes.tobytes(), self.offset.tolist()
        if not self.edition:
            return self._decoded([whole[a:b] for a, b in itertools.pairwise(offset)])
        order = self._sound(self.order)
        return self._decoded([whole[offset[r] : offset[r + 1]] for r in order[self.live[order]].tolist()])

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [B], -1 where an id is unknown."""
        known = self._known
        try:
            return np.array([known[i] for i in ids], dtype=np.int64)
        except KeyError:
            pass
        rows = self._rows(ids)
        if len(ids) <= KNOWN // 8:  # a batch, and no listing of the whole corpus
            if len(known) > KNOWN:
                known.clear()
            known.update(zip(ids, rows.tolist()))
        return rows

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        if not len(ids):
            return np.zeros(0, dtype=np.int64)
        encoded = [i.encode() for i in ids]
        if not len(self.hash):
            return np.full(len(ids), -1, dtype=np.int64)
        hashes = np.frombuffer(
            b"".join([blake2b(b, digest_size=8).digest() for b in encoded]), dtype="<u8"
        )  # = [hash_id(i) for i in ids]
        first = np.searchsorted(self.hash, hashes)
        candidate = self._sound(self.row[np.minimum(first, len(self.hash) - 1)]).astype(np.int64)
        begins, ends = self.offset[candidate].tolist(), self.offset[candidate + 1].tolist()
        everything = memoryview(self.bytes.data)
        same = [bytes(everything[a:z]) == b for a, z, b in zip(begins, ends, encoded)]
        if not all(same):
            for u in np.flatnonzero(~np.array(same)):
                candidate[u] = self._search(encoded[u], int(hashes[u]), int(first[u]))
        return candidate

    def _search(self, encoded: bytes, hashed: int, at: int) -> int:
        """Ids may share a hash: all that do are compared."""
        while at < len(self.hash) and self.hash[at] == hashed:
            row = int(self._sound(self.row[at : at + 1])[0])
            if self.bytes[self.offset[row] : self.offset[row + 1]].tobytes() == encoded:
                return row
            at += 1
        return -1

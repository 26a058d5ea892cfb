"""From utterance ids to rows of a store: sorted 64-bit hashes, memory-mapped, shared by all processes.

Guarantees: after a hash matches, the bytes of the id are compared.
Try: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ....data.errors import StoreError
from ..disk.layout import array_json, group_json, hash64, hash_id
from ..disk.paths import Paths
from .arrays import ArrayWriter, RawArray

REMEMBERED = 1 << 16  # ids that a process remembers


def write_index(writer: ArrayWriter, ids: Sequence[str], text_hashes: np.ndarray, sessions: np.ndarray) -> None:
    """Write the group `utterances` for ids in the order of the store."""
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
        writer.create(("utterances", name), array_json(values.shape, dtype, values.shape, dimensions), values)
    order_of_rows = group_json({"order": "of the plan: sessions permuted, utterances in order"})
    writer.write_json(writer.paths.data / "utterances" / "zarr.json", order_of_rows)


def write_edition(
    writer: ArrayWriter,
    number: int,
    first: int,
    ids: Sequence[str],
    text_hashes: np.ndarray,
    order: np.ndarray,
    session: np.ndarray,
    served: np.ndarray,
    source: np.ndarray,
) -> None:
    """Append rows for new utterances and later texts of known ones, and write the table of the corpus.

    Nothing of it counts before a generation names the edition. The new rows are [first, first + len(ids)).

    Arguments:
        order, session: int32 [n], the corpus's rows in its order, and their sessions.
        served: bool [n], which of them can be asked for; the others are context only.
        source: int32 [len(ids)], the row that each new one replaces, or -1.
    """
    paths = writer.paths
    encoded = [i.encode() for i in ids]
    begin = int(RawArray(paths, "utterances", "id_offset").read()[first])
    offsets = begin + np.cumsum([len(b) for b in encoded], dtype=np.int64)
    writer.append(("utterances", "id_offset"), offsets, first + 1)
    writer.append(("utterances", "id_bytes"), np.frombuffer(b"".join(encoded), dtype=np.uint8), begin)
    writer.append(("utterances", "text_hash"), text_hashes, first)
    known, offset = (RawArray(paths, "utterances", name).read() for name in ("id_bytes", "id_offset"))
    rows = order[served]
    hashes = np.array([hash64(known[offset[r] : offset[r + 1]].tobytes()) for r in rows.tolist()], dtype=np.uint64)
    by_hash = np.argsort(hashes, kind="stable")
    table = ("utterances", "editions", str(number))
    columns = {
        "id_hash": hashes[by_hash],
        "id_row": rows[by_hash],
        "order": order,
        "session": session,
        "source": source,
    }
    for name, values in columns.items():
        dtype = "u8" if name == "id_hash" else "i4"
        writer.create((*table, name), array_json(values.shape, dtype, (max(1, len(values)),), ("utterance",)), values)
    bounds = group_json({"first": first, "rows": first + len(ids)})
    writer.write_json(paths.data.joinpath(*table, "zarr.json"), bounds)
    writer.write_json(paths.data / "utterances" / "editions" / "zarr.json", group_json({}))


def _whole(paths: Paths, *name: str) -> np.ndarray:
    """Return an array that is written once, so that all its chunks have files."""
    array = RawArray(paths, *name)
    return array.read(written=[(0, array.shape[0])])


def _bounds(paths: Paths, table: Path) -> tuple[int, int]:
    """Return (first, rows) of an edition. Raises StoreError where they are damaged."""
    facts = paths.files.read_json(table / "zarr.json")
    facts = facts.get("attributes") if isinstance(facts, dict) else None
    first, rows = (facts.get(key) if isinstance(facts, dict) else None for key in ("first", "rows"))
    if not isinstance(first, int) or not isinstance(rows, int) or not 0 <= first <= rows < 1 << 53:
        raise _damaged(table)
    return first, rows


def _damaged(table: Path) -> StoreError:
    return StoreError("the index of utterances is damaged", where=table, remedy="stillhouse inspect verify STORE")


def same_text(indices: Sequence[Index], ids: Sequence[str]) -> np.ndarray:
    """Return which ids all tables of utterances have, with one text: bool [B].

    A refresh gives a changed utterance a new row, and each teacher is refreshed for itself: equal rows prove equal
    texts, but different rows do not prove different ones.
    """
    found = np.ones(len(ids), dtype=bool)
    texts: np.ndarray | None = None
    for index in {i.edition: i for i in indices}.values():
        rows = index.rows(ids)
        own = index.text_hash[np.maximum(rows, 0)] if len(index) else np.zeros(len(ids), np.uint64)
        texts = own if texts is None else texts
        found &= (rows >= 0) & (own == texts)
    return found


class Index:
    """Looks ids up: `rows(ids)` gives int64 [B], -1 where an id is unknown.

    A row is an utterance with one text, and never changes. An edition says which rows are the corpus, in which order
    and sessions: `order` int64 [n], `session_of` int32 [n]. The length counts all rows, dead ones included.
    """

    def __init__(self, paths: Paths, edition: int = 0) -> None:
        self.edition = edition
        self._known: dict[str, int] = {}  # A batch is looked up several times, and again in the next epoch.
        group = ("utterances", "editions", str(edition)) if edition else ("utterances",)
        table = self._table = paths.data.joinpath(*group)
        self.hash, self.row, self.session_of = (
            _whole(paths, *group, name) for name in ("id_hash", "id_row", "session")
        )
        # Rows from `first` on came with this edition.
        self.first, count = _bounds(paths, table) if edition else (len(self.row), len(self.row))
        self._count = count
        self._order = _whole(paths, *group, "order") if edition else None
        self.source = _whole(paths, *group, "source") if edition else np.zeros(0, np.int32)
        # Rows that a later edition added, or would have added if its planner had not died, do not count here.
        self.offset = RawArray(paths, "utterances", "id_offset").read(written=[(0, count + 1)])[: count + 1]
        last = int(self.offset[-1]) if len(self.offset) else 0
        self.bytes = RawArray(paths, "utterances", "id_bytes").read(written=[(0, last)])
        self.text_hash = RawArray(paths, "utterances", "text_hash").read(written=[(0, count)])[:count]
        whole = len(self.offset) == count + 1 and len(self.text_hash) == count and len(self.hash) == len(self.row)
        whole &= len(self.session_of) == len(self.row if self._order is None else self._order)
        whole &= bool((np.diff(self.offset) > 0).all())  # No id is empty. Missing chunks read as zeros.
        if not whole or (edition and len(self.source) > count - self.first) or int(self.offset[-1]) > len(self.bytes):
            raise _damaged(table)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [n]: the corpus's rows in its order."""
        return np.arange(len(self)) if self._order is None else self._order.astype(np.int64)

    @cached_property
    def live(self) -> np.ndarray:
        """bool [U]: rows that can be asked for."""
        found = np.zeros(len(self), dtype=bool)
        found[self._sound(self.row)] = True
        return found

    def _sound(self, rows: np.ndarray) -> np.ndarray:
        """Return `rows`. Raises StoreError where they are not rows of this index."""
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self._count:
            raise _damaged(self._table)
        return rows

    @cached_property
    def position(self) -> np.ndarray:
        """int64 [U]: the position of each row in `order`, -1 for a dead row."""
        found = np.full(len(self), -1, dtype=np.int64)
        found[self._sound(self.order)] = np.arange(len(self.order))
        return found

    @cached_property
    def session(self) -> np.ndarray:
        """int32 [U]: the session of each row, -1 for a dead row."""
        if not self.edition:
            return self.session_of
        found = np.full(len(self), -1, dtype=np.int32)
        found[self._sound(self.order)] = self.session_of
        return found

    def source_of(self, row: int) -> int:
        """Return the row that this one replaced when its edition came, -1 where there is none."""
        return int(self.source[row - self.first]) if self.first <= row < self.first + len(self.source) else -1

    def id(self, row: int) -> str:
        """Return the utterance id of a row."""
        return self._decoded([self.bytes[self.offset[row] : self.offset[row + 1]].tobytes()])[0]

    def _decoded(self, ids: list[bytes]) -> list[str]:
        try:
            return [i.decode() for i in ids]
        except UnicodeDecodeError:
            raise _damaged(self._table) from None

    def ids(self) -> list[str]:
        """Return the ids of all utterances that can be asked for, in the order of the corpus."""
        whole, offset = self.bytes.tobytes(), self.offset.tolist()
        if not self.edition:
            return self._decoded([whole[a:b] for a, b in itertools.pairwise(offset)])
        order = self._sound(self.order)
        return self._decoded([whole[offset[r] : offset[r + 1]] for r in order[self.live[order]].tolist()])

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Return the rows of ids, int64 [B], -1 where an id is unknown."""
        known = self._known
        try:
            return np.array(list(map(known.__getitem__, ids)), dtype=np.int64)
        except KeyError:
            pass
        rows = self._rows(ids)
        if len(ids) <= REMEMBERED // 8:  # a batch, and no listing of the whole corpus
            if len(known) > REMEMBERED:
                known.clear()
            known.update(zip(ids, rows.tolist()))
        return rows

    def _rows(self, ids: Sequence[str]) -> np.ndarray:
        if not len(ids) or not len(self.hash):
            return np.full(len(ids), -1, dtype=np.int64)
        encoded = [i.encode() for i in ids]
        # These are [hash_id(i) for i in ids].
        hashes = np.frombuffer(b"".join([blake2b(b, digest_size=8).digest() for b in encoded]), dtype="<u8")
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
        """Compare all ids that share a hash."""
        while at < len(self.hash) and self.hash[at] == hashed:
            row = int(self._sound(self.row[at : at + 1])[0])
            if self.bytes[self.offset[row] : self.offset[row + 1]].tobytes() == encoded:
                return row
            at += 1
        return -1

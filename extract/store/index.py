"""From utterance ids to rows of a store: sorted 64-bit hashes, memory-mapped, shared by all processes.

Invariant: a hash that matches proves nothing; the id's bytes are compared after it.
Run: `pytest tests/extract/test_reader.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .arrays import RawArray, create_array
from .layout import Paths, array_json, group_json, hash_id


def write_index(paths: Paths, ids: Sequence[str], text_hashes: np.ndarray, sessions: np.ndarray) -> None:
    """Write the group `utterances` for ids in the order of the store."""
    from .files import write_json

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


class Index:
    """Looks ids up. `rows(ids)` gives int64 [B], -1 where an id is unknown."""

    def __init__(self, folder: Path) -> None:
        self.bytes = RawArray(folder / "id_bytes").read()
        self.offset = RawArray(folder / "id_offset").read()
        self.hash = RawArray(folder / "id_hash").read()
        self.row = RawArray(folder / "id_row").read()
        self.text_hash = RawArray(folder / "text_hash").read()
        self.session = RawArray(folder / "session").read()

    def __len__(self) -> int:
        return len(self.row)

    def id(self, row: int) -> str:
        return self.bytes[self.offset[row] : self.offset[row + 1]].tobytes().decode()

    def ids(self) -> list[str]:
        whole, offset = self.bytes.tobytes(), self.offset.tolist()
        return [whole[a:b].decode() for a, b in itertools.pairwise(offset)]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        if not len(ids):
            return np.zeros(0, dtype=np.int64)
        encoded = [i.encode() for i in ids]
        hashes = np.frombuffer(
            b"".join([blake2b(b, digest_size=8).digest() for b in encoded]), dtype="<u8"
        )  # = [hash_id(i) for i in ids]
        first = np.searchsorted(self.hash, hashes)
        candidate = self.row[np.minimum(first, len(self.hash) - 1)].astype(np.int64)
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
            row = int(self.row[at])
            if self.bytes[self.offset[row] : self.offset[row + 1]].tobytes() == encoded:
                return row
            at += 1
        return -1

"""The token ids that a teacher's corpus has, with their input embeddings and spellings.

Guarantees: rows are in the order of the ids, however the store has grown.
Try: `pytest tests/extract/store/test_reader.py -k vocabulary`.
"""

from __future__ import annotations

import numpy as np

from ....data.errors import StoreError
from ..format.arrays import RawArray
from ..format.plan import Plan


class Vocabulary:
    """The vocabulary of one teacher in a store. Raises StoreError where it is damaged."""

    def __init__(self, plan: Plan, teacher: str) -> None:
        self._paths, self._teacher = plan.paths, teacher
        self._count = plan.latest(teacher).vocabulary
        ids = self._array("vocab_id")
        count = self._count or len(ids)
        self._order = np.argsort(ids[:count], kind="stable")
        if len(ids) < count or (np.diff(ids[self._order]) <= 0).any():
            raise self._damaged()
        # Where the corpus has never changed, the arrays are in order and may stay memory maps.
        self._in_order = not plan.latest(teacher).vocabulary and bool((self._order == np.arange(len(ids))).all())
        self.ids = ids if self._in_order else ids[self._order]

    def _array(self, name: str) -> np.ndarray:
        array = RawArray(self._paths, self._teacher, name)
        # What a planner that died has put behind the plan's vocabulary may lack files. Spellings are counted in bytes.
        return array.read(written=[(0, 0 if name == "vocab_piece" else self._count or array.shape[0])])

    def _damaged(self) -> StoreError:
        where = self._paths.data / self._teacher
        return StoreError("the vocabulary is damaged", where=where, remedy="extract into a new store")

    def embedding(self) -> np.ndarray:
        """Return the input embeddings, float16 [K, D]."""
        table = self._array("embedding")
        if len(table) < len(self._order):
            raise self._damaged()
        return table if self._in_order and len(table) == len(self.ids) else table[self._order]

    def rows(self, token_id: np.ndarray) -> np.ndarray:
        """Return the row of each token id, int64 [N]. Raises StoreError where an id is not in the vocabulary."""
        rows = np.minimum(np.searchsorted(self.ids, token_id), max(0, len(self.ids) - 1))
        if len(token_id) and (not len(self.ids) or (self.ids[rows] != token_id).any()):
            raise self._damaged()
        return rows

    def pieces(self) -> list[str]:
        """Return the tokenizer's spelling of each id."""
        pieces = bytes(self._array("vocab_piece")).decode(errors="replace").split("\n")
        if len(pieces) < len(self._order):
            raise self._damaged()
        return [pieces[i] for i in self._order.tolist()]

"""What the states of a view are standardised and decoded by: mean, deviation, and the codebooks of pq.

Guarantees: norms are read only where a commit says that they are there.
Try: `pytest tests/extract/store/test_reader.py -k norm`; `pytest tests/extract/store/test_pq.py`.
"""

from __future__ import annotations

import numpy as np

from ....data.errors import NoStoreError, StoreError, UsageError
from ..disk.layout import crc32c, dtype_of
from ..format.arrays import RawArray
from ..format.plan import Plan
from ..format.quantised import QuantisationError, sum_up
from .committed import CommittedWork


class StoredNorms:
    """The norms of a store's views, which are known to be views of it."""

    def __init__(self, plan: Plan, committed: CommittedWork) -> None:
        self._plan, self._committed = plan, committed

    def read(self, teacher: str, context: str, layer: int) -> tuple[np.ndarray, ...]:
        """Return mean and std float32 [D], and for pq codebooks float16 [M, 256, D/M], without a look at checksums.

        Raises NoStoreError if they are not committed.
        """
        record, paths = self._plan.teachers[teacher], self._plan.paths
        if not self._committed.records(teacher, context).has("norms", [layer]):
            raise NoStoreError(
                f"{teacher}/{context}/{layer} is not complete",
                where=paths.files.address,
                remedy="finish its extraction",
            )
        axes, whole = (record.contexts.index(context), record.layers.index(layer)), [(0, record.width)]
        arrays = (RawArray(paths, teacher, name) for name in dtype_of(record.dtype).norms)
        return tuple(array.read(*axes, written=whole) for array in arrays)

    def checked(self, teacher: str, context: str, layer: int) -> tuple[np.ndarray, ...]:
        """Return the same, or raise StoreError where they are not what was committed."""
        norms = self.read(teacher, context, layer)
        recorded = self._committed.records(teacher, context).of["norms", layer].checksums
        for name, values in zip(dtype_of(self._plan.teachers[teacher].dtype).norms, norms):
            if recorded.get(f"{name}.{layer}") not in (None, crc32c(np.ascontiguousarray(values).tobytes())):
                remedy = "stillhouse inspect verify STORE"
                what = f"stored bytes differ from their checksum: {name}"
                raise StoreError(what, where=f"{teacher}/{context}/{layer}", remedy=remedy)
        return norms

    def codebooks(self, teacher: str, context: str, layer: int) -> np.ndarray:
        """Return codebooks as float32. Raises UsageError for other dtypes than pq."""
        norms, dtype = self.checked(teacher, context, layer), self._plan.teachers[teacher].dtype
        if len(norms) < 3:
            what, expected = f"its states are stored in {dtype}, without codes", "a view extracted as pq:M"
            raise UsageError(what, where=f"{teacher}/{context}/{layer}", expected=expected)
        return norms[2].astype(np.float32)

    def loss(self, teacher: str, context: str, layer: int) -> QuantisationError | None:
        """Return how far the states of an int8 or pq view are from the model's, or None for other dtypes."""
        records = self._committed.records(teacher, context).of
        commits = {id(c): c for (_, k), c in records.items() if k == layer}
        key = str(layer)
        return sum_up([c.losses[key] for c in commits.values() if key in c.losses])

"""What writers have committed of a store: records, complete views, shards of each view.

Guarantees: a shard counts for a view when every generation that asks for it is committed.
Try: `stillhouse inspect ls STORE`.
"""

from __future__ import annotations

import numpy as np

from ..format.commits import Commits
from ..format.plan import Plan, WorkItem


class CommittedWork:
    """The commits of a plan as they are when they are first asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._records: dict[tuple[str, str], Commits] = {}
        self._shards: dict[tuple[str, str, int], np.ndarray] = {}

    def records(self, teacher: str, context: str) -> Commits:
        """Return the commit records of a teacher's context."""
        key = (teacher, context)
        if key not in self._records:
            self._records[key] = Commits(self._plan.paths, teacher, context)
        return self._records[key]

    def complete(self, teacher: str, context: str, layer: int) -> bool:
        """Return whether a view's work items are all committed and its norms are fixed."""
        records = self.records(teacher, context)
        return records.has("norms", [layer]) and all(
            records.has(i.shard.number, [layer], i.generation.number) for i in self._items(teacher, context, layer)
        )

    def shards(self, teacher: str, context: str, layer: int) -> np.ndarray:
        """Return whether each shard of a view is committed, bool [shards]."""
        key = (teacher, context, layer)
        if key not in self._shards:
            records = self.records(teacher, context)
            self._shards[key] = np.zeros(len(self._plan.latest(teacher).shards), dtype=bool)
            for item in self._items(teacher, context, layer):  # A later generation's item counts.
                done = records.has(item.shard.number, [layer], item.generation.number)
                self._shards[key][item.shard.number] = done
        return self._shards[key]

    def _items(self, teacher: str, context: str, layer: int) -> list[WorkItem]:
        return [i for i in self._plan.work_items(teacher) if i.context == context and layer in i.layers]

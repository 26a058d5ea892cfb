"""An open store: its plan, tables of utterances, commits and files, each read when it is first asked for.

Invariant: what is held here is what the store was when it was opened, until `refresh`; where reading fails because the
store is another by now, the error says so. Run: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ...data.errors import NoStoreError, StoreError, first_few
from .format import plan as plans
from .format.commits import Commits
from .format.index import Index
from .read.handles import Handles
from .read.rows import TeacherRows, damaged
from .remote.paths import address_of
from .views import View


class Opened:
    """What `Store` is made on: it knows where things are, and reads no states."""

    def __init__(self, path: str | Path, checksums: bool = False) -> None:
        self.path = Path(path)
        self.checksums = checksums
        self.plan = plans.read_plan(self.path)
        self.paths = self.plan.paths
        self._handles = Handles()
        self._commits: dict[tuple[str, str], Commits] = {}
        self._teachers: dict[str, TeacherRows] = {}
        self._indices: dict[int, Index] = {}

    @property
    def address(self) -> str:
        """The path or URL of this store, as one would type it."""
        return str(address_of(self.paths.root))

    def close(self) -> None:
        """Close this process's files; the store opens them again when it reads."""
        self._handles.close()

    def refresh(self) -> None:
        """See what writers have committed since this store was opened."""
        self.plan = plans.read_plan(self.path)
        self._commits.clear()
        self._teachers.clear()
        self._indices.clear()
        self.__dict__.pop("utterance_ids", None)

    def _explain(self, error: StoreError) -> None:
        """Errors: StoreError where what went wrong may be so because the store is no longer what was opened."""
        try:
            now = [g.number for g in plans.read_plan(self.path).generations]
        except StoreError:
            return
        if now != [g.number for g in self.plan.generations]:
            raise type(error)(
                f"{error.what}; and the store has changed since it was opened",
                where=error.where,
                remedy="open it again, or call its refresh()",
            ) from error

    @property
    def index(self) -> Index:
        """Utterances as the newest edition has them; a teacher may still be at an older one (`index_of`)."""
        return self._index(self.plan.edition())

    def index_of(self, teacher: str) -> Index:
        """The corpus as a teacher's states were made from it. Errors: NoStoreError for an unknown teacher."""
        self._known(teacher)
        return self._index(self.plan.edition(teacher))

    def _index(self, edition: int) -> Index:
        if edition not in self._indices:
            try:
                self._indices[edition] = Index(self.paths.data / "utterances", edition)
            except StoreError as e:
                self._explain(e)
                raise
        return self._indices[edition]

    @cached_property
    def utterance_ids(self) -> list[str]:
        """All ids, in the order of the store (sessions permuted, utterances of one session in order)."""
        return self.index.ids()

    def rows(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        """Rows of utterances, int64 [B]; those that `teacher` has, where teachers are at different editions.

        Errors: NoStoreError naming those that the store does not know.
        """
        rows = (self.index if teacher is None else self.index_of(teacher)).rows(ids)
        if (rows < 0).any():
            raise NoStoreError(
                f"not in this store: {first_few([i for i, r in zip(ids, rows) if r < 0])}",
                where=self.address,
                remedy="extract this corpus into it",
            )
        return rows

    def commits(self, teacher: str, context: str) -> Commits:
        key = (teacher, context)
        if key not in self._commits:
            self._commits[key] = Commits(self.paths, teacher, context)
        return self._commits[key]

    def _known(self, name: str) -> None:
        if name not in self.plan.teachers:
            raise NoStoreError(
                f"no teacher {name!r}", where=self.address, expected=" or ".join(self.plan.teachers) or "none"
            )

    def _rows_of(self, teacher: str) -> TeacherRows:
        if teacher not in self._teachers:
            self._known(teacher)
            found = TeacherRows(self.plan, teacher)
            if len(found.start) < max((s.last for s in found.shards), default=0):
                raise damaged(found.group)
            self._teachers[teacher] = found
        return self._teachers[teacher]

    def _axes(self, view: View) -> tuple[int, int]:
        """Positions of a view on the axes C and L."""
        t = self._rows_of(view.teacher).record
        if view.context not in t.contexts or view.layer not in t.layers:
            raise NoStoreError(f"no view {view}", where=self.address, remedy="stillhouse inspect ls STORE")
        return t.contexts.index(view.context), t.layers.index(view.layer)

    def _present(self, view: View) -> np.ndarray:
        """bool [shards]: committed or not."""
        self._axes(view)
        t, commits = self._rows_of(view.teacher), self.commits(view.teacher, view.context)
        key = (view.context, view.layer)
        if key not in t.present:
            need = {
                u.shard.number: u.generation.number
                for u in self.plan.work_items(view.teacher)
                if u.context == view.context and view.layer in u.layers
            }
            t.present[key] = np.array(
                [s in need and commits.has(s, [view.layer], need[s]) for s in range(len(t.shards))], dtype=bool
            )
        return t.present[key]

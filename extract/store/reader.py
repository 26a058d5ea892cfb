"""Reading a store: ids and views in, packed matrices out, at the speed of memory.

Invariant: nothing here writes. A Store holds no open file until it reads, may be forked, and pickles as its path. It
is made in layers: opened.py knows where things are, gathering.py reads states, and this asks the rest of a store.
Run: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import NoStoreError, StaleError, StoreError, first_few
from . import display as notebook
from .disk.layout import hash_text
from .format import plan as plans
from .format.arrays import RawArray
from .format.int8 import Int8Error, sum_up
from .gather import Gathering
from .views import View, matching


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher's settings (see store/plan.py) and how many tokens of the corpus it has."""

    settings: plans.TeacherRecord
    tokens: int
    shard_rows: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "settings":
            raise AttributeError(name)
        return getattr(self.settings, name)


class Store(Gathering):
    """A store opened for reading. Use `Store.open(path)`.

    With `checksums`, every utterance that `gather` reads is compared with its stored crc32c.
    """

    @classmethod
    def open(cls, path: str | Path, checksums: bool = False) -> Store:
        """Errors: NoStoreError where there is none, StoreError where it is of another version or damaged."""
        return cls(path, checksums)

    def __reduce__(self) -> tuple:
        return (Store, (self.path, self.checksums))

    def __repr__(self) -> str:
        return notebook.store_text(self)

    def _repr_html_(self) -> str:
        return notebook.store_html(self)

    # --- which views ---

    @property
    def planned_views(self) -> list[View]:
        """All views that some generation asks for, complete or not."""
        return sorted({View(u.teacher, u.context, layer) for u in self.plan.work_items() for layer in u.layers})

    @property
    def views(self) -> list[View]:
        """Views of which every unit of work is committed and whose norms are fixed."""
        return [v for v in self.planned_views if self._complete(v)]

    def _complete(self, view: View) -> bool:
        commits = self.commits(view.teacher, view.context)
        wanted = [u for u in self.plan.work_items(view.teacher) if u.context == view.context and view.layer in u.layers]
        return commits.has("norms", [view.layer]) and all(
            commits.has(u.shard.number, [view.layer], u.generation.number) for u in wanted
        )

    def resolve(self, patterns: str | Sequence[str], among: Sequence[View] | None = None) -> list[View]:
        """Views that match an address: globs for teacher and context, layers by number, `last`, negative or `*`,
        several with commas: "minilm/*/3,6". `among`: other views than the complete ones, as in `planned_views`.
        Errors: NoStoreError listing what there is.
        """
        if not isinstance(patterns, str):
            return list(dict.fromkeys(v for p in patterns for v in self.resolve(p, among)))
        have = self.views if among is None else among
        found = matching(patterns, have, self.plan)
        if not found:
            listed = ", ".join(v.address for v in have) or "none is complete"
            raise NoStoreError(f"no view matches {patterns!r}; there are: {listed}", where=self.address)
        return found

    def norm(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (≥ 1e-3) of each dimension, float32 [D], over the plan's sample."""
        c, layer = self._axes(view)
        if not self.commits(view.teacher, view.context).has("norms", [view.layer]):
            raise NoStoreError(f"{view} is not complete", where=self.address, remedy="finish its extraction")
        group = self.paths.data / view.teacher
        return RawArray(group / "norm_mean").read(c, layer), RawArray(group / "norm_std").read(c, layer)

    def loss(self, view: View) -> Int8Error | None:
        """What int8 has cost this view, over all tokens committed; None for other dtypes."""
        commits = {id(c): c for (_, k), c in self.commits(view.teacher, view.context).of.items() if k == view.layer}
        key = str(view.layer)
        return sum_up([c.losses[key] for c in commits.values() if key in c.losses])

    # --- teachers ---

    def teacher(self, name: str) -> TeacherInfo:
        """Errors: NoStoreError where the store has no teacher of that name."""
        self._known(name)
        latest = self.plan.latest(name)
        tokens = sum(s.rows for s in latest.shards)
        if latest.edition:  # not those of dead rows
            index, length = self._index(latest.edition), RawArray(self.paths.data / name / "length").read()
            tokens = int(length[index.row].sum())
        return TeacherInfo(self.plan.teachers[name], tokens, latest.shard_rows)

    def embedding(self, teacher: str) -> tuple[np.ndarray, np.ndarray]:
        """Input-embedding rows of the token ids that the corpus has: (vocab_id int32 [K] ascending, float16 [K, D])."""
        self._known(teacher)
        group = self.paths.data / teacher
        order = self._vocabulary(teacher)
        vocabulary, table = RawArray(group / "vocab_id").read(), RawArray(group / "embedding").read()
        if len(table) < len(order):
            raise self._no_vocabulary(teacher)
        sorted_already = len(order) == len(vocabulary) == len(table) and not self.plan.latest(teacher).vocabulary
        return (vocabulary, table) if sorted_already else (vocabulary[order], table[order])

    def _vocabulary(self, teacher: str) -> np.ndarray:
        """int64 [K]: the rows of the ids that the teacher's corpus has, by ascending id."""
        ids = RawArray(self.paths.data / teacher / "vocab_id").read()
        count = self.plan.latest(teacher).vocabulary or len(ids)
        order = np.argsort(ids[:count], kind="stable")
        if len(ids) < count or (np.diff(ids[order]) <= 0).any():
            raise self._no_vocabulary(teacher)
        return order

    def _no_vocabulary(self, teacher: str) -> StoreError:
        return StoreError(
            "the vocabulary is damaged", where=self.paths.data / teacher, remedy="extract into a new store"
        )

    def vocabulary_rows(self, teacher: str, token_id: np.ndarray) -> np.ndarray:
        """int64 [N]: the rows of `embedding(teacher)` and `pieces(teacher)` that token ids lead to.

        Errors: StoreError where an id is not there, or its teacher's tokens are damaged.
        """
        self._known(teacher)
        ids = RawArray(self.paths.data / teacher / "vocab_id").read()[self._vocabulary(teacher)]
        found = np.minimum(np.searchsorted(ids, token_id), max(0, len(ids) - 1))
        if len(token_id) and (not len(ids) or (ids[found] != token_id).any()):
            raise self._no_vocabulary(teacher)
        return found

    def pieces(self, teacher: str) -> list[str]:
        """The tokenizer's spelling of each id of `embedding(teacher)`, for people to read."""
        self._known(teacher)
        order = self._vocabulary(teacher)
        found = bytes(RawArray(self.paths.data / teacher / "vocab_piece").read()).decode(errors="replace").split("\n")
        if len(found) < len(order):
            raise self._no_vocabulary(teacher)
        return [found[i] for i in order.tolist()]

    # --- utterances ---

    def has(self, ids: Sequence[str], view: View) -> np.ndarray:
        """bool [B]: which utterances are committed in this view."""
        rows, t = self.index_of(view.teacher).rows(ids), self._rows_of(view.teacher)
        return (rows >= 0) & self._present(view)[t.shard_of(np.maximum(rows, 0))]

    def available(self, view: View) -> np.ndarray:
        """bool [U]: the same of every utterance, by row."""
        t, live = self._rows_of(view.teacher), self.index_of(view.teacher).live
        held = np.zeros(len(self.index), dtype=bool)
        held[: len(live)] = live & self._present(view)[t.shard_of(slice(len(live)))]
        return held

    def shards(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [B]: the shard of its first teacher that each utterance lies in, -1 where it is unknown. All teachers
        have the utterances in one order, so what is near for one is near for all.
        """
        teacher = self.plan.generations[0].teacher
        rows, t = self.index_of(teacher).rows(ids), self._rows_of(teacher)
        return np.where(rows < 0, -1, t.shard_of(np.maximum(rows, 0)))

    def text_hash(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        """uint64 [B]: hashes (`hash_text`) of the raw texts that were extracted (by `teacher`)."""
        index = self.index if teacher is None else self.index_of(teacher)
        return index.text_hash[self.rows(ids, teacher)]

    def check_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Errors: StaleError naming the utterances whose transcript has changed since they were extracted."""
        changed = [i for i, t, h in zip(ids, texts, self.text_hash(ids)) if hash_text(t) != int(h)]
        if changed:
            raise StaleError(
                f"the transcript has changed since extraction: {first_few(changed)}",
                where=self.address,
                remedy="extract the corpus again into a new store, or restore the text",
            )

    def lengths(self, teacher: str) -> np.ndarray:
        """Tokens of every utterance, by row: int32 [U], 0 for a row that is dead.

        Errors: NoStoreError for an unknown teacher.
        """
        length, live = np.asarray(self._rows_of(teacher).length), self.index_of(teacher).live
        if live.all() and len(live) == len(length) == len(self.index):
            return length
        out = np.zeros(len(self.index), dtype=length.dtype)
        out[: len(live)] = np.where(live, length[: len(live)], 0)
        return out

    def tokens(self, ids: Sequence[str], teacher: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the plan knows before any state exists: lengths int32 [B], token ids int32 [ΣN], spans int32 [ΣN, 2].

        Errors: NoStoreError for an unknown id or teacher.
        """
        return self.tokens_of_rows(self.rows(ids, teacher), teacher)

    def tokens_of_rows(self, rows: np.ndarray, teacher: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same by row, also of rows that are dead."""
        t = self._rows_of(teacher)
        places = t.places(rows)
        return t.length[rows], t.tokens(t.token_id, places), t.tokens(t.span, places)

    def row_length(self, teacher: str, row: int) -> int:
        """Tokens of a row, dead or not."""
        return int(self._rows_of(teacher).length[row])

    def shard_of(self, teacher: str, row: int) -> int:
        """The number of the shard that a row of this teacher lies in."""
        t = self._rows_of(teacher)
        return int(t.start[row]) // t.shard_rows

    # --- what the teacher was fed ---

    def context_seen(self, ids: Sequence[str], view: View) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of context that each utterance's pass saw on its left and right: int32 [B], int32 [B]."""
        rows, (c, _) = self.rows(ids, view.teacher), self._axes(view)
        group = self.paths.data / view.teacher
        return RawArray(group / "context_left").read(c)[rows], RawArray(group / "context_right").read(c)[rows]

    def input_hash(self, ids: Sequence[str], view: View) -> np.ndarray:
        """uint64 [B]: of the exact ids and mask that the model was fed for each utterance."""
        return RawArray(self.paths.data / view.teacher / "input_hash").read(self._axes(view)[0])[
            self.rows(ids, view.teacher)
        ]

    def input_hashes(self, view: View) -> np.ndarray:
        """uint64 [U]: the same of every row, whatever is committed."""
        return RawArray(self.paths.data / view.teacher / "input_hash").read(self._axes(view)[0])

    def inputs_seen(self, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every row's pass: input hash uint64 [U], tokens of context seen left and right int32 [U]."""
        group, c = self.paths.data / view.teacher, self._axes(view)[0]
        left, right = (RawArray(group / name).read(c) for name in ("context_left", "context_right"))
        return self.input_hashes(view), left, right

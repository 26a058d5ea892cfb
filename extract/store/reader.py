"""Reading a store: ids and views in, packed matrices out, at the speed of memory.

Invariant: what `gather` returns was committed, is complete, and equals what zarr-python reads at the same rows.
Shards are raw matrices, so one `preadv` a run of rows goes straight into the output. A Store holds no open file
until it reads, may be forked, and pickles as its path. Run: `pytest tests/extract/test_reader.py`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.data.errors import NoStoreError, StaleError, StoreError

from . import plan as plans
from .arrays import RawArray
from .commits import Commits
from .handles import Handles
from .index import Index
from .layout import crc32c, hash_text
from .rows import Job, Places, TeacherRows, fetch


@dataclass(frozen=True, order=True)
class View:
    """One representation of every transcript: (teacher, context, layer)."""

    teacher: str
    context: str
    layer: int

    @property
    def address(self) -> str:
        return f"{self.teacher}/{self.context}/{self.layer}"

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher's settings (see store/plan.py) and how many tokens of the corpus it has."""

    settings: plans.Teacher
    tokens: int
    shard_rows: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "settings":
            raise AttributeError(name)
        return getattr(self.settings, name)


@dataclass(frozen=True)
class Gathered:
    """A batch out of a store. N is the number of tokens of an utterance, ΣN of the batch, per teacher.

    lengths: {teacher: int32 [B]}; states: {view: [ΣN, D] as stored}; token_id: {teacher: int32 [ΣN]};
    span: {teacher: int32 [ΣN, 2]}, code points of the manifest's raw text. Views of one teacher share its tokens.
    """

    lengths: dict[str, np.ndarray]
    states: dict[View, np.ndarray]
    token_id: dict[str, np.ndarray]
    span: dict[str, np.ndarray]


class Store:
    """A store opened for reading. Use `Store.open(path)`.

    With `checksums`, every utterance that `gather` reads is compared with its stored crc32c.
    """

    def __init__(self, path: str | Path, checksums: bool = False) -> None:
        self.path = Path(path)
        self.checksums = checksums
        self.plan = plans.read_plan(self.path)
        self.paths = self.plan.paths
        self._handles = Handles()
        self._commits: dict[tuple[str, str], Commits] = {}
        self._teachers: dict[str, TeacherRows] = {}

    @classmethod
    def open(cls, path: str | Path, checksums: bool = False) -> Store:
        """Errors: NoStoreError where there is none, StoreError where it is of another version or damaged."""
        return cls(path, checksums)

    def __reduce__(self) -> tuple:
        return (Store, (self.path, self.checksums))

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def close(self) -> None:
        """Close this process's files; the store opens them again when it reads."""
        self._handles.close()

    # --- what there is ---

    @cached_property
    def index(self) -> Index:
        return Index(self.paths.data / "utterances")

    @cached_property
    def utterance_ids(self) -> list[str]:
        """All ids, in the order of the store (sessions permuted, utterances of one session in order)."""
        return self.index.ids()

    def commits(self, teacher: str, context: str) -> Commits:
        key = (teacher, context)
        if key not in self._commits:
            self._commits[key] = Commits(self.paths, teacher, context)
        return self._commits[key]

    def refresh(self) -> None:
        """See what writers have committed since this store was opened."""
        self.plan = plans.read_plan(self.path)
        self._commits.clear()
        self._teachers.clear()
        self.__dict__.pop("index", None)
        self.__dict__.pop("utterance_ids", None)

    @property
    def planned_views(self) -> list[View]:
        """All views that some generation asks for, complete or not."""
        views = {View(g.teacher, w.context, layer) for g in self.plan.generations for w in g.work for layer in w.layers}
        return sorted(views)

    @property
    def views(self) -> list[View]:
        """Views of which every unit of work is committed and whose norms are fixed."""
        return [v for v in self.planned_views if self._complete(v)]

    def _complete(self, view: View) -> bool:
        commits = self.commits(view.teacher, view.context)
        wanted = [u for u in self.plan.units(view.teacher) if u.context == view.context and view.layer in u.layers]
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
        parts = [*patterns.split("/"), "*", "*"][:3] if patterns.count("/") < 3 else []
        found = [v for v in have if parts and self._matches(v, *parts)]
        if not found:
            listed = ", ".join(v.address for v in have) or "none is complete"
            raise NoStoreError(f"no view matches {patterns!r}; there are: {listed}", where=self.path)
        return found

    def _matches(self, view: View, teacher: str, context: str, layers: str) -> bool:
        if not (fnmatch.fnmatchcase(view.teacher, teacher) and fnmatch.fnmatchcase(view.context, context)):
            return False
        depth = self.plan.teachers[view.teacher].depth
        for word in layers.split(","):
            if word == "last" and view.layer == depth:
                return True
            if word.lstrip("-").isdigit():
                number = int(word)
                if view.layer == (number if number >= 0 else depth + 1 + number):
                    return True
            elif fnmatch.fnmatchcase(str(view.layer), word):
                return True
        return False

    def teacher(self, name: str) -> TeacherInfo:
        """Errors: NoStoreError where the store has no teacher of that name."""
        if name not in self.plan.teachers:
            raise NoStoreError(
                f"no teacher {name!r}", where=self.path, expected=" or ".join(self.plan.teachers) or "none"
            )
        latest = self.plan.latest(name)
        return TeacherInfo(self.plan.teachers[name], sum(s.rows for s in latest.shards), latest.shard_rows)

    def embedding(self, teacher: str) -> tuple[np.ndarray, np.ndarray]:
        """Input-embedding rows of the token ids that the corpus has: (vocab_id int32 [K] ascending, float16 [K, D])."""
        self.teacher(teacher)
        group = self.paths.data / teacher
        return RawArray(group / "vocab_id").read(), RawArray(group / "embedding").read()

    def pieces(self, teacher: str) -> list[str]:
        """The tokenizer's spelling of each id of `embedding(teacher)`, for people to read."""
        self.teacher(teacher)
        return bytes(RawArray(self.paths.data / teacher / "vocab_piece").read()).decode().split("\n")

    def norm(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (≥ 1e-3) of each dimension, float32 [D], over the plan's sample."""
        c, layer = self._axes(view)
        if not self.commits(view.teacher, view.context).has("norms", [view.layer]):
            raise NoStoreError(f"{view} is not complete", where=self.path, remedy="finish its extraction")
        group = self.paths.data / view.teacher
        return RawArray(group / "norm_mean").read(c, layer), RawArray(group / "norm_std").read(c, layer)

    def context_seen(self, ids: Sequence[str], view: View) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of context that each utterance's pass saw on its left and right: int32 [B], int32 [B]."""
        rows, (c, _) = self.rows(ids), self._axes(view)
        group = self.paths.data / view.teacher
        return RawArray(group / "context_left").read(c)[rows], RawArray(group / "context_right").read(c)[rows]

    def input_hash(self, ids: Sequence[str], view: View) -> np.ndarray:
        """uint64 [B]: of the exact ids and mask that the model was fed for each utterance."""
        return RawArray(self.paths.data / view.teacher / "input_hash").read(self._axes(view)[0])[self.rows(ids)]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Rows of utterances, int64 [B]. Errors: NoStoreError naming those that the store does not know."""
        rows = self.index.rows(ids)
        if (rows < 0).any():
            raise NoStoreError(
                f"not in this store: {_some([i for i, r in zip(ids, rows) if r < 0])}",
                where=self.path,
                remedy="extract this corpus into it",
            )
        return rows

    def has(self, ids: Sequence[str], view: View) -> np.ndarray:
        """bool [B]: which utterances are committed in this view."""
        rows, t = self.index.rows(ids), self._rows_of(view.teacher)
        return (rows >= 0) & self._present(view)[t.start[np.maximum(rows, 0)] // t.shard_rows]

    def shards(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [B]: the shard of its first teacher that each utterance lies in, -1 where it is unknown. All teachers
        have the utterances in one order, so what is near for one is near for all.
        """
        rows, t = self.index.rows(ids), self._rows_of(self.plan.generations[0].teacher)
        return np.where(rows < 0, -1, np.asarray(t.start)[np.maximum(rows, 0)] // t.shard_rows)

    def held(self, view: View) -> np.ndarray:
        """bool [U]: the same of every utterance, by row."""
        t = self._rows_of(view.teacher)
        return self._present(view)[t.start // t.shard_rows]

    def text_hash(self, ids: Sequence[str]) -> np.ndarray:
        """uint64 [B]: hashes (`hash_text`) of the raw texts that were extracted."""
        return self.index.text_hash[self.rows(ids)]

    def check_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Errors: StaleError naming the utterances whose transcript has changed since they were extracted."""
        changed = [i for i, t, h in zip(ids, texts, self.text_hash(ids)) if hash_text(t) != int(h)]
        if changed:
            raise StaleError(
                f"the transcript has changed since extraction: {_some(changed)}",
                where=self.path,
                remedy="extract the corpus again into a new store, or restore the text",
            )

    # --- reading ---

    def lengths(self, teacher: str) -> np.ndarray:
        """Tokens of every utterance, by row: int32 [U]. Errors: NoStoreError for an unknown teacher."""
        return np.asarray(self._rows_of(teacher).length)

    def tokens(self, ids: Sequence[str], teacher: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the plan knows before any state exists: lengths int32 [B], token ids int32 [ΣN], spans int32 [ΣN, 2].

        Errors: NoStoreError for an unknown id or teacher.
        """
        t, rows = self._rows_of(teacher), self.rows(ids)
        places = Places(t.start[rows], t.length[rows], t.shard_rows, t.row_bytes)
        return t.length[rows], t.tokens(t.token_id, places), t.tokens(t.span, places)

    def gather(self, ids: Sequence[str], views: Sequence[View]) -> Gathered:
        """States, lengths, token ids and spans of utterances, packed in the order of `ids`.

        Errors: NoStoreError for an unknown id or view, or naming utterances that are not committed; StoreError
        naming view and utterance where bytes are damaged.
        """
        rows = self.rows(ids)
        lengths, token_id, span = {}, {}, {}
        states: dict[View, np.ndarray] = {}
        for name in dict.fromkeys(v.teacher for v in views):
            t = self._rows_of(name)
            places = Places(t.start[rows], t.length[rows], t.shard_rows, t.row_bytes)
            lengths[name] = t.length[rows]
            token_id[name], span[name] = t.tokens(t.token_id, places), t.tokens(t.span, places)
            mine = [v for v in dict.fromkeys(views) if v.teacher == name]
            states |= self._states(mine, rows, t, places)
        return Gathered(lengths, states, token_id, span)

    def _axes(self, view: View) -> tuple[int, int]:
        """Positions of a view on the axes C and L."""
        t = self._rows_of(view.teacher).record
        if view.context not in t.contexts or view.layer not in t.layers:
            raise NoStoreError(f"no view {view}", where=self.path, remedy="stillhouse inspect ls STORE")
        return t.contexts.index(view.context), t.layers.index(view.layer)

    def _rows_of(self, teacher: str) -> TeacherRows:
        if teacher not in self._teachers:
            self.teacher(teacher)
            self._teachers[teacher] = TeacherRows(self.plan, teacher)
        return self._teachers[teacher]

    def _present(self, view: View) -> np.ndarray:
        """bool [shards]: committed or not."""
        self._axes(view)
        t, commits = self._rows_of(view.teacher), self.commits(view.teacher, view.context)
        key = (view.context, view.layer)
        if key not in t.present:
            need = {
                u.shard.number: u.generation.number
                for u in self.plan.units(view.teacher)
                if u.context == view.context and view.layer in u.layers
            }
            t.present[key] = np.array(
                [commits.has(s, [view.layer], need.get(s, 0)) for s in range(len(t.shards))], dtype=bool
            )
        return t.present[key]

    def _states(self, views: list[View], rows: np.ndarray, t: TeacherRows, places: Places) -> dict[View, np.ndarray]:
        """{view: [ΣN, D]} of views of one teacher; their ranges are brought together, so that cold ones overlap."""
        states: dict[View, np.ndarray] = {}
        jobs: list[Job] = []
        for view in views:
            present = self._present(view)
            if not present[places.shard[places.length > 0]].all():
                missing = [self.index.id(int(r)) for r, s in zip(rows, places.shard) if not present[s]]
                raise NoStoreError(
                    f"not extracted yet: {_some(missing)}", where=view.address, remedy="finish it: stillhouse extract"
                )
            out = np.empty((places.total, t.width), dtype=t.dtype.stored)
            buffer = memoryview(out.data).cast("B") if out.size else memoryview(b"")
            c, layer = self._axes(view)
            for number, runs in places.runs:
                path = t.path(c, layer, number)
                handle = self._handles.open(path, t.shard_rows, t.row_bytes, t.shards[number].rows)
                if handle is None:
                    self._read_with_zarr(view, places, number, out)
                else:
                    jobs += [(handle, buffer, run) for run in runs]
            states[view] = out
            # Checksums want the bytes while they are in the processor's cache; and no batch may need more descriptors
            # than a process has.
            if self.checksums or len(states) % 16 == 0:
                fetch(jobs)
                jobs = []
            if self.checksums:
                self._check(view, rows, places, out.reshape(-1).view(np.uint8))
        fetch(jobs)
        return states

    def _read_with_zarr(self, view: View, places: Places, shard: int, out: np.ndarray) -> None:
        import zarr

        array = zarr.open_array(self.paths.array(view.teacher, "hidden"), mode="r")
        c, layer = self._axes(view)
        for u in np.flatnonzero((places.shard == shard) & (places.length > 0)):
            s, n, at = int(places.start[u]), int(places.length[u]), int(places.into[u])
            out[at : at + n] = array[c, layer, s : s + n]

    def _check(self, view: View, rows: np.ndarray, places: Places, buffer: np.ndarray) -> None:
        t = self._rows_of(view.teacher)
        stored = t.crc32c(*self._axes(view))[rows].tolist()
        at, size = (places.into * t.row_bytes).tolist(), (places.length * t.row_bytes).tolist()
        for u, (a, n, want) in enumerate(zip(at, size, stored)):
            if n and crc32c(buffer[a : a + n]) != want:
                raise StoreError(
                    "stored bytes are damaged",
                    where=f"{view.address} {self.index.id(int(rows[u]))}",
                    remedy="stillhouse inspect verify STORE names all that is damaged",
                )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Reading a store: ids and views in, packed matrices out, at the speed of memory.

Invariant: what `gather` returns was committed, is complete, and equals what zarr-python reads at the same rows.
Shards are raw matrices, so one `preadv` a run of rows goes straight into the output. A Store holds no open file
until it reads, may be forked, and pickles as its path. Run: `pytest tests/extract/test_reader.py`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from stillhouse.data.errors import NoStoreError, StaleError, StoreError, UsageError

from . import notebook
from . import plan as plans
from .arrays import RawArray
from .commits import Commits
from .handles import Handle, Handles
from .index import Index
from .layout import dtype_of, hash_text, to_float32
from .quantise import Loss, dequantise, sum_up
from .rows import Places, Reading, TeacherRows, read_all


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

    def _repr_html_(self) -> str:
        return notebook.view_html(self)


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

    lengths: {teacher: int32 [B]}; states: {view: [ΣN, D]}; token_id: {teacher: int32 [ΣN]};
    span: {teacher: int32 [ΣN, 2]}, code points of the manifest's raw text. Views of one teacher share its tokens.
    """

    lengths: dict[str, np.ndarray]
    states: dict[View, np.ndarray]
    token_id: dict[str, np.ndarray]
    span: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return notebook.gathered_text(self)

    def _repr_html_(self) -> str:
        return notebook.gathered_html(self)


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
        self._indices: dict[int, Index] = {}

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

    def close(self) -> None:
        """Close this process's files; the store opens them again when it reads."""
        self._handles.close()

    # --- what there is ---

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
        self._indices.clear()
        self.__dict__.pop("utterance_ids", None)

    @property
    def planned_views(self) -> list[View]:
        """All views that some generation asks for, complete or not."""
        return sorted({View(u.teacher, u.context, layer) for u in self.plan.units() for layer in u.layers})

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
        self._known(name)
        latest = self.plan.latest(name)
        tokens = sum(s.rows for s in latest.shards)
        if latest.edition:  # not those of dead rows
            index, length = self._index(latest.edition), RawArray(self.paths.data / name / "length").read()
            tokens = int(length[index.row].sum())
        return TeacherInfo(self.plan.teachers[name], tokens, latest.shard_rows)

    def _known(self, name: str) -> None:
        if name not in self.plan.teachers:
            raise NoStoreError(
                f"no teacher {name!r}", where=self.path, expected=" or ".join(self.plan.teachers) or "none"
            )

    def embedding(self, teacher: str) -> tuple[np.ndarray, np.ndarray]:
        """Input-embedding rows of the token ids that the corpus has: (vocab_id int32 [K] ascending, float16 [K, D])."""
        self._known(teacher)
        group, count = self.paths.data / teacher, self.plan.latest(teacher).vocabulary
        vocabulary, table = RawArray(group / "vocab_id").read(), RawArray(group / "embedding").read()
        if not count:
            return vocabulary, table
        order = np.argsort(vocabulary[:count], kind="stable")
        return vocabulary[order], table[order]

    def pieces(self, teacher: str) -> list[str]:
        """The tokenizer's spelling of each id of `embedding(teacher)`, for people to read."""
        self._known(teacher)
        group, count = self.paths.data / teacher, self.plan.latest(teacher).vocabulary
        pieces = bytes(RawArray(group / "vocab_piece").read()).decode(errors="replace").split("\n")
        if not count:
            return pieces
        order = np.argsort(RawArray(group / "vocab_id").read()[:count], kind="stable")
        return [pieces[i] for i in order.tolist()]

    def norm(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (≥ 1e-3) of each dimension, float32 [D], over the plan's sample."""
        c, layer = self._axes(view)
        if not self.commits(view.teacher, view.context).has("norms", [view.layer]):
            raise NoStoreError(f"{view} is not complete", where=self.path, remedy="finish its extraction")
        group = self.paths.data / view.teacher
        return RawArray(group / "norm_mean").read(c, layer), RawArray(group / "norm_std").read(c, layer)

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

    def fed(self, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every row's pass: input hash uint64 [U], tokens of context seen left and right int32 [U]."""
        group, c = self.paths.data / view.teacher, self._axes(view)[0]
        left, right = (RawArray(group / name).read(c) for name in ("context_left", "context_right"))
        return self.input_hashes(view), left, right

    def row_length(self, teacher: str, row: int) -> int:
        """Tokens of a row, dead or not."""
        return int(self._rows_of(teacher).length[row])

    def shard_of(self, teacher: str, row: int) -> int:
        """The number of the shard that a row of this teacher lies in."""
        t = self._rows_of(teacher)
        return int(t.start[row]) // t.shard_rows

    def rows(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        """Rows of utterances, int64 [B]; those that `teacher` has, where teachers are at different editions.

        Errors: NoStoreError naming those that the store does not know.
        """
        rows = (self.index if teacher is None else self.index_of(teacher)).rows(ids)
        if (rows < 0).any():
            raise NoStoreError(
                f"not in this store: {_some([i for i, r in zip(ids, rows) if r < 0])}",
                where=self.path,
                remedy="extract this corpus into it",
            )
        return rows

    def has(self, ids: Sequence[str], view: View) -> np.ndarray:
        """bool [B]: which utterances are committed in this view."""
        rows, t = self.index_of(view.teacher).rows(ids), self._rows_of(view.teacher)
        return (rows >= 0) & self._present(view)[t.start[np.maximum(rows, 0)] // t.shard_rows]

    def shards(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [B]: the shard of its first teacher that each utterance lies in, -1 where it is unknown. All teachers
        have the utterances in one order, so what is near for one is near for all.
        """
        teacher = self.plan.generations[0].teacher
        rows, t = self.index_of(teacher).rows(ids), self._rows_of(teacher)
        return np.where(rows < 0, -1, np.asarray(t.start)[np.maximum(rows, 0)] // t.shard_rows)

    def held(self, view: View) -> np.ndarray:
        """bool [U]: the same of every utterance, by row."""
        t, live = self._rows_of(view.teacher), self.index_of(view.teacher).live
        held = np.zeros(len(self.index), dtype=bool)
        held[: len(live)] = live & self._present(view)[t.start[: len(live)] // t.shard_rows]
        return held

    def text_hash(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        """uint64 [B]: hashes (`hash_text`) of the raw texts that were extracted (by `teacher`)."""
        index = self.index if teacher is None else self.index_of(teacher)
        return index.text_hash[self.rows(ids, teacher)]

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

    def gather(
        self, ids: Sequence[str], views: Sequence[View], dtype: str | None = None, allocate: Allocate = np.empty
    ) -> Gathered:
        """States, lengths, token ids and spans of utterances, packed in the order of `ids`.

        dtype     "float32" or "float16"; None: as stored (bfloat16 as uint16 bits; int8 as float32)
        allocate  (shape, numpy dtype) -> the array that a view's states go into, as in pinned memory; C-contiguous
        Errors: NoStoreError for an unknown id or view, or naming utterances that are not committed; StoreError
        naming view and utterance where bytes are damaged.
        """
        if dtype not in (None, "float32", "float16"):
            raise UsageError(f"states as {dtype!r}", expected="float32, float16 or None")
        try:
            return self._gather(ids, views, dtype, allocate)
        except StoreError as e:
            self._explain(e)
            raise

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

    def _gather(self, ids: Sequence[str], views: Sequence[View], dtype: str | None, allocate: Allocate) -> Gathered:
        by_edition: dict[int, np.ndarray] = {}
        lengths, token_id, span = {}, {}, {}
        states: dict[View, np.ndarray] = {}
        for name in dict.fromkeys(v.teacher for v in views):
            t, edition = self._rows_of(name), self.plan.edition(name)
            if edition not in by_edition:
                by_edition[edition] = self.rows(ids, name)
            rows = by_edition[edition]
            places = t.places(rows)
            lengths[name] = t.length[rows]
            token_id[name], span[name] = t.tokens(t.token_id, places), t.tokens(t.span, places)
            mine = [v for v in dict.fromkeys(views) if v.teacher == name]
            for first in range(0, len(mine), _VIEWS_AT_ONCE):
                states |= self._states(mine[first : first + _VIEWS_AT_ONCE], rows, t, places, dtype, allocate)
        return Gathered(lengths, states, token_id, span)

    def stored(self, ids: Sequence[str], view: View) -> tuple[np.ndarray, np.ndarray | None]:
        """States [ΣN, D] as their bytes are on disk, and of int8 the scales float16 [ΣN]. Errors: as `gather`."""
        rows = self.rows(ids, view.teacher)
        self._check_present(view, rows, self._rows_of(view.teacher).places(rows))
        return self.stored_rows(rows, view)

    def stored_rows(self, rows: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray | None]:
        """The same by row, also of rows that are dead: of shards that the caller knows to be committed."""
        t = self._rows_of(view.teacher)
        places = t.places(rows)
        out, scale, readings = self._buffers(view, t, places)
        self._fetch([readings])
        if self.checksums:
            self._check(view, rows, places, out, scale, readings)
        return out, scale

    def loss(self, view: View) -> Loss | None:
        """What int8 has cost this view, over all tokens committed; None for other dtypes."""
        commits = {id(c): c for (_, k), c in self.commits(view.teacher, view.context).of.items() if k == view.layer}
        key = str(view.layer)
        return sum_up([c.losses[key] for c in commits.values() if key in c.losses])

    def _axes(self, view: View) -> tuple[int, int]:
        """Positions of a view on the axes C and L."""
        t = self._rows_of(view.teacher).record
        if view.context not in t.contexts or view.layer not in t.layers:
            raise NoStoreError(f"no view {view}", where=self.path, remedy="stillhouse inspect ls STORE")
        return t.contexts.index(view.context), t.layers.index(view.layer)

    def _rows_of(self, teacher: str) -> TeacherRows:
        if teacher not in self._teachers:
            self._known(teacher)
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
                [s in need and commits.has(s, [view.layer], need[s]) for s in range(len(t.shards))], dtype=bool
            )
        return t.present[key]

    def _states(
        self,
        views: list[View],
        rows: np.ndarray,
        t: TeacherRows,
        places: Places,
        dtype: str | None,
        allocate: Allocate,
    ) -> dict[View, np.ndarray]:
        """{view: [ΣN, D]} of views of one teacher; their ranges are brought together, so that cold ones overlap."""
        logical = dtype or ("float32" if t.dtype.scaled else t.dtype.logical)
        direct = logical == t.dtype.logical
        for view in views:
            self._check_present(view, rows, places)
        buffers = [self._buffers(view, t, places, allocate if direct else np.empty) for view in views]
        states: dict[View, np.ndarray] = {}

        def arrived(number: int) -> None:
            """A view's bytes are best looked at while they are in the processor's cache."""
            view, (stored, scale, readings) = views[number], buffers[number]
            if self.checksums:
                self._check(view, rows, places, stored, scale, readings)
            if direct:
                states[view] = stored
                return
            out = allocate((places.total, t.width), np.dtype(dtype_of(logical).stored))
            if scale is not None:
                mean, std = (t.of_layer(name, *self._axes(view)) for name in ("norm_mean", "norm_std"))
                dequantise(stored, scale, mean, std, out)
            else:
                np.copyto(out, to_float32(stored, t.dtype.logical), casting="same_kind")
            states[view] = out

        self._fetch([readings for _, _, readings in buffers], arrived)
        return states

    def _check_present(self, view: View, rows: np.ndarray, places: Places) -> None:
        present = self._present(view)
        if not present[places.shards].all():
            missing = [self.index.id(int(r)) for r, s in zip(rows, places.shard) if not present[s]]
            raise NoStoreError(
                f"not extracted yet: {_some(missing)}", where=view.address, remedy="finish it: stillhouse extract"
            )

    def _buffers(
        self, view: View, t: TeacherRows, places: Places, allocate: Allocate = np.empty
    ) -> tuple[np.ndarray, np.ndarray | None, list[Reading]]:
        """Arrays for a view's states as stored and their scales (None: there are none), and what will fill them."""
        axes = self._axes(view)
        out = allocate((places.total, t.width), np.dtype(t.dtype.stored))
        scale = np.empty(places.total, np.float16) if t.dtype.scaled else None
        readings = []
        for name, array in (("hidden", out), ("scale", scale)):
            if array is None:
                continue
            handles: dict[int, Handle] = {}
            for number in places.shards:
                path, used = t.path(name, *axes, number), t.shards[number].rows
                handle = self._handles.open(path, t.shard_rows, t.row_size(name), used)
                if handle is None:
                    self._read_with_zarr(name, view, places, number, array)
                else:
                    handles[number] = handle
            if handles:
                readings.append(Reading(handles, places, t.row_size(name), array))
        return out, scale, readings

    def _fetch(self, views: list[list[Reading]], arrived: Callable[[int], None] = lambda _: None) -> None:
        """Fill the arrays of several views; `arrived` is called with each one's number."""
        every = [r for readings in views for r in readings]
        hot = read_all(every)
        copies = {size: every[0].places.copies(size) for size in {r.row_bytes for r in every}} if hot else {}
        runs = {} if hot else {size: every[0].places.runs(size) for size in {r.row_bytes for r in every}}
        for number, readings in enumerate(views):
            for r in readings:
                if hot:
                    r.copy(copies[r.row_bytes], self.checksums)
                else:
                    r.read(runs[r.row_bytes])
            arrived(number)

    def _read_with_zarr(self, name: str, view: View, places: Places, shard: int, out: np.ndarray) -> None:
        import zarr

        array = zarr.open_array(self.paths.array(view.teacher, name), mode="r")
        c, layer = self._axes(view)
        for u in np.flatnonzero((places.shard == shard) & (places.length > 0)):
            s, n, at = int(places.start[u]), int(places.length[u]), int(places.into[u])
            out[at : at + n] = array[c, layer, s : s + n]

    def _check(
        self,
        view: View,
        rows: np.ndarray,
        places: Places,
        states: np.ndarray,
        scale: np.ndarray | None,
        readings: list[Reading],
    ) -> None:
        t = self._rows_of(view.teacher)
        stored = t.of_layer("crc32c", *self._axes(view))[rows].tolist()
        sums = next((r.sums for r in readings if r.out is states), None)
        if sums is None:
            sums = _checksums(states, places, t.row_bytes)
        if scale is not None:
            sums = _checksums(scale, places, t.row_size("scale"), sums)
        if sums != stored:
            for u, (n, got, want) in enumerate(zip(places.length.tolist(), sums, stored)):
                if n and got != want:
                    raise StoreError(
                        "stored bytes are damaged",
                        where=f"{view.address} {self.index.id(int(rows[u]))}",
                        remedy="stillhouse inspect verify STORE names all that is damaged",
                    )


Allocate = Callable[[tuple[int, ...], Any], np.ndarray]
_VIEWS_AT_ONCE = 16  # no batch may need more descriptors than a process has


def _checksums(array: np.ndarray, places: Places, row_bytes: int, before: list[int] | None = None) -> list[int]:
    """crc32c of each utterance's rows, behind the bytes that `before` is of."""
    data = array.reshape(-1).view(np.uint8)
    at = (places.into * row_bytes).tolist()
    end = ((places.into + places.length) * row_bytes).tolist()
    if before is None:
        return [google_crc32c.value(data[a:b]) for a, b in zip(at, end)]
    return [google_crc32c.extend(c, data[a:b]) for a, b, c in zip(at, end, before)]


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

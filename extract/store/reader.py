"""Read a store: ids and views in, packed matrices out, at the speed of memory.

Guarantees: nothing here writes. A Store holds no open file until it reads, may be forked (unless it is in an object
store), and pickles as its address. It shows the store as it was when it was opened, until `refresh`. Where reading
fails because the store has changed since, the error says so.
Try: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ...data.errors import NoStoreError, StaleError, StoreError, UsageError, first_few
from . import display
from .disk.files import StoreFiles
from .disk.layout import hash_text
from .format import plan as plans
from .format.arrays import RawArray
from .format.commits import Commits
from .format.index import Index, same_text
from .format.plan import TeacherInfo
from .format.quantised import QuantisationError
from .gather import Allocate, DamagedRowError, Gathered, StateReader
from .read.buffers import BATCH_BUFFERS
from .read.committed import CommittedWork
from .read.late import LateArrays
from .read.norms import StoredNorms
from .read.rows import RowRanges, TeacherRows
from .read.vocabulary import Vocabulary
from .storage import explain_change, open_files
from .views import View, matching


class Store:
    """A store opened for reading. Use `Store.open(path)`.

    Arguments:
        path: a folder, s3://BUCKET/PREFIX, or files that are open already. `address` has it as one would type it.
        checksums: compare every utterance that `gather` reads with its stored crc32c. None: where the store is in an
            object store. What differs there is fetched again before it is an error.
    """

    def __init__(self, path: str | Path | StoreFiles, checksums: bool | None = None) -> None:
        self._source, self._asked_checksums = path, checksums
        self._read_plan()

    @classmethod
    def open(cls, path: str | Path | StoreFiles, checksums: bool | None = None) -> Store:
        """Open a store.

        Raises:
            NoStoreError: there is no store.
            StoreError: the store is of another version, or damaged.
        """
        return cls(path, checksums)

    def _read_plan(self) -> None:
        self.plan = plans.read_plan(open_files(self._source))
        self.paths, self.address = self.plan.paths, self.plan.paths.files.address
        self.path = Path(self.address)
        asked = self._asked_checksums
        self.checksums = self.paths.files.is_copied if asked is None else asked
        self._committed = CommittedWork(self.plan)
        self._norms = StoredNorms(self.plan, self._committed)
        self._states = StateReader(self.paths, self.checksums, self._norms.checked)
        self._teachers: dict[str, TeacherRows] = {}
        self._indices: dict[int, Index] = {}

    def refresh(self) -> None:
        """Show what writers have committed since this store was opened."""
        self._read_plan()
        self.__dict__.pop("utterance_ids", None)

    def close(self) -> None:
        """Close the files of this process. The store opens them again when it reads."""
        self._states.handles.close()

    def unmap(self) -> None:
        """Close memory maps, so that the pages read through them no longer count as this process's memory."""
        self._states.handles.unmap()

    def __reduce__(self) -> tuple:
        return (Store, (self.path, self._asked_checksums))

    def __repr__(self) -> str:
        return display.store_text(self)

    def _repr_html_(self) -> str:
        return display.store_html(self)

    # --- views ---

    @property
    def planned_views(self) -> list[View]:
        """All views that some generation asks for, complete or not."""
        return sorted({View(i.teacher, i.context, layer) for i in self.plan.work_items() for layer in i.layers})

    @property
    def views(self) -> list[View]:
        """Views whose work items are all committed and whose norms are fixed."""
        return [v for v in self.planned_views if self._committed.complete(v.teacher, v.context, v.layer)]

    def resolve(self, patterns: str | Sequence[str], among: Sequence[View] | None = None) -> list[View]:
        """Return the views that match an address.

        Arguments:
            patterns: globs for teacher and context; layers by number, `last`, negative or `*`, several with commas, as
                in "minilm/*/3,6". Several patterns may be given as a list.
            among: views to choose from; None: the complete ones.

        Raises:
            NoStoreError: no view matches; lists those that there are.
        """
        if not isinstance(patterns, str):
            return list(dict.fromkeys(v for p in patterns for v in self.resolve(p, among)))
        views = self.views if among is None else among
        chosen = matching(patterns, views, self.plan)
        if not chosen:
            listed = ", ".join(v.address for v in views) or "none is complete"
            raise NoStoreError(f"no view matches {patterns!r}; there are: {listed}", where=self.address)
        return chosen

    def axes(self, view: View) -> tuple[int, int]:
        """Return the positions of a view on the axes C and L. Raises NoStoreError where the store has no such view."""
        t = self._teacher_rows(view.teacher).record
        if view.context not in t.contexts or view.layer not in t.layers:
            raise NoStoreError(f"no view {view}", where=self.address, remedy="stillhouse inspect ls STORE")
        return t.contexts.index(view.context), t.layers.index(view.layer)

    def commits(self, teacher: str, context: str) -> Commits:
        """Return the commit records of a teacher's context."""
        return self._committed.records(teacher, context)

    def norm(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation (≥ 1e-3) of each dimension, float32 [D], over the plan's sample."""
        self.axes(view)
        mean, std, *_ = self._norms.read(view.teacher, view.context, view.layer)
        return mean, std

    def norms_stored(self, view: View) -> tuple[np.ndarray, ...]:
        """Return mean, std and, for pq, codebooks float16 as stored. Raises StoreError where they are damaged."""
        self.axes(view)
        return self._norms.checked(view.teacher, view.context, view.layer)

    def codebooks(self, view: View) -> np.ndarray:
        """Return the codebooks of a pq view, float32 [M, 256, D/M]. Raises UsageError for a view of another dtype.

        A state is `codebooks[m, code[m]] · std + mean`, with codes of `gather(…, dtype="codes")` and `norm`'s numbers.
        """
        self.axes(view)
        return self._norms.codebooks(view.teacher, view.context, view.layer)

    def loss(self, view: View) -> QuantisationError | None:
        """Return how far int8 or pq states of this view are from the model's, or None for other dtypes."""
        return self._norms.loss(view.teacher, view.context, view.layer)

    # --- states ---

    def gather(
        self, ids: Sequence[str], views: Sequence[View], dtype: str | None = None, allocate: Allocate | None = None
    ) -> Gathered:
        """Read the states of some utterances.

        Arguments:
            ids: utterance ids, in any order; repeats are allowed.
            views: views to read, from `resolve`.
            dtype: "float32" or "float16". None keeps the stored type: bfloat16 as uint16 bits, int8 and pq as float32.
                "codes" reads the codes of pq views, uint8 [N, M], instead of what they stand for (see `codebooks`).
            allocate: makes the C-contiguous output array from (shape, dtype), for example in pinned memory.

        Returns:
            Packed arrays without padding, in the order of `ids`: `states[view]` is [N, D], with N the tokens of all
            `ids` together. Teachers that were refreshed apart may have other texts of an utterance: see `same_text`.

        Raises:
            NoStoreError: an id or view is unknown, or not extracted yet; names the utterances.
            StoreError: stored bytes are damaged; names the view and the utterance.
        """
        if dtype not in (None, "float32", "float16", "codes"):
            raise UsageError(f"states as {dtype!r}", expected="float32, float16, codes or None")
        token_id, span = LateArrays(), LateArrays()
        batch = Gathered({}, {}, token_id, span)
        rows_of: dict[int, np.ndarray] = {}  # by edition: most teachers share one
        try:
            for name in dict.fromkeys(v.teacher for v in views):
                t, edition = self._teacher_rows(name), self.plan.edition(name)
                if edition not in rows_of:
                    rows_of[edition] = self.rows(ids, name)
                rows = rows_of[edition]
                ranges = t.ranges(rows)
                batch.lengths[name] = t.length[rows]
                if not t.record.is_speech:
                    token_id.makers[name] = t.open_tokens(t.token_id, ranges)
                    span.makers[name] = t.open_tokens(t.span, ranges)
                axes = {v: self.axes(v) for v in views if v.teacher == name}
                for view in axes:
                    self._require_committed(view, rows, ranges)
                batch.states.update(self._states.read(t, axes, rows, ranges, dtype, allocate or BATCH_BUFFERS.empty))
        except (StoreError, DamagedRowError) as e:
            error = e if isinstance(e, StoreError) else e.named(self.index.id(e.row))
            explain_change(error, self._source, self.plan)
            raise error from None
        return batch

    def stored_rows(self, rows: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray | None]:
        """Return stored states by row, also of dead rows. The caller knows that their shards are committed."""
        try:
            return self._states.stored(self._teacher_rows(view.teacher), view, self.axes(view), rows)
        except DamagedRowError as e:
            raise e.named(self.index.id(e.row)) from None

    def has(self, ids: Sequence[str], view: View) -> np.ndarray:
        """Return which utterances are committed in this view, bool [B]."""
        rows, t = self.index_of(view.teacher).rows(ids), self._teacher_rows(view.teacher)
        return (rows >= 0) & self._committed_shards(view)[t.shard_of(np.maximum(rows, 0))]

    def available(self, view: View) -> np.ndarray:
        """Return which rows are committed in this view, bool [U]; dead rows are not."""
        t, live = self._teacher_rows(view.teacher), self.index_of(view.teacher).live
        committed = live & self._committed_shards(view)[t.shard_of(slice(len(live)))]
        return np.pad(committed, (0, len(self.index) - len(live)))

    def _committed_shards(self, view: View) -> np.ndarray:
        self.axes(view)
        return self._committed.shards(view.teacher, view.context, view.layer)

    def _require_committed(self, view: View, rows: np.ndarray, ranges: RowRanges) -> None:
        committed = self._committed_shards(view)
        if not (np.logical_and.reduce(committed) or committed[ranges.shards].all()):
            missing = [self.index.id(int(r)) for r, s in zip(rows, ranges.shard) if not committed[s]]
            remedy = "finish it: stillhouse extract"
            raise NoStoreError(f"not extracted yet: {first_few(missing)}", where=view.address, remedy=remedy)

    # --- teachers ---

    def teacher(self, name: str) -> TeacherInfo:
        """Return a teacher's settings. Raises NoStoreError where the store has no teacher of that name."""
        self._require_teacher(name)
        latest = self.plan.latest(name)
        tokens = sum(s.rows for s in latest.shards)
        if latest.edition:  # The shards hold dead rows, too.
            tokens = int(RawArray(self.paths, name, "length").read()[self._index(latest.edition).row].sum())
        return TeacherInfo(self.plan.teachers[name], tokens, latest.shard_rows)

    def embedding(self, teacher: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids that the corpus has, int32 [K] ascending, and their input embeddings, float16 [K, D]."""
        vocabulary = self._vocabulary(teacher)
        return vocabulary.ids, vocabulary.embedding()

    def vocabulary_rows(self, teacher: str, token_id: np.ndarray) -> np.ndarray:
        """Return the rows of `embedding(teacher)` and `pieces(teacher)` of token ids, int64 [N].

        Raises StoreError if an id is not there, or the teacher's tokens are damaged.
        """
        return self._vocabulary(teacher).rows(token_id)

    def pieces(self, teacher: str) -> list[str]:
        """Return the tokenizer's spelling of each id of `embedding(teacher)`, for people to read."""
        return self._vocabulary(teacher).pieces()

    def require_tokens(self, teacher: str) -> None:
        """Raise UsageError for a speech teacher, which has frames and no tokens. NoStoreError: there is no teacher."""
        self._require_teacher(teacher)
        if self.plan.teachers[teacher].is_speech:
            raise UsageError(f"{teacher} is a speech teacher: it has frames, and no tokens", where=self.address)

    def _vocabulary(self, teacher: str) -> Vocabulary:
        self.require_tokens(teacher)
        return Vocabulary(self.plan, teacher)

    def _require_teacher(self, name: str) -> None:
        if name not in self.plan.teachers:
            raise NoStoreError(f"no teacher {name!r}", where=self.address, expected=" or ".join(self.plan.teachers))

    def _teacher_rows(self, teacher: str) -> TeacherRows:
        if teacher not in self._teachers:
            self._require_teacher(teacher)
            t = TeacherRows(self.plan, teacher)
            if len(t.start) < max((s.last for s in t.shards), default=0):
                raise t.damaged()
            self._teachers[teacher] = t
        return self._teachers[teacher]

    # --- utterances ---

    @property
    def index(self) -> Index:
        """The utterances of the newest edition. A teacher may be at an older one (see `index_of`)."""
        return self._index(self.plan.edition())

    def index_of(self, teacher: str) -> Index:
        """Return the corpus as a teacher's states were made from it. Raises NoStoreError for an unknown teacher."""
        self._require_teacher(teacher)
        return self._index(self.plan.edition(teacher))

    def _index(self, edition: int) -> Index:
        if edition not in self._indices:
            try:
                self._indices[edition] = Index(self.paths, edition)
            except StoreError as e:
                explain_change(e, self._source, self.plan)
                raise
        return self._indices[edition]

    @cached_property
    def utterance_ids(self) -> list[str]:
        """All ids, in the order of the store: sessions permuted, utterances of one session in order."""
        return self.index.ids()

    def rows(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        """Return the rows of utterances, int64 [B]; those of `teacher`, where teachers are at different editions.

        Raises NoStoreError with the ids that the store does not know.
        """
        rows = (self.index if teacher is None else self.index_of(teacher)).rows(ids)
        if np.count_nonzero(rows < 0):
            unknown = first_few([i for i, r in zip(ids, rows) if r < 0])
            what, remedy = f"not in this store: {unknown}", "extract this corpus into it"
            raise NoStoreError(what, where=self.address, remedy=remedy)
        return rows

    def shards(self, ids: Sequence[str]) -> np.ndarray:
        """Return the shard of the first teacher that each utterance lies in, int64 [B], -1 where it is unknown."""
        teacher = self.plan.generations[0].teacher  # All teachers have the utterances in one order.
        rows, t = self.index_of(teacher).rows(ids), self._teacher_rows(teacher)
        return np.where(rows < 0, -1, t.shard_of(np.maximum(rows, 0)))

    def shard_of(self, teacher: str, rows: int | np.ndarray) -> np.ndarray:
        """Return the shard that each row of this teacher lies in, int64 [B]."""
        t = self._teacher_rows(teacher)
        return t.start[rows] // t.shard_rows

    def text_hash(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        """Return hashes (`hash_text`) of the raw texts that were extracted (by `teacher`), uint64 [B]."""
        return self.index.text_hash[self.rows(ids, teacher)]  # A row's text never changes.

    def same_text(self, ids: Sequence[str], teachers: Sequence[str]) -> np.ndarray:
        """Return which utterances all `teachers` have, from one text: bool [B]. Speech teachers have it from none."""
        held = [self.index_of(name).rows(ids) >= 0 for name in teachers if self.plan.teachers[name].is_speech]
        texts = [self.index_of(name) for name in teachers if not self.plan.teachers[name].is_speech]
        return np.logical_and.reduce([same_text(texts, ids), *held])

    def check_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Raise StaleError naming the utterances whose transcript some text teacher's states are not of."""
        hashes = [hash_text(t) for t in texts]
        editions = {self.plan.edition(name): name for name, t in self.plan.teachers.items() if not t.is_speech}
        changed = [i for name in editions.values() for i, h, n in zip(ids, hashes, self.text_hash(ids, name)) if h != n]
        if changed := list(dict.fromkeys(changed)):
            what = f"the transcript has changed since extraction: {first_few(changed)}"
            remedy = "extract the corpus again into a new store, or restore the text"
            raise StaleError(what, where=self.address, remedy=remedy)

    def lengths(self, teacher: str) -> np.ndarray:
        """Return the tokens of every row, int32 [U], 0 for a dead row. Raises NoStoreError for an unknown teacher."""
        length, live = np.asarray(self._teacher_rows(teacher).length), self.index_of(teacher).live
        if live.all() and len(live) == len(length) == len(self.index):
            return length
        out = np.zeros(len(self.index), dtype=length.dtype)
        out[: len(live)] = np.where(live, length[: len(live)], 0)
        return out

    def tokens(self, ids: Sequence[str], teacher: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lengths int32 [B], token ids int32 [N] and spans int32 [N, 2], which exist before any state does.

        Raises NoStoreError for an unknown id or teacher, and UsageError for a speech teacher."""
        return self.tokens_of_rows(self.rows(ids, teacher), teacher)

    def tokens_of_rows(self, rows: np.ndarray, teacher: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lengths, token ids and spans by row, also of dead rows."""
        self.require_tokens(teacher)
        t = self._teacher_rows(teacher)
        ranges = t.ranges(rows)
        return t.length[rows], t.tokens(t.token_id, ranges), t.tokens(t.span, ranges)

    def row_lengths(self, teacher: str, rows: np.ndarray) -> np.ndarray:
        """Return the tokens or frames of rows, dead or not, int32 [B]."""
        return self._teacher_rows(teacher).length[rows]

    # --- the teacher's input ---

    def inputs_seen(self, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, for every row's pass, input hash uint64 [U], and tokens of context seen left and right int32 [U]."""
        shards = self._teacher_rows(view.teacher).shards
        done = [(s.first, s.last) for s, there in zip(shards, self._committed_shards(view)) if there]
        arrays = (RawArray(self.paths, view.teacher, a) for a in ("input_hash", "context_left", "context_right"))
        hashes, left, right = (array.read(self.axes(view)[0], written=done) for array in arrays)
        return hashes, left, right

    def context_seen(self, ids: Sequence[str], view: View) -> tuple[np.ndarray, np.ndarray]:
        """Return how many tokens of context each utterance's pass saw on its left and right: int32 [B], int32 [B]."""
        rows, (_, left, right) = self.rows(ids, view.teacher), self.inputs_seen(view)
        return left[rows], right[rows]

    def input_hash(self, ids: Sequence[str], view: View) -> np.ndarray:
        """Return hashes of the exact ids and mask that the model was fed for each utterance, uint64 [B]."""
        return self.inputs_seen(view)[0][self.rows(ids, view.teacher)]

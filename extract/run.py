"""Running an extraction: unit after unit until every view of the plan is complete.

Invariant: a unit is either committed or as if never begun, so the same command after any death goes on where the
last commit left off, and several of them share the work. Run: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..data.manifest import Corpus
from .batches import make_batches
from .change import windows_of
from .encoding import encode_tensor, forward, tensors
from .norms import fix_norms, fix_norms_first
from .ordering import Layout
from .plan import Request, make_plan
from .progress import Outcome, Progress, Report, Summary, summarise
from .reuse import Reuse, without
from .reuse import write as write_copies
from .store.arrays import RawArray
from .store.commits import Commits
from .store.files import Lock, Scratch
from .store.index import Index
from .store.plan import Plan, Unit, read_plan
from .store.quantise import Quantised
from .store.remote import mirror_of, planned, workspace
from .store.rows import TeacherRows
from .store.writer import UnitWriter
from .teacher import Teacher
from .threads import Threads
from .windows import Passes, Texts, Window

if TYPE_CHECKING:
    import torch


def extract(
    root: Path,
    corpus: Corpus,
    teacher: Teacher,
    request: Request,
    report: Report | None = None,
    part: tuple[int, int] | None = (0, 1),
    helpers: Callable[[Plan], Helpers] | None = None,
    before: Callable[[Plan, Layout | None], None] | None = None,
    refresh: bool = False,
    maker: Callable[..., UnitMaker] | None = None,
) -> Summary:
    """Extract all that is asked for and not there yet; of `part` (i, n), only every n-th unit from the i-th on;
    None: `helpers` do all of it.

    `helpers` starts other processes once the plan is written (see workers.py); `before` sees a plan before its last
    generation is written, and may refuse; `refresh`: replace and drop what the corpus no longer says.
    Errors: StaleError where the store was made with other settings or from other texts; StoreError where a value is
    not finite or the disk is full.
    """
    with workspace(root) as folder:
        plan = planned(folder, lambda: make_plan(folder, corpus, teacher, request, before, refresh))
        progress = Progress()
        with Scratch(plan.paths) as scratch:
            plan = read_plan(folder)  # as it is now that we are seen to write (see store/exclusive.py)
            crew = helpers(plan) if helpers is not None else None
            try:
                if part is None:
                    progress.units_total = len(plan.units(request.name))
                else:
                    run_units(plan, request.name, teacher, scratch.folder, progress, report, part, maker)
            finally:
                if crew is not None:
                    progress.add(crew.finish())
            for context in plan.teachers[request.name].contexts:
                fix_norms(plan, request.name, context, scratch.folder)
        share_arrays(plan, request.name)
        return summarise(plan, request.name, progress)


class Helpers(Protocol):
    """Processes that work on the same store; `finish` waits for them, tells what they did, raises what they raised."""

    def finish(self) -> Outcome: ...


def run_units(
    plan: Plan,
    name: str,
    teacher: Teacher,
    scratch: Path,
    progress: Progress,
    report: Report | None = None,
    part: tuple[int, int] = (0, 1),
    maker: Callable[..., UnitMaker] | None = None,
) -> None:
    """Run every unit that is not committed. Those that another process holds are waited for at the end."""
    todo = []
    units = plan.units(name)[part[0] :: part[1]]
    progress.units_total = len(units)
    known = {c: Commits(plan.paths, name, c) for c in dict.fromkeys(u.context for u in units)}
    for unit in units:
        if known[unit.context].has(unit.shard.number, unit.layers, unit.generation.number):
            progress.units_found += 1
        else:
            todo.append(unit)
            progress.rows_total += unit.shard.rows
    progress.units_todo, progress.rows_todo = len(todo), progress.rows_total
    if not todo:
        return
    if mirror_of(plan.paths.root) is not None:  # no locks there: writers begin in different places
        first = random.SystemRandom().randrange(len(todo))
        todo = todo[first:] + todo[:first]
    held: list[Unit] = []
    with (maker or UnitMaker)(plan, teacher, TeacherRows(plan, name), scratch, progress, report) as making:
        for wait in (False, True):
            for unit in todo if not wait else held:
                lock = Lock(plan.paths.lock(unit.teacher, unit.context, unit.shard.number))
                if not lock.acquire(wait=wait):
                    held.append(unit)
                    continue
                with lock:
                    if committed(plan, unit):
                        progress.rows_total -= unit.shard.rows
                        progress.units_found += 1
                    else:
                        making.make(unit)
                        progress.units += 1


def committed(plan: Plan, unit: Unit) -> bool:
    commits = Commits(plan.paths, unit.teacher, unit.context)
    return commits.has(unit.shard.number, unit.layers, unit.generation.number)


def share_arrays(plan: Plan, name: str) -> None:
    """In an object store, put the arrays that units write parts of whole, where all of a context's units are there."""
    mirror = mirror_of(plan.paths.root)
    if mirror is None:
        return
    record, group = plan.teachers[name], plan.paths.data / name
    for context in record.contexts:
        units = [u for u in plan.units(name) if u.context == context]
        commits, c = Commits(plan.paths, name, context), record.contexts.index(context)
        if units and all(commits.has(u.shard.number, u.layers, u.generation.number) for u in units):
            axes = {record.layers.index(k) for u in units for k in u.layers}
            for array in ("input_hash", "context_left", "context_right"):
                mirror.put_arrays(RawArray(group / array).files(c))
            for axis in sorted(axes):
                mirror.put_arrays(RawArray(group / "crc32c").files(c, axis))


class UnitMaker:
    """Makes units of work with a loaded teacher; one thread writes a batch while others run the next ones."""

    def __init__(
        self,
        plan: Plan,
        teacher: Teacher,
        rows: TeacherRows,
        scratch: Path,
        progress: Progress,
        report: Report | None = None,
    ) -> None:
        self.plan, self.teacher, self.rows, self.scratch = plan, teacher, rows, scratch
        self.progress, self.report = progress, report
        self.index = Index(plan.paths.data / "utterances", plan.edition(rows.record.name))
        self.session = np.asarray(self.index.session_of)
        self.texts = StoredTexts(rows, self.index.order)
        self.reuse = Reuse(plan, self.index)
        self._thread = ThreadPoolExecutor(1, "stillhouse-writer")
        self._writing: Future[None] | None = None
        self._threads = Threads(teacher)

    def __enter__(self) -> UnitMaker:
        self._threads.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.__exit__(*exc)
        self._thread.shutdown(wait=True)

    def make(self, unit: Unit, generation: int | None = None) -> bool:
        """Run a unit and commit it; the caller holds its lock. False where a commit was there before."""
        shard, g = unit.shard, unit.generation
        wanted = self.index.position[shard.first : shard.last]
        work = context_passes(self.plan, unit, self.texts, self.session, wanted)
        copies = self.reuse.copies(unit, work.input_hash)
        windows = without(work.windows, set(copies))
        ids = [self.index.id(u) for u in range(shard.first, shard.last)]
        starts, lengths = self.rows.start[shard.first : shard.last], self.rows.length[shard.first : shard.last]
        self.progress.unit = str(unit)
        record = self.plan.teachers[unit.teacher]
        with UnitWriter(self.plan.paths, self.scratch, record, unit, starts, lengths, ids) as writer:
            writer.leave_out(np.flatnonzero(wanted < 0))
            write_copies(writer, copies)
            self.progress.rows += int(lengths[wanted < 0].sum() + lengths[list(copies)].sum())
            try:
                self._run(writer, make_batches(windows, g.batch_tokens, g.batch_overhead_tokens), unit)
            finally:
                self._written()
            return writer.commit(
                work.input_hash,
                work.context_left,
                work.context_right,
                g.number if generation is None else generation,
            )

    def _written(self) -> None:
        """Wait for the batch that is being written, and raise what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _run(self, writer: UnitWriter, batches: list[list[Window]], unit: Unit) -> None:
        p = self.progress
        norms = {k: tensors(norm, self.teacher.device) for k, norm in self.norms(unit).items()}

        def keep(states: dict[int, torch.Tensor]) -> dict[int, np.ndarray | Quantised]:
            return {k: encode_tensor(v, writer.dtype, norms.get(k)) for k, v in states.items()}

        for part, host in self._threads.run(batches, unit.layers, keep, unit):
            p.model_s = self._threads.seconds / self._threads.count
            self._written()
            self._writing = self._thread.submit(_write_batch, writer, part, host)
            p.rows += sum(piece.last - piece.first for w in part for piece in w.pieces)
            p.fed_tokens += sum(len(w.ids) for w in part)
            p.padded_tokens += len(part) * max(len(w.ids) for w in part)
            if self.report is not None:
                self.report(p)

    def norms(self, unit: Unit) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """What standardises the states of an int8 store, by layer; fixed now where this is its first unit."""
        return fix_norms_first(self.plan, unit, self.sample, self.scratch) if self.rows.dtype.scaled else {}

    def sample(self, unit: Unit, rows: np.ndarray, layers: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """(row, {layer: float32 [n, D]}) of the rows' tokens in the unit's context, by parts."""
        work = context_passes(self.plan, unit, self.texts, self.session, self.index.position[rows])
        g = unit.generation

        def keep(states: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
            return {k: v.float().cpu().numpy() for k, v in states.items()}

        for batch in make_batches(work.windows, g.batch_tokens, g.batch_overhead_tokens):
            for part, states in forward(self.teacher, batch, layers, keep, unit):
                for row, window in enumerate(part):
                    for p in window.pieces:
                        kept = slice(p.at, p.at + p.last - p.first)
                        yield int(rows[p.utterance]), {k: block[row, kept] for k, block in states.items()}


def context_passes(
    plan: Plan, unit: Unit, texts: Texts, session: np.ndarray, wanted: Sequence[int] | np.ndarray
) -> Passes:
    """The windows that these utterances come out of, in the unit's context; `wanted` are positions in the corpus."""
    record, core = plan.teachers[unit.teacher], unit.generation.core_tokens
    return windows_of(record, unit.context, core, texts, session, wanted)


def _write_batch(writer: UnitWriter, batch: list[Window], states: dict[int, np.ndarray | Quantised]) -> None:
    for layer, block in states.items():
        for row, window in enumerate(batch):
            for piece in window.pieces:
                n = piece.last - piece.first
                writer.write(layer, piece.utterance, piece.first, block[row, piece.at : piece.at + n])


class StoredTexts:
    """Token ids of the utterances of a corpus, by position: `order` are their rows. A slice gives a list of arrays."""

    def __init__(self, rows: TeacherRows, order: np.ndarray) -> None:
        self._rows, self._order = rows, order

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        t = self._rows
        places = t.places(self._order[which])
        return np.split(t.tokens(t.token_id, places), places.into[1:])

"""Running an extraction: unit after unit until every view of the plan is complete.

Invariant: a unit is either committed or as if never begun, so the same command after any death goes on where the
last commit left off, and several of them share the work. Run: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from stillhouse.data.errors import StoreError
from stillhouse.data.manifest import Corpus

from .batches import make_batches
from .norms import fix_norms
from .ordering import Layout
from .plan import Request, make_plan
from .progress import Progress, Report, Summary, summarise
from .store.commits import Commits
from .store.files import Lock, Scratch
from .store.index import Index
from .store.layout import Dtype
from .store.plan import Plan, Unit
from .store.rows import TeacherRows
from .store.writer import UnitWriter
from .teacher import Teacher
from .windows import Frame, Passes, Texts, Window, parse_context, passes

if TYPE_CHECKING:
    import torch


def extract(
    root: Path,
    corpus: Corpus,
    teacher: Teacher,
    request: Request,
    report: Report | None = None,
    part: tuple[int, int] = (0, 1),
    helpers: Callable[[Plan], Helpers] | None = None,
    before: Callable[[Plan, Layout | None], None] | None = None,
) -> Summary:
    """Extract all that is asked for and not there yet; of `part` (i, n), only every n-th unit from the i-th on.

    `helpers` starts other processes once the plan is written (see workers.py); `before` sees a plan
    before its last generation is written, and may refuse. Errors: StaleError where the store
    was made with other settings; StoreError where a value is not finite or the disk is full.
    """
    plan = make_plan(root, corpus, teacher, request, before)
    progress = Progress()
    with Scratch(plan.paths) as scratch:
        crew = helpers(plan) if helpers is not None else None
        try:
            run_units(plan, request.name, teacher, scratch.folder, progress, report, part)
        finally:
            if crew is not None:
                crew.finish()
                progress.units, progress.rows = progress.units_todo, progress.rows_todo  # by all of us
        for context in plan.teachers[request.name].contexts:
            fix_norms(plan, request.name, context, scratch.folder)
    return summarise(plan, request.name, progress)


class Helpers(Protocol):
    """Processes that work on the same store; `finish` waits for them and raises what they raised."""

    def finish(self) -> None: ...


def run_units(
    plan: Plan,
    name: str,
    teacher: Teacher,
    scratch: Path,
    progress: Progress,
    report: Report | None = None,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Run every unit that is not committed. Those that another process holds are waited for at the end."""
    todo = []
    units = plan.units(name)[part[0] :: part[1]]
    progress.units_total = len(units)
    for unit in units:
        if committed(plan, unit):
            progress.units_found += 1
        else:
            todo.append(unit)
            progress.rows_total += unit.shard.rows
    progress.units_todo, progress.rows_todo = len(todo), progress.rows_total
    if not todo:
        return
    held: list[Unit] = []
    with UnitMaker(plan, teacher, TeacherRows(plan, name), scratch, progress, report) as maker:
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
                        maker.make(unit)
                        progress.units += 1


def committed(plan: Plan, unit: Unit) -> bool:
    commits = Commits(plan.paths, unit.teacher, unit.context)
    return commits.has(unit.shard.number, unit.layers, unit.generation.number)


class UnitMaker:
    """Makes units of work with a loaded teacher; one thread writes a batch while the model runs the next."""

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
        self.index = Index(plan.paths.data / "utterances")
        self.session = np.asarray(self.index.session)
        self.texts = StoredTexts(rows)
        self._thread = ThreadPoolExecutor(1, "stillhouse-writer")
        self._writing: Future[None] | None = None

    def __enter__(self) -> UnitMaker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown(wait=True)

    def make(self, unit: Unit, generation: int | None = None) -> bool:
        """Run a unit and commit it; the caller holds its lock. False where a commit was there before."""
        shard, g = unit.shard, unit.generation
        work = unit_passes(self.plan, unit, self.texts, self.session)
        ids = [self.index.id(u) for u in range(shard.first, shard.last)]
        starts, lengths = self.rows.start[shard.first : shard.last], self.rows.length[shard.first : shard.last]
        self.progress.unit = str(unit)
        record = self.plan.teachers[unit.teacher]
        with UnitWriter(self.plan.paths, self.scratch, record, unit, starts, lengths, ids) as writer:
            try:
                for batch in make_batches(work.windows, g.batch_tokens, g.batch_overhead_tokens):
                    self._run(writer, batch, unit.layers)
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

    def _run(self, writer: UnitWriter, batch: list[Window], layers: tuple[int, ...]) -> None:
        import torch

        began = time.perf_counter()
        try:
            states = self.teacher.states(batch, layers)
            host = {k: encode_tensor(v, writer.dtype) for k, v in states.items()}
        except torch.cuda.OutOfMemoryError as e:
            if len(batch) == 1:
                raise StoreError(
                    f"one window of {len(batch[0].ids)} tokens does not fit into the device's memory",
                    where=writer.unit,
                    remedy="give a smaller --window, or --model-dtype bfloat16",
                ) from e
            torch.cuda.empty_cache()
            half = len(batch) // 2
            self._run(writer, batch[:half], layers)
            self._run(writer, batch[half:], layers)
            return
        p = self.progress
        p.model_s += time.perf_counter() - began
        self._written()
        self._writing = self._thread.submit(_write_batch, writer, batch, host)
        p.rows += sum(piece.last - piece.first for w in batch for piece in w.pieces)
        p.fed_tokens += sum(len(w.ids) for w in batch)
        p.padded_tokens += len(batch) * max(len(w.ids) for w in batch)
        if self.report is not None:
            self.report(p)


def unit_passes(plan: Plan, unit: Unit, texts: Texts, session: np.ndarray) -> Passes:
    """The windows of a unit of work, from its plan and the tokens of the store."""
    t = plan.teachers[unit.teacher]
    core = unit.generation.core_tokens
    frame = Frame(t.prefix_ids, t.suffix_ids, t.join_ids, t.window, core, t.kind == "decoder")
    return passes(parse_context(unit.context), frame, texts, session, range(unit.shard.first, unit.shard.last))


def _write_batch(writer: UnitWriter, batch: list[Window], states: dict[int, np.ndarray]) -> None:
    for layer, block in states.items():
        for row, window in enumerate(batch):
            for piece in window.pieces:
                n = piece.last - piece.first
                writer.write(layer, piece.utterance, piece.first, block[row, piece.at : piece.at + n])


def encode_tensor(states: torch.Tensor, dtype: Dtype) -> np.ndarray:
    """States on any device → as stored, on the host; rounding is torch's (and writer.encode's): to nearest even."""
    import torch

    if dtype.logical == "bfloat16":
        return states.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return states.to(getattr(torch, dtype.logical)).cpu().contiguous().numpy()


class StoredTexts:
    """Token ids by utterance: a slice gives a list of arrays."""

    def __init__(self, rows: TeacherRows) -> None:
        self._rows = rows

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        t = self._rows
        places = t.places(which)
        return np.split(t.tokens(t.token_id, places), places.into[1:])

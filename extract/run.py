"""Running an extraction: unit after unit until every view of the plan is complete.

Invariant: a unit is either committed or as if never begun, so the same command after any death goes on where the
last commit left off, and several of them share the work. Run: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.data.errors import StoreError
from stillhouse.data.manifest import Corpus

from .batches import make_batches
from .norms import fix_norms
from .plan import Request, make_plan
from .store.commits import Commits
from .store.files import Lock, Scratch
from .store.index import Index
from .store.plan import Plan, Unit
from .store.reader import TeacherRows
from .store.writer import UnitWriter
from .teacher import Teacher
from .windows import Frame, Window, parse_context, passes


@dataclass
class Progress:
    """Where a run stands. Rows are tokens of text × contexts; fed tokens count specials and context, too."""

    units: int = 0
    units_total: int = 0
    units_found: int = 0  # committed before this run
    rows: int = 0
    rows_total: int = 0
    fed_tokens: int = 0
    padded_tokens: int = 0
    model_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    unit: str = ""

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self.started

    @property
    def tokens_per_s(self) -> float:
        return self.rows / max(self.wall_s, 1e-9)

    @property
    def padding_share(self) -> float:
        return 1 - self.fed_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def eta_s(self) -> float:
        return (self.rows_total - self.rows) / self.tokens_per_s if self.rows else float("nan")


@dataclass(frozen=True)
class Summary:
    """What a run did and what the store holds now."""

    store: str
    teacher: str
    views: list[str]
    utterances: int
    tokens: int
    units: int
    units_done_now: int
    rows_done_now: int
    fed_tokens: int
    tokens_per_s: float
    fed_tokens_per_s: float
    padding_share: float
    model_share: float
    wall_s: float
    store_bytes: int
    hidden_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Report = Callable[[Progress], None]


def extract(root: Path, corpus: Corpus, teacher: Teacher, request: Request, report: Report | None = None) -> Summary:
    """Extract all that is asked for and not there yet.

    Errors: StaleError where the store was made with other settings; StoreError where a value is not finite or the
    disk is full.
    """
    plan = make_plan(root, corpus, teacher, request)
    progress = Progress()
    with Scratch(plan.paths) as scratch:
        run_units(plan, request.name, teacher, scratch.folder, progress, report)
        for context in plan.teachers[request.name].contexts:
            fix_norms(plan, request.name, context, scratch.folder)
    return summarise(plan, request.name, progress)


def run_units(
    plan: Plan, name: str, teacher: Teacher, scratch: Path, progress: Progress, report: Report | None
) -> None:
    """Run every unit that is not committed. Those that another process holds are waited for at the end."""
    rows = TeacherRows(plan, name)
    maker = UnitMaker(plan, teacher, rows, scratch, progress, report)
    todo = []
    progress.units_total = len(plan.units(name))
    for unit in plan.units(name):
        if _committed(plan, unit):
            progress.units_found += 1
        else:
            todo.append(unit)
            progress.rows_total += unit.shard.rows
    held: list[Unit] = []
    for wait in (False, True):
        for unit in todo if not wait else held:
            lock = Lock(plan.paths.lock(unit.teacher, unit.context, unit.shard.number))
            if not lock.acquire(wait=wait):
                held.append(unit)
                continue
            with lock:
                if _committed(plan, unit):
                    progress.rows_total -= unit.shard.rows
                    progress.units_found += 1
                else:
                    maker.make(unit)
                    progress.units += 1
    if report is not None:
        report(progress)


def _committed(plan: Plan, unit: Unit) -> bool:
    commits = Commits(plan.paths, unit.teacher, unit.context)
    return commits.has(unit.shard.number, unit.layers, unit.generation.number)


class UnitMaker:
    """Makes units of work with a loaded teacher."""

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
        self.texts = _Texts(rows)

    def make(self, unit: Unit, generation: int | None = None) -> bool:
        """Run a unit and commit it; the caller holds its lock. False where a commit was there before."""
        record = self.plan.teachers[unit.teacher]
        shard, g = unit.shard, unit.generation
        frame = Frame(
            record.prefix_ids,
            record.suffix_ids,
            record.join_ids,
            record.window,
            g.core_tokens,
            record.kind == "decoder",
        )
        work = passes(parse_context(unit.context), frame, self.texts, self.session, shard.first, shard.last)
        ids = [self.index.id(u) for u in range(shard.first, shard.last)]
        starts, lengths = self.rows.start[shard.first : shard.last], self.rows.length[shard.first : shard.last]
        self.progress.unit = str(unit)
        with UnitWriter(self.plan.paths, self.scratch, record, unit, starts, lengths, ids) as writer:
            for batch in make_batches(work.windows, g.batch_tokens, g.batch_overhead_tokens):
                self._run(writer, batch, unit.layers)
            return writer.commit(
                work.input_hash,
                work.context_left,
                work.context_right,
                g.number if generation is None else generation,
            )

    def _run(self, writer: UnitWriter, batch: list[Window], layers: tuple[int, ...]) -> None:
        import torch

        began = time.perf_counter()
        try:
            states = self.teacher.states(batch, layers)
            host = {k: v.float().cpu().numpy() for k, v in states.items()}
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
        for layer, block in host.items():
            for row, window in enumerate(batch):
                for piece in window.pieces:
                    n = piece.last - piece.first
                    writer.write(layer, piece.utterance, piece.first, block[row, piece.at : piece.at + n])
        p.rows += sum(piece.last - piece.first for w in batch for piece in w.pieces)
        p.fed_tokens += sum(len(w.ids) for w in batch)
        p.padded_tokens += len(batch) * max(len(w.ids) for w in batch)
        if self.report is not None:
            self.report(p)


class _Texts:
    """Token ids by utterance: a slice gives a list of arrays."""

    def __init__(self, rows: TeacherRows) -> None:
        self._rows = rows

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        rows = self._rows
        return [rows.tokens(rows.token_id, np.array([u])) for u in range(which.start, which.stop)]


def folder_bytes(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            total += os.lstat(os.path.join(base, name)).st_size
    return total


def summarise(plan: Plan, name: str, progress: Progress) -> Summary:
    from .store.reader import Store

    store = Store.open(plan.paths.root)
    wall = progress.wall_s
    return Summary(
        store=str(plan.paths.root),
        teacher=name,
        views=[v.address for v in store.views if v.teacher == name],
        utterances=len(store.index),
        tokens=store.teacher(name).tokens,
        units=progress.units_total,
        units_done_now=progress.units,
        rows_done_now=progress.rows,
        fed_tokens=progress.fed_tokens,
        tokens_per_s=progress.rows / wall,
        fed_tokens_per_s=progress.fed_tokens / wall,
        padding_share=progress.padding_share,
        model_share=progress.model_s / wall,
        wall_s=wall,
        store_bytes=folder_bytes(plan.paths.root),
        hidden_bytes=folder_bytes(plan.paths.data / name / "hidden"),
    )

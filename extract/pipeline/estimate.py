"""Estimate an extraction: tokens, work items, bytes, free disk, and time measured on a few batches.

Guarantees: nothing is written. Bytes are those that the layout will take, not an approximation.
Try: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import StoreError
from ...data.manifest import Corpus
from ..store.disk.files import StoreFiles
from ..store.disk.layout import dtype_of, shard_bytes
from ..store.format.index import Index
from ..store.format.int8 import SCALE_BYTES
from ..store.format.plan import Plan, TeacherRecord, WorkItem
from ..store.read.rows import TeacherRows
from ..store.storage import open_files
from ..teacher.batching import make_batches
from ..teacher.model import Teacher
from ..teacher.replicas import TeacherPool
from .corpus_diff import CorpusTexts, split_tokens, windows_of
from .generation import PlanDraft, draft_plan
from .layout import Layout
from .progress import split_committed
from .request import Request, choose_space, teacher_record

PROBED_BATCHES = 6


@dataclass(frozen=True)
class Sizing:
    """What an extraction will take. Bytes are those still to be written, and units are work items."""

    store: str
    teacher: str
    utterances: int
    tokens: int
    longest_tokens: int
    units: int
    units_missing: int
    bytes_per_view: dict[str, int]
    other_bytes: int
    bytes: int
    free_bytes: int
    fed_tokens: int
    fed_tokens_per_s: float | None  # None: nothing was measured
    seconds: float | None
    warnings: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.free_bytes

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def size_up(
    store: str | Path | StoreFiles,
    corpus: Corpus,
    teacher: Teacher,
    request: Request,
    measure: bool = True,
    refresh: bool = False,
) -> Sizing:
    """Return what `extract` with the same arguments would take. With `measure`, the model runs a few batches.

    Raises StaleError if the store was made with other settings or from other texts.
    """
    files = open_files(store)
    teacher = choose_space(teacher, request, files)
    record = teacher_record(teacher, request)
    draft = draft_plan(files, corpus, teacher, record, request, refresh)
    plan = draft.plan
    record = plan.teachers[record.name]
    drafted = _DraftedCorpus(draft, record.name)
    other = other_bytes(plan, draft.layout) if draft.new else 0
    items = plan.work_items(record.name)
    _, missing = split_committed(plan, items)
    per_view = view_bytes(record, missing)
    fed, speed, seconds = _measure(plan, teacher, missing, drafted) if measure and missing else (0, None, None)
    return Sizing(
        store=files.address,
        teacher=record.name,
        utterances=len(drafted.length),
        tokens=int(drafted.length.sum()),
        longest_tokens=int(drafted.length.max()),
        units=len(items),
        units_missing=len(missing),
        bytes_per_view=per_view,
        other_bytes=other,
        bytes=sum(per_view.values()) + other,
        free_bytes=files.free_bytes(),
        fed_tokens=fed,
        fed_tokens_per_s=speed,
        seconds=seconds,
        warnings=draft.warnings,
    )


class _DraftedCorpus:
    """The corpus of a draft in its order: `texts`, `session` and `length`; and `position` by row, or -1."""

    def __init__(self, draft: PlanDraft, name: str) -> None:
        plan, layout, new_rows = draft.plan, draft.layout, draft.new_rows
        if new_rows is not None:
            order, self.session, count = new_rows.order, new_rows.session, new_rows.first + len(new_rows.ids)
        elif layout is not None and len(plan.generations) == 1:
            order, self.session, count = np.arange(len(layout.ids)), layout.session, len(layout.ids)
        else:
            index = Index(plan.paths, plan.edition(name))
            order, self.session, count = index.order, index.session_of, len(index)
        self.position = np.full(count, -1)
        self.position[order] = np.arange(len(order))
        # Rows from `first` on are not on disk yet, and the draft has their tokens.
        first = 0 if layout is not None else count if new_rows is None else new_rows.first
        tokens = layout.tokens if layout is not None else None if new_rows is None else new_rows.tokens
        teacher_rows = None if layout is not None else TeacherRows(plan, name)
        stored = np.where(order < first, order, -1)
        self.length = np.zeros(len(order), np.int64)
        if teacher_rows is not None:
            self.length[stored >= 0] = teacher_rows.length[stored[stored >= 0]]
        if tokens is not None:
            self.length[stored < 0] = tokens.length[order[stored < 0] - first]
        new = {} if tokens is None else split_tokens(tokens, self.position[first:].tolist())
        self.texts = CorpusTexts(stored, teacher_rows, new)


def view_bytes(record: TeacherRecord, items: list[WorkItem]) -> dict[str, int]:
    """Return the bytes of `hidden`, and of `scale` in int8 stores, that work items take, by view."""
    dtype = dtype_of(record.dtype)
    arrays = [record.width * dtype.bytes] + ([SCALE_BYTES] if dtype.scaled else [])
    per_view: dict[str, int] = {}
    for item in items:
        for layer in item.layers:
            address = f"{record.name}/{item.context}/{layer}"
            size = sum(shard_bytes(item.shard.rows, item.generation.shard_rows, row_bytes) for row_bytes in arrays)
            per_view[address] = per_view.get(address, 0) + size
    return per_view


def check_disk_space(draft: PlanDraft) -> None:
    """Raise StoreError if the disk cannot hold the last generation of a draft."""
    plan = draft.plan
    if not plan.paths.files.fills_disk:
        return  # An object store has space, and a writer keeps one work item at a time on the disk.
    last = plan.generations[-1]
    items = [item for item in plan.work_items(last.teacher) if item.generation is last]
    need = sum(view_bytes(plan.teachers[last.teacher], items).values()) + other_bytes(plan, draft.layout)
    free = plan.paths.files.free_bytes()
    if need > free:
        raise StoreError(
            f"{need / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are free",
            where=plan.paths.root,
            remedy="free disk space, ask for fewer layers or contexts, or give --force to start anyway",
        )


def other_bytes(plan: Plan, layout: Layout | None) -> int:
    """Return the bytes that the last generation adds beside `hidden`: hashes, and tokens of a new teacher."""
    g = plan.generations[-1]
    record = plan.teachers[g.teacher]
    u, c = plan.corpus["utterances"], len(g.work)
    sums = (16 * c + 4 * sum(len(w.layers) for w in g.work)) * u + 50_000
    if layout is None:
        return sums
    tokens = 12 * len(layout.shards) * layout.shard_rows
    index = (8 + 8 + 4 + 8 + 4 + 8 + 4) * u + sum(len(i.encode()) for i in layout.ids)
    return sums + tokens + index + len(np.unique(layout.tokens.ids)) * (4 + 10 + 2 * record.width)


def _measure(plan: Plan, teacher: Teacher, items: list[WorkItem], drafted: _DraftedCorpus) -> tuple[int, float, float]:
    """(tokens that the model will read, tokens a second, seconds), from a few batches of one item of each context."""
    fed_total, seconds_total = 0.0, 0.0
    for context in dict.fromkeys(item.context for item in items):
        same = [item for item in items if item.context == context]
        item = same[len(same) // 2]
        positions = drafted.position[item.shard.first : item.shard.last]
        record, core_tokens = plan.teachers[item.teacher], item.generation.core_tokens
        windows = windows_of(record, context, core_tokens, drafted.texts, drafted.session, positions)
        batches = make_batches(windows.windows, item.generation.batch_tokens, item.generation.batch_overhead_tokens)
        if not batches:
            continue
        chosen = [batches[i] for i in np.unique(np.linspace(0, len(batches) - 1, PROBED_BATCHES).round().astype(int))]
        with TeacherPool(teacher) as threads:
            for warm in (False, True):  # the first calls of a thread are slower
                began = time.perf_counter()
                probed = chosen if warm else chosen[:1] * threads.count
                list(threads.run(probed, item.layers, lambda s: [v.float().cpu() for v in s.values()][:0], item))
        speed = sum(len(w.ids) for b in chosen for w in b) / (time.perf_counter() - began)
        fed = windows.tokens * sum(i.shard.rows for i in same) / max(1, item.shard.rows)
        fed_total, seconds_total = fed_total + fed, seconds_total + fed / speed
    return int(fed_total), fed_total / max(seconds_total, 1e-9), seconds_total


def render(s: Sizing) -> str:
    """Return an estimate as text."""
    views = [f"  {address:<32} {size / 1e6:>12,.1f} MB" for address, size in s.bytes_per_view.items()]
    lines = [
        f"corpus       {s.utterances:,} utterances, {s.tokens:,} tokens of {s.teacher}, longest {s.longest_tokens:,}",
        f"work items   {s.units_missing} of {s.units} to do",
        *views,
        f"to write     {s.bytes / 1e6:,.1f} MB, of which tokens, index and vocabulary {s.other_bytes / 1e6:,.1f} MB",
        f"free         {s.free_bytes / 1e6:,.1f} MB: {'enough' if s.fits else 'NOT ENOUGH'}",
    ]
    if s.seconds is not None:
        lines.append(
            f"time         about {s.seconds / 60:,.1f} min ({s.fed_tokens:,} tokens fed, {s.fed_tokens_per_s:,.0f} a "
            f"second, one process, {os.cpu_count()} cores)"
        )
    return "\n".join([*lines, *(f"warning      {warning}" for warning in s.warnings)])

"""What an extraction will cost: tokens, units, bytes, free disk, and time measured on a few batches.

Invariant: nothing is written; bytes are what the layout will really take, not an estimate.
Run: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import StoreError
from ...data.manifest import Corpus
from ..store.disk.layout import dtype_of, shard_bytes
from ..store.format.index import Index
from ..store.format.int8 import SCALE_BYTES
from ..store.format.plan import Plan, WorkItem
from ..store.format.plan import TeacherRecord as Record
from ..store.read.rows import TeacherRows
from ..store.remote.paths import address_of, mirror_of
from ..teacher.batching import make_batches
from ..teacher.contexts import TokenLists
from ..teacher.model import Teacher
from ..teacher.replicas import TeacherPool
from ..teacher.tokenizer import Tokens
from .corpus_diff import PlannedTexts, split_tokens
from .extract import committed
from .generation import PlanDraft
from .layout import Layout
from .request import Request, next_plan, teacher_record
from .runner import StoredTexts, context_passes

PROBED_BATCHES = 6


@dataclass(frozen=True)
class Sizing:
    """Bytes are those still to be written. `seconds` is None where nothing was measured."""

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
    fed_tokens_per_s: float | None
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.bytes <= self.free_bytes

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


class _Corpus:
    """The corpus of a plan that may not be on disk yet, in its order: `texts`, `session`, `length`; and `position` by
    row, -1 for one that is dead.
    """

    def __init__(self, draft: PlanDraft, name: str) -> None:
        plan, layout, growth = draft.plan, draft.layout, draft.new_rows
        if growth is not None:
            order, self.session, count = growth.order, growth.session, growth.first + len(growth.ids)
        elif layout is not None and len(plan.generations) == 1:
            order, self.session, count = np.arange(len(layout.ids)), layout.session, len(layout.ids)
        else:
            index = Index(plan.paths.data / "utterances", plan.edition(name))
            order, self.session, count = index.order, index.session_of, len(index)
        self.position = np.full(count, -1)
        self.position[order] = np.arange(len(order))
        if layout is not None:
            self.texts: TokenLists = _Tokens(layout.tokens, order)
            self.length = layout.tokens.length[order]
        elif growth is None:
            rows = TeacherRows(plan, name)
            self.texts, self.length = StoredTexts(rows, order), np.asarray(rows.length)[order]
        else:
            rows, tokens = TeacherRows(plan, name), growth.tokens
            assert tokens is not None
            old = np.where(order < growth.first, order, -1)
            more = np.flatnonzero(old < 0)
            self.texts = PlannedTexts(rows, old, split_tokens(tokens, more.tolist()))
            self.length = np.asarray(rows.length)[np.maximum(old, 0)]
            self.length[more] = tokens.length


class _Tokens:
    """Token ids of a layout that is not on disk yet, by position: a slice gives a list of arrays."""

    def __init__(self, tokens: Tokens, order: np.ndarray) -> None:
        self._ids, self._length, self._order = tokens.ids, tokens.length, order
        self._end = np.cumsum(tokens.length)

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        rows = self._order[which]
        return [self._ids[e - n : e] for e, n in zip(self._end[rows].tolist(), self._length[rows].tolist())]


def size_up(
    root: Path, corpus: Corpus, teacher: Teacher, request: Request, measure: bool = True, refresh: bool = False
) -> Sizing:
    """Errors: as `run.extract` has before it starts."""
    record = teacher_record(teacher, request)
    draft = next_plan(root, corpus, teacher, record, request, refresh)
    plan = draft.plan
    record = plan.teachers[record.name]
    known = _Corpus(draft, record.name)
    other = other_bytes(plan, draft.layout) if draft.new else 0
    items = plan.work_items(record.name)
    todo = [u for u in items if not committed(plan, u)]
    per_view = view_bytes(record, todo)
    fed, speed, seconds = _measure(plan, teacher, todo, known) if measure and todo else (0, None, None)
    return Sizing(
        store=str(address_of(root)),
        teacher=record.name,
        utterances=len(known.length),
        tokens=int(known.length.sum()),
        longest_tokens=int(known.length.max()),
        units=len(items),
        units_missing=len(todo),
        bytes_per_view=per_view,
        other_bytes=other,
        bytes=sum(per_view.values()) + other,
        free_bytes=free_bytes(root),
        fed_tokens=fed,
        fed_tokens_per_s=speed,
        seconds=seconds,
    )


def view_bytes(record: Record, items: list[WorkItem]) -> dict[str, int]:
    """Bytes of `hidden`, and of int8's `scale`, that units will take, by view."""
    dtype = dtype_of(record.dtype)
    arrays = [record.width * dtype.bytes] + ([SCALE_BYTES] if dtype.scaled else [])
    out: dict[str, int] = {}
    for u in items:
        for layer in u.layers:
            address = f"{record.name}/{u.context}/{layer}"
            size = sum(shard_bytes(u.shard.rows, u.generation.shard_rows, row_bytes) for row_bytes in arrays)
            out[address] = out.get(address, 0) + size
    return out


def check_room(plan: Plan, layout: Layout | None) -> None:
    """For `run.extract`. Errors: StoreError where the disk has no room for a plan's last generation."""
    if mirror_of(plan.paths.root) is not None:
        return  # a bucket has room; of the disk, a writer takes a unit at a time
    last = plan.generations[-1]
    items = [u for u in plan.work_items(last.teacher) if u.generation is last]
    need = sum(view_bytes(plan.teachers[last.teacher], items).values()) + other_bytes(plan, layout)
    free = free_bytes(plan.paths.root)
    if need > free:
        raise StoreError(
            f"{need / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are free",
            where=plan.paths.root,
            remedy="make room, ask for fewer layers or contexts, or start all the same with --force",
        )


def free_bytes(root: Path) -> int:
    """Free room on the disk where `root` is or will be."""
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def other_bytes(plan: Plan, layout: Layout | None) -> int:
    """All but `hidden` that the last generation adds: checksums and hashes, and for a new teacher tokens, index and
    embedding.
    """
    g = plan.generations[-1]
    record = plan.teachers[g.teacher]
    u, c = plan.corpus["utterances"], len(g.work)
    sums = (16 * c + 4 * sum(len(w.layers) for w in g.work)) * u + 50_000
    if layout is None:
        return sums
    tokens = 12 * len(layout.shards) * layout.shard_rows
    index = (8 + 8 + 4 + 8 + 4 + 8 + 4) * u + sum(len(i.encode()) for i in layout.ids)
    return sums + tokens + index + len(np.unique(layout.tokens.ids)) * (4 + 10 + 2 * record.width)


def _measure(plan: Plan, teacher: Teacher, todo: list[WorkItem], known: _Corpus) -> tuple[int, float, float]:
    """(tokens to be fed, fed tokens a second, seconds), from a few batches of one unit of each context."""
    fed_total, seconds_total = 0.0, 0.0
    for context in dict.fromkeys(u.context for u in todo):
        mine = [u for u in todo if u.context == context]
        item = mine[len(mine) // 2]
        wanted = known.position[item.shard.first : item.shard.last]
        work = context_passes(plan, item, known.texts, known.session, wanted)
        batches = make_batches(work.windows, item.generation.batch_tokens, item.generation.batch_overhead_tokens)
        if not batches:
            continue
        chosen = [batches[i] for i in np.unique(np.linspace(0, len(batches) - 1, PROBED_BATCHES).round().astype(int))]
        with TeacherPool(teacher) as threads:
            for first in (True, False):  # the first calls pay for what later ones find ready
                began = time.perf_counter()
                some = chosen[:1] * threads.count if first else chosen
                list(threads.run(some, item.layers, lambda s: [v.float().cpu() for v in s.values()][:0], item))
        speed = sum(len(w.ids) for b in chosen for w in b) / (time.perf_counter() - began)
        fed = work.tokens * sum(u.shard.rows for u in mine) / max(1, item.shard.rows)
        fed_total, seconds_total = fed_total + fed, seconds_total + fed / speed
    return int(fed_total), fed_total / max(seconds_total, 1e-9), seconds_total


def render(s: Sizing) -> str:
    """For people."""
    views = [f"  {address:<32} {size / 1e6:>12,.1f} MB" for address, size in s.bytes_per_view.items()]
    lines = [
        f"corpus       {s.utterances:,} utterances, {s.tokens:,} tokens of {s.teacher}, longest {s.longest_tokens:,}",
        f"units        {s.units_missing} of {s.units} to do",
        *views,
        f"to write     {s.bytes / 1e6:,.1f} MB, of which tokens, index and vocabulary {s.other_bytes / 1e6:,.1f} MB",
        f"free         {s.free_bytes / 1e6:,.1f} MB: {'enough' if s.fits else 'NOT ENOUGH'}",
    ]
    if s.seconds is not None:
        lines.append(
            f"time         about {s.seconds / 60:,.1f} min ({s.fed_tokens:,} tokens fed, {s.fed_tokens_per_s:,.0f} a "
            f"second, one process, {os.cpu_count()} cores)"
        )
    return "\n".join(lines)

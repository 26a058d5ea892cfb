"""What a run tells while it goes on, and what it has done at its end.

Invariant: facts only; commands.py renders them. Run: `stillhouse extract CORPUS STORE --teacher … --json`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from ..store.disk.durable import Lock
from ..store.format.commits import Commits
from ..store.format.plan import Plan, read_plan
from ..store.reader import Store
from ..store.remote.paths import address_of, mirror_of


@dataclass(frozen=True)
class ItemOutcome:
    """What another process has done: units, their rows, tokens fed and padded."""

    units: int = 0
    rows: int = 0
    fed_tokens: int = 0
    padded_tokens: int = 0

    def __add__(self, other: ItemOutcome) -> ItemOutcome:
        return ItemOutcome(*(a + b for a, b in zip(astuple(self), astuple(other))))


@dataclass
class ExtractionProgress:
    """Where a run stands. Rows are tokens of text × contexts; fed tokens count specials and context, too."""

    units: int = 0
    units_total: int = 0
    units_found: int = 0  # committed before this run, or by another process
    units_todo: int = 0  # not committed when this run began
    rows_todo: int = 0
    rows: int = 0
    rows_total: int = 0
    fed_tokens: int = 0
    padded_tokens: int = 0
    model_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    item: str = ""

    @property
    def outcome(self) -> ItemOutcome:
        return ItemOutcome(self.units, self.rows, self.fed_tokens, self.padded_tokens)

    def add(self, other: ItemOutcome) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

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


Report = Callable[[ExtractionProgress], None]


def folder_bytes(folder: Path) -> int:
    mirror = mirror_of(folder)
    if mirror is not None:
        return sum(mirror.sizes(folder).values())
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            total += os.lstat(os.path.join(base, name)).st_size
    return total


def summarise(plan: Plan, name: str, progress: ExtractionProgress) -> Summary:
    store = Store.open(plan.paths.root)
    wall = progress.wall_s
    return Summary(
        store=str(address_of(plan.paths.root)),
        teacher=name,
        views=[v.address for v in store.views if v.teacher == name],
        utterances=len(store.utterance_ids),
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
        hidden_bytes=sum(folder_bytes(plan.paths.data / name / array) for array in ("hidden", "scale")),
    )


@dataclass(frozen=True)
class ContextStatus:
    """Units and tokens of one (teacher, context) and its layers."""

    teacher: str
    context: str
    layers: list[int]
    units: int
    done: int
    running: int
    missing: int
    tokens: int
    tokens_done: int
    complete: bool  # norms too


@dataclass(frozen=True)
class Status:
    """All of a store."""

    store: str
    contexts: list[ContextStatus]

    @property
    def complete(self) -> bool:
        return all(c.complete for c in self.contexts)

    def as_json(self) -> dict[str, Any]:
        return {"store": self.store, "complete": self.complete, "contexts": [asdict(c) for c in self.contexts]}


def status(root: Path) -> Status:
    """Errors: NoStoreError where there is no store."""
    plan = read_plan(root)
    out = []
    for teacher in plan.teachers:
        items = plan.work_items(teacher)
        for context in dict.fromkeys(u.context for u in items):
            mine = [u for u in items if u.context == context]
            layers = sorted({k for u in mine for k in u.layers})
            commits = Commits(plan.paths, teacher, context)
            done = [u for u in mine if commits.has(u.shard.number, u.layers, u.generation.number)]
            rest = [u for u in mine if u not in done]
            running = sum(_held(plan.paths.lock(teacher, context, u.shard.number)) for u in rest)
            out.append(
                ContextStatus(
                    teacher=teacher,
                    context=context,
                    layers=layers,
                    units=len(mine),
                    done=len(done),
                    running=running,
                    missing=len(rest) - running,
                    tokens=sum(u.shard.rows for u in mine),
                    tokens_done=sum(u.shard.rows for u in done),
                    complete=not rest and commits.has("norms", layers),
                )
            )
    return Status(str(root), out)


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    lock = Lock(path)
    free = lock.acquire()
    lock.release()
    return not free


def render_status(s: Status) -> str:
    """For people."""
    lines = [f"{s.store}: {'complete' if s.complete else 'not complete'}"]
    for c in s.contexts:
        state = "complete" if c.complete else f"{c.done} done, {c.running} running, {c.missing} missing"
        layers = ",".join(map(str, c.layers))
        lines.append(
            f"{c.teacher}/{c.context}/{layers}  {state} of {c.units} units, {c.tokens_done:,} of {c.tokens:,} tokens"
        )
    return "\n".join(lines)

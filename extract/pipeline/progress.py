"""The progress of a run, its summary, and the status of a store.

Guarantees: facts only, which commands render. Asking for a status loads and writes nothing. A work item is running
while a process holds its lock.
Try: `stillhouse extract CORPUS STORE --status`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data.files.lock import FileLock
from ..store.disk.files import StoreFiles
from ..store.format.commits import Commits
from ..store.format.plan import Plan, WorkItem
from ..store.reader import Store
from ..store.storage import open_files
from ..store.verify.stale import behind, behind_text, uncompared_text
from ..teacher.passes import SPEECH_WORDS, passes_of


@dataclass
class ExtractionProgress:
    """The progress of a run. Rows are tokens of text times contexts; fed tokens include special ones and context.

    Of a speech teacher, both are frames, of which there are `frame_hz` in a second.
    """

    items: int = 0
    items_total: int = 0
    rows: int = 0
    rows_total: int = 0
    fed_tokens: int = 0
    padded_tokens: int = 0
    model_s: float = 0.0  # that the model has run
    worker_s: float = 0.0  # that work items were run, over all workers
    started: float = field(default_factory=time.perf_counter)
    item: str = ""
    frame_hz: float = 0.0

    def add(self, other: ExtractionProgress) -> None:
        """Add what another process has done."""
        for name in ("items", "rows", "fed_tokens", "padded_tokens", "model_s", "worker_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self.started

    @property
    def tokens_per_s(self) -> float:
        return self.rows / max(self.wall_s, 1e-9)

    @property
    def real_time(self) -> float:
        """Seconds of audio that a second computes, of a speech teacher."""
        return self.tokens_per_s / self.frame_hz

    @property
    def padding_share(self) -> float:
        return 1 - self.fed_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def eta_s(self) -> float:
        return (self.rows_total - self.rows) / self.tokens_per_s if self.rows else float("nan")


OnProgress = Callable[[ExtractionProgress], None]


@dataclass(frozen=True)
class Summary:
    """What a run did, and what the store has now. A unit is a work item."""

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
    passes: str = ""  # how texts shared batches, in words
    axis: str = "token"  # what all numbers of tokens count: "token" or "frame"
    audio_s: float | None = None  # of a speech teacher: seconds of all utterances, to whole frames
    real_time: float | None = None  # of a speech teacher: seconds of audio that this run did in a second

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rows_text(rows: int, rate_hz: float) -> str:
    """Return a number of tokens, or of frames at a rate that is not 0, for people."""
    return f"{rows / rate_hz / 3600:,.2f} h of audio in {rows:,} frames" if rate_hz else f"{rows:,} tokens"


def summarise(plan: Plan, name: str, progress: ExtractionProgress) -> Summary:
    """Return the summary of a run of the teacher `name`."""
    files, data, wall = plan.paths.files, plan.paths.data / name, progress.wall_s
    store, record = Store.open(files), plan.teachers[name]
    tokens = store.teacher(name).tokens
    return Summary(
        store=store.address,
        teacher=name,
        views=[v.address for v in store.views if v.teacher == name],
        utterances=len(store.utterance_ids),
        tokens=tokens,
        units=progress.items_total,
        units_done_now=progress.items,
        rows_done_now=progress.rows,
        fed_tokens=progress.fed_tokens,
        tokens_per_s=progress.rows / wall,
        fed_tokens_per_s=progress.fed_tokens / wall,
        padding_share=progress.padding_share,
        model_share=progress.model_s / progress.worker_s if progress.worker_s else 0.0,
        wall_s=wall,
        store_bytes=folder_bytes(files, files.root),
        hidden_bytes=sum(folder_bytes(files, data / array) for array in ("hidden", "code", "scale")),
        passes=SPEECH_WORDS if record.is_speech else passes_of(plan, name).words,
        axis=record.axis,
        audio_s=tokens / record.rate_hz if record.is_speech else None,
        real_time=progress.rows / wall / record.rate_hz if record.is_speech else None,
    )


def folder_bytes(files: StoreFiles, folder: Path) -> int:
    """Return the bytes of all files in a folder of a store."""
    return sum(size for _, size in files.sizes(folder))


def split_committed(plan: Plan, items: Iterable[WorkItem]) -> tuple[list[WorkItem], list[WorkItem]]:
    """Return the work items of one teacher that are committed now, and the others."""
    records: dict[str, Commits] = {}
    committed: list[WorkItem] = []
    others: list[WorkItem] = []
    for item in items:
        if item.context not in records:
            records[item.context] = Commits(plan.paths, item.teacher, item.context)
        done = records[item.context].has(item.shard.number, item.layers, item.generation.number)
        (committed if done else others).append(item)
    return committed, others


@dataclass(frozen=True)
class ContextStatus:
    """Units, which are work items, and tokens of one teacher's context and its layers. Only what is served counts."""

    teacher: str
    context: str
    layers: list[int]
    units: int
    done: int
    running: int
    missing: int
    tokens: int
    tokens_done: int
    complete: bool  # with norms
    rate_hz: float = 0.0  # frames in a second, where tokens are frames of a speech teacher


@dataclass(frozen=True)
class Status:
    """The status of a store."""

    store: str
    contexts: list[ContextStatus]
    behind: dict[str, int] = field(default_factory=dict)  # see `behind` in extract/store/verify/stale.py
    uncompared: list[str] = field(default_factory=list)  # teachers of which an earlier version did not try batches

    @property
    def complete(self) -> bool:
        return all(c.complete for c in self.contexts)

    def as_json(self) -> dict[str, Any]:
        return {"complete": self.complete, **asdict(self)}


def status(root: Path) -> Status:
    """Return the status of a store. Raises NoStoreError if there is none."""
    store = Store.open(open_files(root))
    plan, contexts = store.plan, []
    for teacher in plan.teachers:
        lengths = store.lengths(teacher)

        def tokens(items: Iterable[WorkItem], lengths: np.ndarray = lengths) -> int:
            return sum(int(lengths[s.first : s.last].sum()) for s in {i.shard for i in items})

        for context, layers in plan.views(teacher).items():
            items = [item for item in plan.work_items(teacher) if item.context == context]
            done, rest = split_committed(plan, items)
            running = sum(_is_locked(plan.paths.lock(teacher, context, item.shard.number)) for item in rest)
            contexts.append(
                ContextStatus(
                    teacher=teacher,
                    context=context,
                    layers=sorted(layers),
                    units=len(items),
                    done=len(done),
                    running=running,
                    missing=len(rest) - running,
                    tokens=tokens(items),
                    tokens_done=tokens(items) - tokens(rest),
                    complete=not rest and Commits(plan.paths, teacher, context).has("norms", layers),
                    rate_hz=plan.teachers[teacher].rate_hz,
                )
            )
    uncompared = [name for name in plan.teachers if not plan.is_compared(name)]
    return Status(str(root), contexts, behind(store), uncompared)


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    lock = FileLock(path)
    free = lock.acquire()
    lock.release()
    return not free


def render_status(s: Status) -> str:
    """Return a status as text."""
    lines = [f"{s.store}: {'complete' if s.complete else 'not complete'}"]
    for c in s.contexts:
        state = "complete" if c.complete else f"{c.done} done, {c.running} running, {c.missing} missing"
        view = f"{c.teacher}/{c.context}/{','.join(map(str, c.layers))}"
        done = f"{c.tokens_done / c.rate_hz / 3600:,.2f}" if c.rate_hz else f"{c.tokens_done:,}"
        state += f" of {c.units} work items, {done} of {rows_text(c.tokens, c.rate_hz)}"
        lines.append(f"{view}  {state}" if len(view) + len(state) < 79 else f"{view}\n  {state}")
    lines += [behind_text(*of) for of in s.behind.items()]
    return "\n".join([*lines, *map(uncompared_text, s.uncompared)])

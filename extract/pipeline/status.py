"""How far a store is: done, running and missing units of work.

Invariant: nothing is loaded and nothing is written; what is running is what a living process has locked.
Run: `stillhouse extract CORPUS STORE --status`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..store.disk.durable import Lock
from ..store.format.commits import Commits
from ..store.format.plan import read_plan


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


def render(s: Status) -> str:
    """For people."""
    lines = [f"{s.store}: {'complete' if s.complete else 'not complete'}"]
    for c in s.contexts:
        state = "complete" if c.complete else f"{c.done} done, {c.running} running, {c.missing} missing"
        layers = ",".join(map(str, c.layers))
        lines.append(
            f"{c.teacher}/{c.context}/{layers}  {state} of {c.units} units, {c.tokens_done:,} of {c.tokens:,} tokens"
        )
    return "\n".join(lines)

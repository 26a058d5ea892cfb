"""Running an extraction: unit after unit until every view of the plan is complete.

Invariant: a unit is either committed or as if never begun, so the same command after any death goes on where the
last commit left off, and several of them share the work. Run: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ...data.manifest import Corpus
from ..store.disk.durable import Lock, Scratch
from ..store.format.arrays import RawArray
from ..store.format.commits import Commits
from ..store.format.plan import Plan, WorkItem, read_plan
from ..store.read.rows import TeacherRows
from ..store.remote.paths import mirror_of, retry_plan, writable_copy
from ..teacher.model import Teacher
from .layout import Layout
from .norms import fix_norms
from .progress import ExtractionProgress, ItemOutcome, Report, Summary, summarise
from .request import Request, make_plan
from .runner import ItemRunner, LockedItem


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
    maker: Callable[..., ItemRunner] | None = None,
) -> Summary:
    """Extract all that is asked for and not there yet; of `part` (i, n), only every n-th unit from the i-th on;
    None: `helpers` do all of it.

    `helpers` starts other processes once the plan is written (see workers.py); `before` sees a plan before its last
    generation is written, and may refuse; `refresh`: replace and drop what the corpus no longer says.
    Errors: StaleError where the store was made with other settings or from other texts; StoreError where a value is
    not finite or the disk is full.
    """
    with writable_copy(root) as folder:
        plan = retry_plan(folder, lambda: make_plan(folder, corpus, teacher, request, before, refresh))
        progress = ExtractionProgress()
        with Scratch(plan.paths) as scratch:
            plan = read_plan(folder)  # as it is now that we are seen to write (see store/exclusive.py)
            crew = helpers(plan) if helpers is not None else None
            try:
                if part is None:
                    progress.units_total = len(plan.work_items(request.name))
                else:
                    run_work_items(plan, request.name, teacher, scratch.folder, progress, report, part, maker)
            finally:
                if crew is not None:
                    progress.add(crew.finish())
            for context in plan.teachers[request.name].contexts:
                fix_norms(plan, request.name, context, scratch.folder)
        share_arrays(plan, request.name)
        return summarise(plan, request.name, progress)


class Helpers(Protocol):
    """Processes that work on the same store; `finish` waits for them, tells what they did, raises what they raised."""

    def finish(self) -> ItemOutcome: ...


def run_work_items(
    plan: Plan,
    name: str,
    teacher: Teacher,
    scratch: Path,
    progress: ExtractionProgress,
    report: Report | None = None,
    part: tuple[int, int] = (0, 1),
    maker: Callable[..., ItemRunner] | None = None,
) -> None:
    """Run every unit that is not committed. Those that another process holds are waited for at the end."""
    todo = []
    items = plan.work_items(name)[part[0] :: part[1]]
    progress.units_total = len(items)
    known = {c: Commits(plan.paths, name, c) for c in dict.fromkeys(u.context for u in items)}
    for item in items:
        if known[item.context].has(item.shard.number, item.layers, item.generation.number):
            progress.units_found += 1
        else:
            todo.append(item)
            progress.rows_total += item.shard.rows
    progress.units_todo, progress.rows_todo = len(todo), progress.rows_total
    if not todo:
        return
    if mirror_of(plan.paths.root) is not None:  # no locks there: writers begin in different places
        first = random.SystemRandom().randrange(len(todo))
        todo = todo[first:] + todo[:first]
    held: list[WorkItem] = []

    def claims(items: Sequence[WorkItem], wait: bool) -> Iterator[LockedItem]:
        for item in items:
            lock = Lock(plan.paths.lock(item.teacher, item.context, item.shard.number))
            if not lock.acquire(wait=wait):
                held.append(item)
                continue
            try:
                there = committed(plan, item)
            except BaseException:
                lock.release()
                raise
            if there:
                lock.release()
                progress.rows_total -= item.shard.rows
                progress.units_found += 1
            else:
                yield LockedItem(item, lock)

    with (maker or ItemRunner)(plan, teacher, TeacherRows(plan, name), scratch, progress, report) as making:
        making.run_items(claims(todo, wait=False))
        for item in held:  # one by one: who waits for another must not hold what that one waits for
            making.run_items(claims([item], wait=True))


def committed(plan: Plan, item: WorkItem) -> bool:
    commits = Commits(plan.paths, item.teacher, item.context)
    return commits.has(item.shard.number, item.layers, item.generation.number)


def share_arrays(plan: Plan, name: str) -> None:
    """In an object store, put the arrays that units write parts of whole, where all of a context's units are there."""
    mirror = mirror_of(plan.paths.root)
    if mirror is None:
        return
    record, group = plan.teachers[name], plan.paths.data / name
    for context in record.contexts:
        items = [u for u in plan.work_items(name) if u.context == context]
        commits, c = Commits(plan.paths, name, context), record.contexts.index(context)
        if items and all(commits.has(u.shard.number, u.layers, u.generation.number) for u in items):
            axes = {record.layers.index(k) for u in items for k in u.layers}
            for array in ("input_hash", "context_left", "context_right"):
                mirror.put_arrays(RawArray(group / array).files(c))
            for axis in sorted(axes):
                mirror.put_arrays(RawArray(group / "crc32c").files(c, axis))

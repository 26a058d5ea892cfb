"""Run an extraction: plan it, then run its work items until every view of the plan is complete.

Guarantees: a work item is either committed or as if it had never begun. So the same command resumes after a kill, and
several commands share the work.
Try: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from ...data.errors import StillhouseError, StoppedError
from ...data.files.lock import FileLock
from ...data.files.stopping import StopNow, StopRequest
from ...data.manifest import Corpus
from ..speech.teacher import AnyTeacher, SpeechTeacher
from ..store.disk.files import StoreFiles
from ..store.disk.locks import Scratch, exclusive_access
from ..store.disk.paths import Paths
from ..store.format.arrays import RawArray
from ..store.format.plan import Plan, WorkItem, read_plan, write_head
from ..store.read.rows import TeacherRows
from ..store.storage import open_files, writable_files
from .generation import draft_plan
from .layout import PlanDraft
from .new_store import forget_teacher, write_plan
from .norms import write_norms
from .progress import ExtractionProgress, OnProgress, Summary, split_committed, summarise
from .request import Request, choose_space, teacher_record
from .runner import ItemRunner, LockedItem


class Workers(Protocol):
    """Other processes that work on the same store."""

    def finish(self) -> ExtractionProgress:
        """Wait for all of them and return what they did. Raise the error of one that failed."""

    def ask_to_stop(self) -> None:
        """Tell all of them to commit what is whole and end. They may have ended."""

    def wait(self) -> None:
        """Wait until all of them have ended, however they did."""


def extract(
    root: Path,
    corpus: Corpus,
    teacher: AnyTeacher,
    request: Request,
    on_progress: OnProgress | None = None,
    part: tuple[int, int] | None = (0, 1),
    start_workers: Callable[[Plan], Workers] | None = None,
    check: Callable[[PlanDraft], None] | None = None,
    refresh: bool = False,
    make_runner: Callable[..., ItemRunner] | None = None,
    stop: StopRequest | None = None,
) -> Summary:
    """Extract everything that is asked for and not in the store yet.

    Arguments:
        root: the store, a folder or a URL.
        corpus: the utterances.
        teacher: the language model, or the speech encoder with the same corpus.
        request: what is asked for.
        on_progress: is called after every batch.
        part: (i, n) extracts every n-th work item from the i-th on. None leaves all of them to the workers.
        start_workers: starts other processes once the plan is written.
        check: sees a drafted plan before it is written, and may refuse it with an error.
        refresh: extract changed utterances again, and hide those that the corpus does not have.
        make_runner: makes another runner than `ItemRunner`, with the same arguments.
        stop: where a signal asks to stop. Work items of which all batches are computed are committed first.

    Raises:
        StoppedError: `stop` was requested; says how much is committed.
        StaleError: the store was made with other settings or from other texts.
        LockedError: the corpus has changed and another process writes to the store.
        StoreError: a value is not finite, or the disk is full.
    """
    if isinstance(teacher, SpeechTeacher):
        teacher.corpus = corpus
    with writable_files(root) as files:
        plan = files.retry_plan(lambda: make_plan(files, corpus, teacher, request, check, refresh))
        progress = ExtractionProgress()
        with Scratch(plan.paths) as scratch:
            plan = read_plan(files)  # again: from here on no other process changes it under this one
            # Ray is not to be interrupted by an exception, so its workers poll for a request to stop.
            calm = stop.deferred if stop is not None else lambda yes: nullcontext()
            with calm(True):
                workers = start_workers(plan) if start_workers is not None else None
            if stop is not None and workers is not None:
                stop.pass_on = workers.ask_to_stop
                stop.listen()  # Ray takes them for itself.
                if stop.requested:
                    stop.pass_on()
            try:
                try:
                    if part is None:
                        progress.items_total = len(plan.work_items(request.name))
                    else:
                        folder = scratch.folder
                        run_work_items(
                            plan, request.name, teacher, folder, progress, on_progress, part, make_runner, stop
                        )
                finally:
                    if workers is not None and not (stop is not None and stop.requested):
                        with calm(part is None):
                            progress.add(workers.finish())
                if stop is not None and stop.requested:
                    raise StopNow
            except (StopNow, StillhouseError):
                if stop is None or not stop.requested:
                    raise
                with stop.deferred():
                    if workers is not None:
                        workers.wait()
                    done, rest = split_committed(plan, plan.work_items(request.name))
                what = f"{len(done):,} of {len(done) + len(rest):,} work items of {request.name} are committed"
                raise StoppedError(f"stopped by {stop.signal}: {what}. Repeat the command to resume") from None
            for context in plan.teachers[request.name].contexts:
                write_norms(plan, request.name, context, scratch.folder)
        share_arrays(plan, request.name)
        return summarise(plan, request.name, progress)


def make_plan(
    store: str | Path | StoreFiles,
    corpus: Corpus,
    teacher: AnyTeacher,
    request: Request,
    check: Callable[[PlanDraft], None] | None = None,
    refresh: bool = False,
) -> Plan:
    """Return the store's plan. Write or extend it where something that is asked for is not in it.

    Several processes may call this at once. Arguments and errors are those of `extract`.
    """
    files = open_files(store)
    teacher = choose_space(teacher, request, files)
    record = teacher_record(teacher, request)
    with FileLock(Paths(files).lock("plan"), wait=True):
        draft = draft_plan(files, corpus, teacher, record, request, refresh)
        if draft.new_rows is not None:
            files.require_growable()
        if draft.new:
            if check is not None:
                check(draft)
            alone = draft.new_rows is not None or draft.replaces
            with exclusive_access(draft.plan.paths) if alone else nullcontext():
                if draft.replaces:
                    forget_teacher(read_plan(files), record.name)
                write_plan(draft, teacher)
        elif files.has_locks and record.name not in read_plan(files).compared:
            write_head(draft.plan)  # so that the next run need not compare again
    return draft.plan


def run_work_items(
    plan: Plan,
    name: str,
    teacher: AnyTeacher,
    scratch: Path,
    progress: ExtractionProgress,
    on_progress: OnProgress | None = None,
    part: tuple[int, int] = (0, 1),
    make_runner: Callable[..., ItemRunner] | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Run every work item that is not committed. Wait for those that another process has locked at the end.

    Raises StopNow if `stop` is requested, after items that are computed are committed.
    """
    items = plan.work_items(name)[part[0] :: part[1]]
    _, open_items = split_committed(plan, items)
    progress.items_total, progress.frame_hz = len(items), plan.teachers[name].rate_hz
    progress.rows_total = sum(item.shard.rows for item in open_items)
    if not open_items:
        return
    if not plan.paths.files.has_locks:  # so writers begin in different places
        first = random.SystemRandom().randrange(len(open_items))
        open_items = open_items[first:] + open_items[:first]
    busy: list[WorkItem] = []

    def lock_items(items: Sequence[WorkItem], wait: bool) -> Iterator[LockedItem]:
        for item in items:
            lock = FileLock(plan.paths.lock(item.teacher, item.context, item.shard.number))
            with stop.deferred(not wait) if stop is not None else nullcontext():
                acquired = lock.acquire(wait=wait)
            if not acquired:
                busy.append(item)
                continue
            try:
                committed, _ = split_committed(plan, [item])
            except BaseException:
                lock.release()
                raise
            if committed:
                lock.release()
                progress.rows_total -= item.shard.rows
            else:
                yield LockedItem(item, lock)

    runner = (make_runner or ItemRunner)(plan, teacher, TeacherRows(plan, name), scratch, progress, on_progress)
    runner.stop, began = stop, time.perf_counter()
    with stop.deferred() if stop is not None else nullcontext(), runner:
        runner.run_items(lock_items(open_items, wait=False))
        for item in busy:  # one at a time: two processes that wait for each other must not both hold locks
            runner.run_items(lock_items([item], wait=True))
    progress.worker_s += time.perf_counter() - began


def share_arrays(plan: Plan, name: str) -> None:
    """In an object store, put the arrays that work items write parts of, once all items of a context are committed."""
    record, files = plan.teachers[name], plan.paths.files
    for context in record.contexts:
        items, c = [i for i in plan.work_items(name) if i.context == context], record.contexts.index(context)
        if items and not split_committed(plan, items)[1]:
            axes = {record.layers.index(k) for item in items for k in item.layers}
            for array in ("input_hash", "context_left", "context_right"):
                files.publish_arrays(RawArray(plan.paths, name, array).chunk_paths(c))
            for axis in sorted(axes):
                files.publish_arrays(RawArray(plan.paths, name, "crc32c").chunk_paths(c, axis))

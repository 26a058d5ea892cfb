"""Run one kernel on several threads at once, which share its work through a counter among its arguments.

numba's parallel loops are no choice: their OpenMP pool and torch's compete for the cores, and OpenMP aborts in a forked
process. There are two kinds of threads for the same work:

- torch's own OpenMP threads, through the library that torch is linked with. After an operation of torch they spin for
  milliseconds and wait for the next. The loss can use them at once. Unused, they would keep a core from it.
- plain threads, if torch's are not available or began late. An OpenMP region waits for all of its threads, which takes
  a turn of the scheduler on a busy machine. Nothing waits for a plain thread that has not begun.

A forked process has neither and runs the kernel serially.
Guarantees: results never depend on which thread computed what, nor on the number of threads.
Try: `pytest tests/train/rnnt/test_threads.py`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

LATE = 1e-3  # seconds after the first thread in which torch's others must have begun
AWAY, LONGEST = 16, 1024  # calls for plain threads after torch's were late once, and after many times

_forked = False
_lock = threading.Lock()  # One parallel call runs at a time. A second thread that calls meanwhile runs serially.
_inboxes: list[queue.SimpleQueue] = []
_away, _times_late = 0, 0


def _after_fork() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()
    _inboxes.clear()


os.register_at_fork(after_in_child=_after_fork)


class _Job:
    """The calls function(index, *args) for each index below count, shared by the threads that call `work`."""

    def __init__(self, function: Callable, count: int, args: tuple) -> None:
        self.function, self.count, self.args = function, count, args
        self.numbers = itertools.count()
        self.finished: list[int] = []
        self.errors: list[BaseException] = []
        self.begun: list[float] = []
        self.all = threading.Lock()
        self.all.acquire()

    def work(self, _: Any = None) -> None:
        self.begun.append(time.perf_counter())
        while (index := next(self.numbers)) < self.count:
            try:
                self.function(index, *self.args)
            except BaseException as e:
                self.errors.append(e)
            self.finished.append(index)
            if len(self.finished) == self.count:
                with suppress(RuntimeError):  # Two threads ended at once.
                    self.all.release()


def _work(inbox: queue.SimpleQueue) -> None:
    torch.set_num_threads(1)  # OpenMP's setting for this thread: its matrix products stay on it.
    while True:
        job = inbox.get()
        job.work()
        del job


def _grow(count: int) -> None:
    threads = torch.get_num_threads()
    while len(_inboxes) < count:
        inbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_work, args=(inbox,), name="rnnt", daemon=True).start()
        _inboxes.append(inbox)
    torch.set_num_threads(threads)


@cache
def _openmp() -> tuple[Any, Any] | None:
    """Return GOMP_parallel of the library that torch is linked with and the type of its callback, or None."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    try:
        linked = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = linked.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (kind, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel, kind


def _with_openmp(job: _Job) -> bool:
    """Run the job on torch's threads and return True, unless there are none or they were late recently."""
    global _away, _times_late
    openmp = _openmp()
    if openmp is None or _away > 0:
        _away = max(0, _away - 1)
        return False
    parallel, kind = openmp
    parallel(kind(job.work), None, job.count, 0)
    late = max(job.begun) - job.begun[0] > LATE
    _times_late = _times_late + 1 if late else 0
    _away = min(LONGEST, AWAY << _times_late) if late else 0
    return True


def thread_count() -> int:
    """Return how many threads a call may use: torch's number, or one in a forked process.

    There torch gets one, too. OpenMP's threads do not survive a fork, and a matrix product would wait for them.
    """
    if _forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    return 1 if _forked else max(1, torch.get_num_threads())


@contextmanager
def single_products() -> Iterator[None]:
    """Keep matrix products of this thread on it, as those of the other threads are: else they compete for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(function: Callable, threads: int, *args) -> None:
    """Call function(index, *args) for index 0..threads-1, some of them on this thread. Raises what a call raised."""
    if threads <= 1 or _forked or not _lock.acquire(blocking=False):
        for index in range(threads):
            function(index, *args)
        return
    try:
        job = _Job(function, threads, args)
        if not _with_openmp(job):
            _grow(threads - 1)
            for inbox in _inboxes[: threads - 1]:
                inbox.put(job)
            job.work()
            job.all.acquire()
        if job.errors:
            raise job.errors[0]
    finally:
        _lock.release()

"""Runs one nogil kernel on several threads at once; the kernels share work through a counter in their arguments.

Why not numba's parallel loops: their OpenMP pool and torch's fight over the cores, and OpenMP aborts in a forked
process. Plain threads sleep between calls, and a forked worker simply has none: it runs the kernel serially.
Invariant: results never depend on which thread did what. Run: pytest tests/rnnt/test_threads.py
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_forked = False
_lock = threading.Lock()  # one parallel call at a time; a second thread that arrives meanwhile runs serially
_inboxes: list[queue.SimpleQueue] = []
_done: queue.SimpleQueue = queue.SimpleQueue()


def _after_fork() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()
    _inboxes.clear()


os.register_at_fork(after_in_child=_after_fork)


def _work(inbox: queue.SimpleQueue) -> None:
    torch.set_num_threads(1)  # OpenMP's setting of this thread: a matrix product here stays on it
    while True:
        function, index, args = inbox.get()
        error: BaseException | None = None
        try:
            function(index, *args)
        except BaseException as e:
            error = e
        _done.put(error)
        del function, args, error


def _grow(count: int) -> None:
    threads = torch.get_num_threads()
    while len(_inboxes) < count:
        inbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_work, args=(inbox,), name="rnnt", daemon=True).start()
        _inboxes.append(inbox)
    torch.set_num_threads(threads)


def thread_count() -> int:
    """How many threads a call may use: torch's number, and one in a forked process.

    There torch gets one, too: OpenMP's threads did not survive the fork, and a matrix product would wait for them.
    """
    if _forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    return 1 if _forked else max(1, torch.get_num_threads())


@contextmanager
def single_products() -> Iterator[None]:
    """Matrix products of this thread stay on it, as those of the other threads do: else they fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(function: Callable, threads: int, *args) -> None:
    """Call function(index, *args) for index 0..threads-1, index 0 on this thread; raises what a call raised."""
    if threads <= 1 or _forked or not _lock.acquire(blocking=False):
        for index in range(threads):
            function(index, *args)
        return
    try:
        _grow(threads - 1)
        for index in range(1, threads):
            _inboxes[index - 1].put((function, index, args))
        errors = []
        try:
            function(0, *args)
        finally:
            errors = [_done.get() for _ in range(1, threads)]
        for error in errors:
            if error is not None:
                raise error
    finally:
        _lock.release()

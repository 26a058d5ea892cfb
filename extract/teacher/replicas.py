"""Several batches at a time through one teacher, each of them in one thread.

Guarantees: one thread computes a batch, because the last bits of a matrix product depend on how many threads share it.
So the bytes of a store do not depend on the number of cores, threads or processes.
Try: `stillhouse extract CORPUS STORE --teacher … --workers 3`.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .contexts import Window
from .forward import forward

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """One batch of windows, perhaps empty, for one of the threads. `owner` and `last` are for the caller."""

    batch: list[Window]
    layers: Sequence[int]
    keep: Callable[[dict[int, torch.Tensor]], Any]  # turns states {layer: [B, T, D]} into the result
    where: object  # names the batch in an error
    owner: Any = None  # what the batch belongs to
    last: bool = False  # it is the owner's last batch
    ids: Sequence[str] = ()  # names of the utterances that `KeptTokens.utterance` counts, for an error


class TeacherPool:
    """As many threads as torch may use on the CPU, each with a clone of the teacher. On a GPU one thread is enough.

    `teacher` is a `Teacher` or a `SpeechTeacher`.

    As a context manager it sets torch's own number of threads to one, and back at its end.
    """

    def __init__(self, teacher: Any) -> None:
        self._before = torch.get_num_threads()
        self.count = self._before if teacher.device == "cpu" else 1
        self._teacher = teacher
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(self.count, "stillhouse-model", torch.set_num_threads, (1,))
        self.seconds = 0.0  # that the model has run, summed over threads

    def __enter__(self) -> TeacherPool:
        torch.set_num_threads(1)
        self._idle.put(self._teacher)
        for _ in range(self.count - 1):
            self._idle.put(self._teacher.clone_model())
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before)

    def run(
        self,
        batches: Iterable[list[Window]],
        layers: Sequence[int],
        keep: Callable[[dict[int, torch.Tensor]], T],
        where: object,
    ) -> Iterator[tuple[list[Window], T]]:
        """Yield what `forward` yields of each batch, in order. It holds at most one batch more than threads."""
        for _, parts in self.run_all(Task(batch, layers, keep, where) for batch in batches):
            yield from parts

    def run_all(self, tasks: Iterable[Task | None]) -> Iterator[tuple[Task, list[tuple[list[Window], Any]]]]:
        """Yield each task with the results of its batch, in order.

        None instead of a task asks for the next outstanding result before the next task is started.
        """

        def one(task: Task) -> tuple[Task, list[tuple[list[Window], Any]]]:
            teacher, began = self._idle.get(), time.perf_counter()
            try:
                if not task.batch:
                    return task, []
                return task, list(forward(teacher, task.batch, task.layers, task.keep, task.where, task.ids))
            finally:
                self.seconds += time.perf_counter() - began
                self._idle.put(teacher)

        running: deque[Future[tuple[Task, list[tuple[list[Window], Any]]]]] = deque()
        try:
            for task in tasks:
                if task is not None:
                    running.append(self._pool.submit(one, task))
                if running and (task is None or len(running) > self.count):
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

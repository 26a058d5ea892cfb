"""Several processes on one store: each loads the teacher and takes units that nobody holds.

Invariant: workers share nothing but the store; its locks and commits make the same bytes, whatever their number and
whichever of them dies (on one kind of processor and with as many threads each: a matrix product's last bits depend
on both). Run: `stillhouse extract CORPUS STORE --teacher … --workers 3`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty
from typing import Any

from stillhouse.data.errors import StillhouseError, StoreError, UsageError

from .store.plan import Plan, read_plan


def parse_part(text: str | None) -> tuple[int, int]:
    """ "i/n" of a job array, i from 0. Errors: UsageError for anything else."""
    if text is None:
        return (0, 1)
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise UsageError(f"--shard {text}", expected="i/n with i from 0 to n - 1, as in 0/4")
    return int(i), int(n)


class Crew:
    """The other workers of one command; this process is the first."""

    def __init__(self, plan: Plan, name: str, load: dict[str, Any], count: int, part: tuple[int, int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._errors: Any = context.Queue()
        self._processes: list[SpawnProcess] = []
        for rank in range(1, count):
            options = load | {"device": worker_device(load["device"], rank)}
            arguments = (plan.paths.root, name, options, part, threads_each(count), self._errors)
            process = context.Process(target=_work, args=arguments, name=f"stillhouse-worker-{rank}")
            process.start()
            self._processes.append(process)

    def finish(self) -> None:
        """Wait for all. Errors: what a worker raised; StoreError where one was killed."""
        for process in self._processes:
            process.join()
        try:
            raise self._errors.get_nowait()
        except Empty:
            pass
        dead = [p.name for p in self._processes if p.exitcode]
        if dead:
            raise StoreError(
                f"{', '.join(dead)} died; what was committed is safe", remedy="give the same command again: it resumes"
            )


def make_crew(name: str, load: dict[str, Any], count: int, part: tuple[int, int]) -> Callable[[Plan], Crew] | None:
    """For `run.extract`: starts `count - 1` helpers when the plan is there. `load` are `load_teacher`'s arguments."""
    if count <= 1:
        return None
    return lambda plan: Crew(plan, name, load, count, part)


def worker_device(device: str, rank: int) -> str:
    """One worker a GPU where there are several; the CPU otherwise."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device


def threads_each(count: int) -> int:
    import torch

    return max(1, torch.get_num_threads() // count)


def _work(root: Path, name: str, load: dict[str, Any], part: tuple[int, int], threads: int, errors: Any) -> None:
    import torch

    from .progress import Progress
    from .run import run_units
    from .store.files import Scratch
    from .teacher import load_teacher

    torch.set_num_threads(threads)
    try:
        plan = read_plan(root)
        with Scratch(plan.paths) as scratch:
            run_units(plan, name, load_teacher(**load), scratch.folder, Progress(), None, part)
    except StillhouseError as e:
        errors.put(e)
    except KeyboardInterrupt:
        os._exit(130)

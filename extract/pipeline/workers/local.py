"""Run work items in several processes of this machine. Each loads the teacher.

Guarantees: workers share nothing but the store. On one kind of processor the store gets the same bytes with any number
of workers, and if some of them are killed.
Try: `stillhouse extract CORPUS STORE --teacher … --workers 3`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty
from typing import Any

from ....data.errors import STOPPED, StillhouseError, StoreError, UsageError
from ....data.files.stopping import StopNow, StopRequest
from ...store.disk.locks import Scratch
from ...store.disk.paths import Paths
from ...store.format.plan import Plan, read_plan
from ...store.storage import writable_files
from ..progress import ExtractionProgress

RESUME = "give the same command again: it keeps what is committed, and resumes"


def parse_part(text: str | None) -> tuple[int, int]:
    """Return (i, n) of the part "i/n" of a job array; (0, 1) for None. Raises UsageError for any other text."""
    if text is None:
        return (0, 1)
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise UsageError(f"--shard {text}", expected="i/n with i from 0 to n - 1, as in 0/4")
    return int(i), int(n)


def part_of(has_locks: bool, part: tuple[int, int], rank: int, count: int) -> tuple[int, int]:
    """Return what one of `count` workers does of a part.

    Each may do all of it, because locks keep workers apart. An object store has no locks, so each gets an equal share.
    """
    return part if has_locks else (part[0] + part[1] * rank, part[1] * count)


class WorkerProcesses:
    """The other workers of one command. This process is the first."""

    def __init__(self, plan: Plan, name: str, load: dict[str, Any], count: int, part: tuple[int, int]) -> None:
        import torch

        context = multiprocessing.get_context("spawn")
        self._results: Any = context.Queue()
        self._processes: list[SpawnProcess] = []
        threads, root = torch.get_num_threads(), plan.paths.files.address
        for rank in range(1, count):
            options = load | {"device": worker_device(load["device"], rank)}
            arguments = (
                root,
                name,
                options,
                part_of(plan.paths.files.has_locks, part, rank, count),
                threads,
                self._results,
            )
            process = context.Process(target=_run_process, args=arguments, name=f"stillhouse-worker-{rank}")
            process.start()
            self._processes.append(process)

    def ask_to_stop(self) -> None:
        """Send SIGTERM to all that are alive."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def wait(self) -> None:
        """Wait until all have ended, however they did."""
        for process in self._processes:
            process.join()

    def finish(self) -> ExtractionProgress:
        """Wait for all and return what they did. Raises a worker's error, and StoreError if one was killed."""
        self.wait()
        results = []
        while True:
            try:
                results.append(self._results.get_nowait())
            except Empty:
                break
        total = sum_results(results)
        dead = [p.name for p in self._processes if p.exitcode]
        if dead:
            raise StoreError(f"{', '.join(dead)} died", remedy=RESUME)
        return total


def sum_results(results: Iterable[ExtractionProgress | StillhouseError]) -> ExtractionProgress:
    total = ExtractionProgress()
    for result in results:
        if isinstance(result, StillhouseError):
            raise result
        total.add(result)
    return total


def start_workers(
    name: str, load: dict[str, Any], count: int, part: tuple[int, int]
) -> Callable[[Plan], WorkerProcesses] | None:
    """Return what starts `count - 1` processes, for `extract`; None for one. `load` is for `load_any_teacher`."""
    return (lambda plan: WorkerProcesses(plan, name, load, count, part)) if count > 1 else None


def pick_device(device: str) -> str:
    """Return the device that "auto" stands for."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def worker_device(device: str, rank: int) -> str:
    """Return the device of a worker. Workers take turns on the GPUs of this machine."""
    import torch

    device = pick_device(device)
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device


def share_threads(count: int) -> None:
    """Give this process its share of torch's threads, if `count` processes share the machine."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // count))


def run_worker(
    root: Path | str,
    name: str,
    load: dict[str, Any],
    part: tuple[int, int],
    threads: int,
    *,
    stop: StopRequest | None = None,
) -> ExtractionProgress:
    """Run work items of a planned store until all of them are committed. Raises StopNow if `stop` is requested."""
    import torch

    from ...speech.teacher import load_any_teacher
    from ..extract import run_work_items

    torch.set_num_threads(threads)
    progress = ExtractionProgress()
    with writable_files(root) as files, Scratch(Paths(files)) as scratch:
        plan = read_plan(files)
        run_work_items(plan, name, load_any_teacher(**load), scratch.folder, progress, None, part, stop=stop)
    return progress


def _run_process(*arguments: Any) -> None:
    *of_worker, results = arguments
    try:
        with StopRequest() as stop:
            results.put(run_worker(*of_worker, stop=stop))
    except StillhouseError as e:
        results.put(e)
    except StopNow:
        os._exit(STOPPED)
    except KeyboardInterrupt:
        os._exit(130)

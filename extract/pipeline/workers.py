"""Run work items in several processes, here or on a Ray cluster. Each loads the teacher.

Guarantees: workers share nothing but the store. On one kind of processor the store gets the same bytes with any number
of workers, and if some of them are killed. Ray carries settings and counts, and states go straight into the store.
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

from ...data.errors import StillhouseError, StoreError, UsageError
from ..store.disk.locks import Scratch
from ..store.disk.paths import Paths
from ..store.format.plan import Plan, read_plan
from ..store.storage import writable_files
from .progress import ExtractionProgress

RAY_RETRIES = 3  # of a task whose node was lost
_RESUME = "give the same command again: it keeps what is committed, and resumes"


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

    def finish(self) -> ExtractionProgress:
        """Wait for all and return what they did. Raises a worker's error, and StoreError if one was killed."""
        for process in self._processes:
            process.join()
        results = []
        while True:
            try:
                results.append(self._results.get_nowait())
            except Empty:
                break
        total = _sum(results)
        dead = [p.name for p in self._processes if p.exitcode]
        if dead:
            raise StoreError(f"{', '.join(dead)} died", remedy=_RESUME)
        return total


def _sum(results: Iterable[ExtractionProgress | StillhouseError]) -> ExtractionProgress:
    total = ExtractionProgress()
    for result in results:
        if isinstance(result, StillhouseError):
            raise result
        total.add(result)
    return total


def start_workers(
    name: str, load: dict[str, Any], count: int, part: tuple[int, int]
) -> Callable[[Plan], WorkerProcesses] | None:
    """Return what starts `count - 1` processes, for `extract`; None for one. `load` are `load_teacher`'s arguments."""
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
    root: Path | str, name: str, load: dict[str, Any], part: tuple[int, int], threads: int
) -> ExtractionProgress:
    """Run work items of a planned store until all of them are committed."""
    import torch

    from ..teacher.model import load_teacher
    from .extract import run_work_items

    torch.set_num_threads(threads)
    progress = ExtractionProgress()
    with writable_files(root) as files, Scratch(Paths(files)) as scratch:
        plan = read_plan(files)
        run_work_items(plan, name, load_teacher(**load), scratch.folder, progress, None, part)
    return progress


def _run_process(*arguments: Any) -> None:
    *arguments_of_worker, results = arguments
    try:
        results.put(run_worker(*arguments_of_worker))
    except StillhouseError as e:
        results.put(e)
    except KeyboardInterrupt:
        os._exit(130)


def ray_module() -> Any:
    """Return the module ray. Raises UsageError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as e:
        raise UsageError("--engine ray needs Ray", remedy="pip install 'stillhouse[cluster]'") from e
    return ray


class RayWorkers:
    """`count` tasks on the Ray cluster at `address`, where "auto" is that of this machine; None starts one for them.

    Every node needs Stillhouse, the teacher under the same name, and the store under the same path or URL. If a node
    is lost, its task runs again elsewhere and resumes from the commits.
    """

    def __init__(
        self, plan: Plan, name: str, load: dict[str, Any], count: int, part: tuple[int, int], address: str | None
    ) -> None:
        ray = self._ray = ray_module()
        device = pick_device(load["device"])
        self._began = not ray.is_initialized()
        if self._began:
            own = {} if address else {"num_cpus": max(count, os.cpu_count() or 1)}
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False, **own)
        threads = int(ray.cluster_resources().get("CPU", 1)) // count if device == "cpu" else 1
        threads = max(1, threads)
        needs: dict[str, Any] = {"num_cpus": threads} | ({"num_gpus": 1} if device != "cpu" else {})
        task = ray.remote(**needs, max_retries=RAY_RETRIES)(_run_task)
        root = plan.paths.files.address
        root = str(root.absolute() if isinstance(root, Path) else root)
        load = load | {"device": device}
        self._tasks = [
            task.remote(root, name, load, part_of(plan.paths.files.has_locks, part, rank, count), threads)
            for rank in range(count)
        ]

    def finish(self) -> ExtractionProgress:
        """Wait for all and return what they did. Raises a worker's error, and StoreError if Ray gave one up."""
        try:
            return _sum(self._ray.get(self._tasks))
        except self._ray.exceptions.RayError as e:
            raise StoreError(f"a Ray worker failed: {str(e).strip().splitlines()[-1]}", remedy=_RESUME) from e
        finally:
            if self._began:
                self._ray.shutdown()


def start_ray_workers(
    name: str, load: dict[str, Any], count: int, part: tuple[int, int], address: str | None
) -> Callable[[Plan], RayWorkers]:
    """Return what starts the tasks, for `extract`."""
    ray_module()
    return lambda plan: RayWorkers(plan, name, load, count, part, address)


def _run_task(*arguments: Any) -> ExtractionProgress | StillhouseError:
    try:
        return run_worker(*arguments)
    except StillhouseError as e:
        return e  # as a value: Ray would wrap an exception into a type of its own

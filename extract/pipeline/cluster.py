"""Workers as tasks of a Ray cluster, on as many nodes as it has.

Invariant: Ray carries settings there and counts back; states go from a worker straight into the store. A task that
its node loses is run again elsewhere, and finds by the commits what is left to do.
Run: `stillhouse extract CORPUS STORE --teacher … --engine ray --workers 2 --ray-address auto`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...data.errors import StillhouseError, StoreError, UsageError
from ..store.format.plan import Plan
from ..store.remote.paths import address_of
from .progress import ItemOutcome
from .workers import part_of, pick_device, work

RETRIES = 3  # of a task whose node was lost


def ray_module() -> Any:
    """Errors: UsageError where Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as e:
        raise UsageError("--engine ray needs Ray", remedy="pip install 'stillhouse[cluster]'") from e
    return ray


class RayWorkers:
    """`count` tasks on the cluster at `address` ("auto": the one of this machine), or on one started here for them.

    Every node needs Stillhouse, the teacher under the same name, and the store under the same path or URL.
    """

    def __init__(
        self, plan: Plan, name: str, load: dict[str, Any], count: int, part: tuple[int, int], address: str | None
    ) -> None:
        ray = self._ray = ray_module()
        device = pick_device(load["device"])
        self._began = not ray.is_initialized()
        if self._began:
            here = {} if address else {"num_cpus": max(count, os.cpu_count() or 1)}
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False, **here)
        threads = int(ray.cluster_resources().get("CPU", 1)) // count if device == "cpu" else 1
        threads = max(1, threads)
        needs: dict[str, Any] = {"num_cpus": threads} | ({"num_gpus": 1} if device != "cpu" else {})
        task = ray.remote(**needs, max_retries=RETRIES)(_task)
        root = address_of(plan.paths.root)
        root = str(root.absolute() if isinstance(root, Path) else root)
        load = load | {"device": device}
        self._tasks = [
            task.remote(root, name, load, part_of(plan, part, rank, count), threads) for rank in range(count)
        ]

    def finish(self) -> ItemOutcome:
        """Wait for all. Errors: what a worker raised; StoreError where Ray gave one up."""
        done = ItemOutcome()
        try:
            for result in self._ray.get(self._tasks):
                if isinstance(result, StillhouseError):
                    raise result
                done += result
        except self._ray.exceptions.RayError as e:
            raise StoreError(
                f"a Ray worker failed: {str(e).strip().splitlines()[-1]}",
                remedy="what was committed is safe: give the same command again, it resumes",
            ) from e
        finally:
            if self._began:
                self._ray.shutdown()
        return done


def start_ray_workers(
    name: str, load: dict[str, Any], count: int, part: tuple[int, int], address: str | None
) -> Callable[[Plan], RayWorkers]:
    """For `run.extract`: starts the tasks when the plan is there."""
    ray_module()
    return lambda plan: RayWorkers(plan, name, load, count, part, address)


def _task(root: str, name: str, load: dict[str, Any], part: tuple[int, int], threads: int) -> Any:
    try:
        return work(root, name, load, part, threads)
    except StillhouseError as e:
        return e  # by value: Ray would wrap it into a type of its own

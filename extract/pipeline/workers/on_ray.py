"""Run work items as tasks of a Ray cluster. Each loads the teacher.

Guarantees: Ray carries settings and counts, and states go straight into the store. What Ray logs about itself stays in
its own files.
Try: `stillhouse extract CORPUS STORE --teacher … --engine ray --workers 3`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....data.errors import AudioError, CorpusError, NoStoreError, StillhouseError, StoreError, TeacherError, UsageError
from ....data.files.stopping import StopNow
from ...store.format.plan import Plan, read_plan
from ...store.storage import open_files
from ..progress import ExtractionProgress
from .local import RESUME, part_of, pick_device, run_worker, sum_results

RAY_RETRIES = 3  # of a task whose node was lost
ANSWERS_S = 5.0  # A cluster that does not answer for so long is not there.
POLL_S = 0.5  # between looks for a request to stop
STOPS_S = 60.0  # for tasks to commit what is whole
_ADDRESS = "start one with `ray start --head`, give another --ray-address, or none to run on this machine"


def ray_module() -> Any:
    """Return the module ray. Raises UsageError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as e:
        raise UsageError("--engine ray needs Ray", remedy="pip install 'stillhouse[cluster]'") from e
    return ray


def check_address(address: str | None) -> None:
    """Raise UsageError if no Ray cluster answers at an address, which takes Ray itself two minutes to say."""
    where = address
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        where = os.environ.get("RAY_ADDRESS") or (known.read_text().strip() if known.is_file() else "")
        if not where:
            raise UsageError("no Ray cluster runs on this machine", where=f"--ray-address {address}", remedy=_ADDRESS)
    if not where or where == "local":
        return
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if not port.isdigit() or not host:
        expected = "auto, HOST:PORT or ray://HOST:PORT"
        raise UsageError("this is no address of a Ray cluster", where=f"--ray-address {where}", expected=expected)
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_S).close()
    except (OSError, OverflowError) as e:
        what = f"no Ray cluster answers: {e}"
        raise UsageError(what, where=f"--ray-address {where}", remedy=_ADDRESS) from e


class RayWorkers:
    """`count` tasks on the Ray cluster at `address`, where "auto" is that of this machine; None starts one for them.

    Every node needs Stillhouse, the teacher under the same name, and the store under the same path or URL. A speech
    teacher needs the corpus there, too. If a node is lost, its task runs again elsewhere and resumes from the commits.
    """

    def __init__(
        self, plan: Plan, name: str, load: dict[str, Any], count: int, part: tuple[int, int], address: str | None
    ) -> None:
        ray = self._ray = ray_module()
        device = pick_device(load["device"])
        self._asked = False
        self._began = not ray.is_initialized()
        if self._began:
            own = {} if address else {"num_cpus": max(count, os.cpu_count() or 1), "include_dashboard": False}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
            except (ConnectionError, RuntimeError, ValueError) as e:
                what = f"cannot join the Ray cluster: {str(e).strip().splitlines()[0]}"
                raise UsageError(what, where=f"--ray-address {address}", remedy=_ADDRESS) from e
        resources = ray.cluster_resources()
        if device != "cpu" and not resources.get("GPU"):
            self._close()
            raise UsageError("the Ray cluster has no GPU", expected="--device cpu, or nodes with GPUs")
        threads = int(resources.get("CPU", 1)) // count if device == "cpu" else 1
        threads = max(1, threads)
        needs: dict[str, Any] = {"num_cpus": threads} | ({"num_gpus": 1} if device != "cpu" else {})
        task = ray.remote(**needs, max_retries=RAY_RETRIES)(run_task)
        files = plan.paths.files
        root = str(Path(files.address).absolute()) if files.has_locks else files.address
        load = load | {"device": device}
        self._tasks = [
            task.remote(plan.created, root, name, load, part_of(plan.paths.files.has_locks, part, rank, count), threads)
            for rank in range(count)
        ]

    def ask_to_stop(self) -> None:
        """Let `finish` raise StopNow soon. A signal handler must not call Ray."""
        self._asked = True

    def wait(self) -> None:
        """Cancel all tasks, and wait until they have committed what is whole."""
        for task in self._tasks:
            self._ray.cancel(task)
        self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=STOPS_S)
        self._close()

    def finish(self) -> ExtractionProgress:
        """Wait for all and return what they did. Raises a worker's error, and StoreError if Ray gave one up.

        Raises StopNow after `ask_to_stop`.
        """
        pending = self._tasks
        while pending:
            _, pending = self._ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            if self._asked:
                raise StopNow
        try:
            total = sum_results(self._ray.get(self._tasks))
        except self._ray.exceptions.RayError as e:
            raise StoreError(f"a Ray worker failed: {str(e).strip().splitlines()[-1]}", remedy=RESUME) from e
        except StillhouseError:
            self._close()
            raise
        self._close()
        return total

    def _close(self) -> None:
        if self._began:
            self._ray.shutdown()


def start_ray_workers(
    name: str, load: dict[str, Any], count: int, part: tuple[int, int], address: str | None
) -> Callable[[Plan], RayWorkers]:
    """Return what starts the tasks, for `extract`. Raises UsageError if there is no Ray, or no cluster at `address`."""
    ray_module()
    check_address(address)
    return lambda plan: RayWorkers(plan, name, load, count, part, address)


def run_task(created: str, root: str, name: str, *arguments: Any) -> ExtractionProgress | StillhouseError:
    """Run work items in a task, on any node of a cluster. `created` tells the store from another one at `root`."""
    node = socket.gethostname()
    try:
        check_node(created, root, node)
        return run_worker(root, name, *arguments)
    except TeacherError as e:
        e.remedy = f"every node needs the model under this name, and the node {node} has none" + (
            f" ({e.remedy})" if e.remedy else ""
        )
        return e
    except AudioError as e:
        return e
    except CorpusError as e:
        e.remedy = f"every node needs the corpus of a speech teacher under this path, and the node {node} has none"
        return e
    except StillhouseError as e:
        return e  # as a value: Ray would wrap an exception into a type of its own


def check_node(created: str, root: str, node: str) -> None:
    """Raise NoStoreError if this node does not see the store that was planned, before anything is written there."""
    remedy = "give STORE on a disk that all nodes share, or as an s3:// URL"
    try:
        found = read_plan(open_files(root)).created
    except NoStoreError as e:
        raise NoStoreError(f"the node {node} does not have the store", where=root, remedy=remedy) from e
    if found != created:
        what = f"the node {node} has another store under this path, made {found} instead of {created}"
        raise NoStoreError(what, where=root, remedy=remedy)

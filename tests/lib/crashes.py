"""Moments at which a writer of a store is killed, told by the calls that it makes of the system.

The product knows nothing of them: the functions of `os` and `shutil` are wrapped in the process that is to die.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LAST_LAYER = 2  # of those that the tests' child processes extract


class Moment(NamedTuple):
    """Before or after a call whose file `matches`: the last argument that is a path, or the descriptor's file."""

    functions: tuple[str, ...]
    after: bool
    matches: Callable[[str], bool]


def _in_scratch(path: str) -> bool:
    """Whether a file is a draft in a writer's folder, STORE/tmp/HOST-PID-TIME."""
    return re.search(r"/tmp/[^/]+-\d+-[0-9a-f]+/[^/]+$", path) is not None


def _is_last_draft(path: str) -> bool:
    return _in_scratch(path) and path.rsplit(".", 2)[-2:-1] == [str(LAST_LAYER)]


def _is_head(path: str) -> bool:
    return path.endswith("/store.json")


def _is_states(path: str) -> bool:
    return "/hidden/c/" in path or "/code/c/" in path


def _is_commit(path: str) -> bool:
    return "/commits/" in path


MOMENTS = {
    "grown": Moment(("os.replace",), False, lambda path: path.endswith(("/hidden/zarr.json", "/code/zarr.json"))),
    "planned": Moment(("os.replace",), False, _is_head),
    "written": Moment(("os.replace",), False, _is_head),
    "switched": Moment(("os.replace",), True, _is_head),
    "allocated": Moment(("os.posix_fallocate",), True, _is_last_draft),
    "mid_write": Moment(("os.pwrite",), True, _in_scratch),
    "before_rename": Moment(("os.replace",), False, _is_states),
    "mid_rename": Moment(("os.replace",), True, _is_states),
    "renamed": Moment(("os.pwrite",), True, lambda path: "/crc32c/c/" in path),
    "before_link": Moment(("os.link",), False, _is_commit),
    "after_link": Moment(("os.link",), True, _is_commit),
    "item_copied": Moment(("os.link",), True, _is_commit),
    "built": Moment(("os.rename",), False, lambda path: path.endswith("/out")),
    "block_named": Moment(("os.replace",), False, lambda path: "/blocks/" in path),
    "block_kept": Moment(("os.replace",), True, lambda path: "/blocks/" in path),
    "object_named": Moment(("os.replace",), False, lambda path: "/mirrors/" in path),
    "object_kept": Moment(("os.replace",), True, lambda path: "/mirrors/" in path),
    "deleted": Moment(
        ("os.unlink", "shutil.rmtree"),
        True,
        lambda path: any(f"/{name}/" in path for name in ("data.zarr", "commits", "plan")) and ".tmp" not in path,
    ),
}


def _file(arguments: tuple[Any, ...]) -> str:
    if isinstance(arguments[0], int):
        return os.readlink(f"/proc/self/fd/{arguments[0]}")
    paths = [str(a) for a in arguments if isinstance(a, str | Path)]
    return paths[-1] if paths else ""


def signal_at(where: str, number: int = signal.SIGKILL) -> None:
    """Send this process a signal at the n-th passing of a moment, "NAME:N"; without N at every one."""
    name, _, count = where.partition(":")
    moment, left = MOMENTS[name], int(count or 0)

    def passing(arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if moment.matches(_file(arguments)):
            left -= 1
            if left == 0 or not count:
                os.kill(os.getpid(), number)

    for function in moment.functions:
        module, attribute = {"os": os, "shutil": shutil}[function.split(".")[0]], function.split(".")[1]
        true = getattr(module, attribute)

        def call(*arguments: Any, true: Any = true, **named: Any) -> Any:
            if not moment.after:
                passing(arguments)
            done = true(*arguments, **named)
            if moment.after:
                passing(arguments)
            return done

        setattr(module, attribute, call)


def fork_attempt(run: Callable[[], object], where: str = "", number: int = signal.SIGKILL) -> int:
    """Run something in a forked child, with a signal at a moment if one is named, and return the child's pid.

    The child exits with 0, or with 1 after it has printed what was raised.
    """
    child = os.fork()
    if child:
        return child
    try:
        if where:
            signal_at(where, number)
        run()
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def end_of(child: int) -> dict[str, int]:
    """Wait for a child and return the signal that `killed` it, or 0, and its `exit` status, 0 if it was killed."""
    status = os.waitpid(child, 0)[1]
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"killed": killed, "exit": 0 if killed else status}


def rank_of(process: subprocess.Popen, rank: int) -> int:
    """The process id of a rank of torchrun's."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"torchrun has no rank {rank}")

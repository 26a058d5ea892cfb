"""Locks that end with their holder, scratch folders of writers, and exclusive access to a store.

A writer shows that it lives by its folder under tmp/, which it makes under the lock `tmp`. It reads the plan after
that. A command that changes what plans mean holds the same lock and finds no folder of a living writer.

Guarantees: no writer works by a plan that is gone. What a killed writer left under tmp/ is removed by the next one.
Try: `pytest tests/extract/pipeline/test_crash.py`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....data.errors import LockedError
from .paths import Paths


class Lock:
    """An exclusive flock on a file. The kernel releases it when its holder dies."""

    def __init__(self, path: Path, wait: bool = False) -> None:
        self.path, self._wait = path, wait
        self._fd: int | None = None

    def acquire(self, wait: bool = False) -> bool:
        """Return True where this object holds the lock now, False where another does and `wait` is not set."""
        if self._fd is not None:
            raise RuntimeError(f"{self.path} is held already")  # A second flock would wait for the first for ever.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._fd is not None:
            os.close(self._fd)  # This closes the only descriptor, which releases the flock.
            self._fd = None

    def __enter__(self) -> Lock:
        if self._fd is None and not self.acquire(self._wait):
            raise LockedError("another process is writing here", where=self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Scratch:
    """A writer's folder under tmp/, in the store's file system and locked while its owner lives.

    Making one removes the folders of dead writers; `swept` counts them.
    """

    def __init__(self, paths: Paths) -> None:
        self._gate = Lock(paths.lock("tmp"))
        self.folder = paths.tmp / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
        self._gate.acquire(wait=True)
        try:
            self.swept = _sweep(paths.tmp)
            self.folder.mkdir(parents=True)
            self._own = Lock(self.folder / "lock")
            self._own.acquire(wait=True)
        finally:
            self._gate.release()

    def close(self) -> None:
        """Remove the folder."""
        self._gate.acquire(wait=True)
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._own.release()
        finally:
            self._gate.release()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _sweep(tmp: Path) -> int:
    """Remove the folders whose lock is free, and return how many. The caller holds the lock `tmp`."""
    swept = 0
    if not tmp.is_dir():
        return 0
    for folder in tmp.iterdir():
        if not folder.is_dir():
            continue
        lock = Lock(folder / "lock")
        if lock.acquire():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            swept += 1
    return swept


@contextmanager
def exclusive_access(paths: Paths) -> Iterator[None]:
    """Keep other processes from beginning to write to a store.

    Raises:
        LockedError: a writer is at work.
        StoreError: the store cannot be changed in place.
    """
    paths.files.require_writable()
    with Lock(paths.lock("tmp"), wait=True):
        _sweep(paths.tmp)
        living = [f for f in paths.tmp.iterdir() if (f / "lock").exists()] if paths.tmp.is_dir() else []
        if living:
            raise LockedError(
                "a writer is at work here, by the plan that is to change",
                where=living[0],
                remedy="let it finish or stop it (what it committed stays), then give the same command again",
            )
        yield

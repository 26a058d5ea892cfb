"""Locks that end with their holder, scratch folders of writers, and exclusive access to a store.

A writer shows that it lives by its folder under tmp/, which it makes under the lock `tmp`. It reads the plan after
that. A command that changes what plans mean holds the same lock and finds no folder of a living writer.

Guarantees: no writer works by a plan that is gone. What a killed writer left under tmp/ is removed by the next one.
Try: `pytest tests/extract/pipeline/test_crash.py`.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....data.errors import LockedError
from ....data.files.lock import FileLock
from .paths import Paths


class Scratch:
    """A writer's folder under tmp/, in the store's file system and locked while its owner lives.

    Making one removes the folders of dead writers; `swept` counts them.
    """

    def __init__(self, paths: Paths) -> None:
        self._gate = FileLock(paths.lock("tmp"))
        self.folder = paths.tmp / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
        self._gate.acquire(wait=True)
        try:
            self.swept = _sweep(paths.tmp)
            self.folder.mkdir(parents=True)
            self._own = FileLock(self.folder / "lock")
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
        lock = FileLock(folder / "lock")
        if lock.acquire():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            swept += 1
    return swept


@contextmanager
def exclusive_access(paths: Paths) -> Iterator[None]:
    """Keep other processes from beginning to write to a store. Raises LockedError where a writer is at work."""
    paths.files.require_writable()
    with FileLock(paths.lock("tmp"), wait=True):
        _sweep(paths.tmp)
        living = [f for f in paths.tmp.iterdir() if (f / "lock").exists()] if paths.tmp.is_dir() else []
        if living:
            remedy = "let it finish or stop it (what it committed stays), then give the same command again"
            what = "a writer is at work here, by the plan that is to change"
            raise LockedError(what, where=living[0], remedy=remedy)
        yield

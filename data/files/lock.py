"""One writer at a time: an exclusive flock on a file or a folder.

Guarantees: the kernel releases the lock when its process ends, however it ends. A child of a fork does not hold it.
Try: `pytest tests/data/files/test_lock.py`.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import LockedError, UsageError


class FileLock:
    """An exclusive lock on the file or folder that is at `path` now. A missing file is made. A folder must exist.

    As a context manager it raises LockedError if another process holds the lock, unless `wait` is set, and UsageError
    if nothing can be written there. The error names `what` the lock protects. The holder may delete the file.
    """

    def __init__(self, path: Path, what: str = "files", *, wait: bool = False) -> None:
        self.path, self.what, self.wait = path, what, wait
        self._fd: int | None = None

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock. Return False if another holds it and `wait` is not set."""
        if self._fd is not None:
            raise RuntimeError(f"this process already holds {self.path}")  # flock would wait for ourselves for ever
        while True:
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(os.stat(self.path), os.fstat(fd)):
                    break
            except BlockingIOError:
                os.close(fd)
                return False
            except FileNotFoundError:
                pass  # The holder before us deleted the file, so another process could lock a new one.
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        self._fd = fd
        _held.add(self)
        return True

    def _open(self) -> int:
        while True:
            if self.path.is_dir():
                return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                if self.path.is_symlink():
                    raise
                continue  # A writer that has just finished deleted the folder.

    def release(self) -> None:
        """Give the lock up, if this process holds it."""
        if self._fd is not None:
            _held.discard(self)
            os.close(self._fd)  # Closing the only descriptor of an open file releases its flock.
            self._fd = None

    def __enter__(self) -> FileLock:
        try:
            acquired = self.acquire(self.wait)
        except OSError as e:
            what = f"cannot write here: {e.strerror}"
            raise UsageError(what, where=self.path.parent, remedy="choose another place") from None
        if not acquired:
            what = f"another process is writing the {self.what}"
            raise LockedError(what, where=self.path, remedy="wait until it has finished")
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


_held: set[FileLock] = set()


def _forget() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget)

"""One writer at a time: an exclusive flock on a file, gone with the process that held it.

Invariant: whoever holds the lock holds it on the file that is at that path now; a process forked meanwhile does not,
so that one which outlives a killed writer keeps nobody out. Exercised by `corpus features`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LockedError, UsageError

_open: set[int] = set()


def _forget() -> None:
    while _open:
        os.close(_open.pop())


os.register_at_fork(after_in_child=_forget)


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock at `path`, or raise LockedError at once. The body may delete the lock file.

    UsageError: nothing can be written there.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # the folder was swept away by a writer that just finished
        except OSError as e:
            raise UsageError(
                f"cannot write here: {e.strerror}", where=path.parent, remedy="choose another place"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError(
                f"another process is writing the {what}", where=path, remedy="wait until it has finished"
            ) from None
        try:
            current = os.stat(path)
        except FileNotFoundError:
            current = None
        if current is not None and os.path.samestat(current, os.fstat(fd)):
            break
        os.close(fd)
    _open.add(fd)
    try:
        yield
    finally:
        if fd in _open:  # not in a forked process
            _open.remove(fd)
            os.close(fd)

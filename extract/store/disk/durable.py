"""Durable files: atomic writes, locks that die with their holder, scratch folders that sweep themselves.

Invariant: a name under the store either does not exist or has its whole content on disk (files that several writers
fill: their whole size); whatever a killed writer left lies under tmp/ and is removed by the next one, or is a draft
`.NAME.….tmp` that `store gc` removes. Run: `pytest tests/extract/pipeline/test_crash.py`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ....data.errors import LockedError, StoreError
from ....data.files.atomic import open_plain
from ..remote.paths import local, mirror_of
from .checksums import with_checksum
from .layout import Paths


def crash_point(name: str) -> None:
    """Called where a writer may die and must not lose anything; crash tests put a SIGKILL here."""


def fsync_folder(path: Path) -> None:
    fsync_all([path])


def fsync_all(paths: Iterable[Path]) -> None:
    """fsync files and folders, several at a time: a journal commits them together, one by one they each wait for it.

    Errors: the first OSError of any of them.
    """

    def sync(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    unique = list(dict.fromkeys(paths))
    if len(unique) == 1:
        sync(unique[0])
        return
    with ThreadPoolExecutor(min(16, max(1, len(unique)))) as threads:
        list(threads.map(sync, unique))


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write, fsync, rename, fsync the folder: afterwards `path` has all of `data`, or what it had before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_full_disk(path), open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            if _later.get() is None:
                os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    if (later := _later.get()) is not None:
        later += path, path.parent
    else:
        fsync_folder(path.parent)


_later: ContextVar[list[Path] | None] = ContextVar("_later", default=None)


@contextmanager
def synced_together() -> Iterator[None]:
    """What `write_bytes` writes in here is on disk at the end, all at once: for many files that nothing names yet."""
    paths: list[Path] = []
    token = _later.set(paths)
    try:
        yield
    finally:
        _later.reset(token)
    fsync_all(paths)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """With its checksum in it; see seals.py."""
    write_bytes(path, with_checksum(value, path.name))


def read_json(path: Path) -> Any:
    """Errors: FileNotFoundError; StoreError for what is no JSON, no plain file or of no size that a record has."""
    try:
        with open_plain(local(path)) as f:
            if os.fstat(f.fileno()).st_size > _LARGEST_JSON:
                raise StoreError("far too large", where=path, expected="JSON")
            return json.loads(f.read())
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as e:
        raise StoreError(f"cannot be read: {e}", where=path, expected="JSON") from e


_LARGEST_JSON = 1 << 30


@contextmanager
def explain_full_disk(where: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what to do; the store stays valid, so the same command resumes."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            "the disk is full; everything committed so far is safe",
            where=where,
            remedy="make room and give the same command again: it resumes",
        ) from e


class Lock:
    """An exclusive flock on a file; the kernel releases it when its holder dies, however it dies."""

    def __init__(self, path: Path, wait: bool = False) -> None:
        self.path, self._wait = path, wait
        self._fd: int | None = None

    def acquire(self, wait: bool = False) -> bool:
        """True where the lock is ours now; False where another holds it and `wait` is not set."""
        if self._fd is not None:
            raise RuntimeError(f"{self.path} is held already")  # flock would wait for ourselves, for ever
        mirror = mirror_of(self.path)
        if mirror is not None and not mirror.writes:
            raise StoreError(
                "this changes stores on a disk alone", where=mirror.url, remedy=f"aws s3 sync {mirror.url} FOLDER"
            )
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
        if self._fd is not None:
            os.close(self._fd)  # closing the only descriptor of this open file releases the flock
            self._fd = None

    def __enter__(self) -> Lock:
        if self._fd is None and not self.acquire(self._wait):
            raise LockedError("another process is writing here", where=self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Scratch:
    """A writer's folder under tmp/: same file system as the store, flock'ed while its owner lives."""

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
    """Remove the folders of dead writers (their flock is free). Callers hold the gate. Returns how many."""
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


def open_sized(path: Path, size: int) -> int:
    """A descriptor to write ranges of a file that has all its `size` bytes from the moment that it has its name.

    Its writers fill disjoint ranges and others read it meanwhile; none of them may find it shorter than it will be.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        allocate(fd, size)
        os.fsync(fd)
        os.link(draft, path)
    except FileExistsError:  # another writer was first
        os.close(fd)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        os.close(fd)
        raise
    finally:
        draft.unlink()
    return fd


def allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk shows before the work and not after."""
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is None:  # macOS
        os.ftruncate(fd, size)
        return
    try:
        reserve(fd, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written

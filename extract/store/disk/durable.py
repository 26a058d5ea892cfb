"""Durable files: atomic writes, batches of them, and files that several writers fill.

Guarantees: a name in a store does not exist or has its whole content on disk. A file that several writers fill has its
whole size. A killed writer leaves drafts `.NAME.….tmp`, which `store gc` removes.
Try: `pytest tests/extract/pipeline/test_crash.py`.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....data.errors import StoreError
from ....data.files.atomic import open_plain, sync, write_atomic
from .checksums import with_checksum

_LARGEST_JSON = 1 << 30


def write_bytes(path: Path, data: bytes | memoryview, durable: bool = True) -> None:
    """Replace a file, whose folder is made if it is missing: afterwards `path` has all of `data`, or what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        write_atomic(path, data, durable=durable)


class WriteBatch:
    """Files that are written at once and synced together at the end, for many files that nothing names yet."""

    def __init__(self) -> None:
        self._paths: list[Path] = []

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file, as `write_bytes` does, whose content is on disk only after `sync`."""
        write_bytes(path, data, durable=False)
        self._paths += path, path.parent

    def sync(self) -> None:
        """Return when all that was written is on disk."""
        sync(*self._paths)
        self._paths = []


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file with its checksum (see checksums.py)."""
    write_bytes(path, with_checksum(value, path.name))


def read_json(path: Path, where: str | None = None) -> Any:
    """Return what a JSON file holds. `where` names it in errors.

    Raises FileNotFoundError, or StoreError for any other file that is no record.
    """
    try:
        with open_plain(path) as f:
            if os.fstat(f.fileno()).st_size > _LARGEST_JSON:
                raise StoreError("far too large", where=where or path, expected="JSON")
            return json.loads(f.read())
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as e:
        raise StoreError(f"cannot be read: {e}", where=where or path, expected="JSON") from e


@contextmanager
def explain_full_disk(where: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what to do. The store stays valid, so the same command resumes.

    A limit on the size of files (`ulimit -f`, or the file system's) is named likewise.
    """
    try:
        yield
    except OSError as e:
        if e.errno == errno.EFBIG:
            what, remedy = "a file may not become so large here", "raise the limit (ulimit -f), or choose another disk"
            raise StoreError(what, where=where, remedy=remedy) from e
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some disk space and give the same command again: it resumes"
        raise StoreError("the disk is full; everything committed so far is safe", where=where, remedy=remedy) from e


def open_sized(path: Path, size: int) -> int:
    """Return a descriptor to write ranges of a file, which has all its `size` bytes as soon as it has its name.

    Writers fill disjoint ranges while others read, and none of them may find the file shorter than it will be.
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
    except FileExistsError:  # Another writer was first.
        os.close(fd)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        os.close(fd)
        raise
    finally:
        draft.unlink()
    return fd


def allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk shows before the work and not after it."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as e:  # macOS has no such function, and some file systems do not support it.
        if isinstance(e, OSError) and e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written

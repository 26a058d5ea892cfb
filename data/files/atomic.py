"""Files that are replaced whole, files that outlast a crash of the machine, and reads that wait for no pipe.

Guarantees: after a kill at any moment a path holds its old content or its new content.
Try: `pytest tests/data/files/test_atomic.py`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path

from .trouble import os_error


@contextmanager
def draft_of(path: Path, *, folder: Path | None = None, suffix: str = ".tmp", durable: bool = True) -> Iterator[Path]:
    """Yield the path of a draft, which replaces `path` when the block ends without an exception.

    An exception deletes the draft. A kill leaves it, and `sweep_drafts` deletes it later. The draft lies in `folder`,
    on the same file system, or beside `path`. Some libraries choose a format by its `suffix`. If it is not `durable`,
    the caller syncs the file and its folder, with many others at once.
    """
    draft = (folder or path.parent) / f".{path.name}.{secrets.token_hex(4)}{suffix}"
    try:
        with named(path, draft):
            yield draft
            if durable:
                sync(draft)
            os.replace(draft, path)
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be deleted either
            draft.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


@contextmanager
def named(path: Path, draft: Path | None = None) -> Iterator[None]:
    """Give an OSError of the block that names no file, as those of writes do, or the `draft`, the name of this one."""
    try:
        yield
    except OSError as e:
        if e.errno is not None and e.filename in (None, str(draft)):
            e.filename = str(path)
        raise


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give a new file, which a library writes in the block, the mode that the umask asks for.

    An exception that has the number of a system error in its text is raised as OSError.
    """
    with named(path):
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        try:
            yield
        except Exception as e:
            raise (os_error(e, path) or e) from None
        os.chmod(path, mode)


def write_atomic(path: Path, data: bytes | memoryview | str, *, durable: bool = True) -> None:
    """Replace a file by `data`, text as UTF-8. See `draft_of`."""
    with draft_of(path, durable=durable) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


def sweep_drafts(folder: Path) -> None:
    """Delete the drafts that killed processes left in a folder. The caller holds the lock of its writers."""
    for draft in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        draft.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """fsync files and folders, several at a time, because a journal commits them together."""
    unique = list(dict.fromkeys(paths))
    if len(unique) == 1:
        _sync(unique[0])
    elif unique:
        with ThreadPoolExecutor(min(16, len(unique))) as threads:
            list(threads.map(_sync, unique))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def plain_descriptor(path: Path) -> int:
    """Open a regular file and return a descriptor to read from. Raises OSError at once for a pipe or a device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return fd


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file to read bytes from. Raises OSError as `plain_descriptor`."""
    return BufferedReader(FileIO(plain_descriptor(path)))


def read_plain(path: Path) -> bytes:
    """Return all bytes of a regular file. Raises OSError as `plain_descriptor`."""
    with open_plain(path) as file:
        return file.read()


def sha256_plain(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal. Raises OSError as `plain_descriptor`."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Making what was written outlast a crash of the machine.

Invariant: when `sync` returns, the file's content, or the folder's list of names, is on disk.
Exercised by `stillhouse corpus features` and `stillhouse train`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def plain_descriptor(path: Path) -> int:
    """A descriptor to read from. OSError as from os.open, and for a pipe, a device or a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return fd


def open_plain(path: Path) -> BufferedReader:
    """The same as a file."""
    return BufferedReader(FileIO(plain_descriptor(path)))


def read_plain(path: Path) -> bytes:
    """All of it."""
    with open_plain(path) as file:
        return file.read()


def sha256_plain(path: Path) -> str:
    """Hexadecimal, of the whole file."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

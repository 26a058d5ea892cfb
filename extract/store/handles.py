"""File handles of one process on shard files, opened when first read.

Invariant: no handle is used by a process that did not open it (they are keyed by pid), and nothing is opened at
import, at `Store.open` or while unpickling. Run: `pytest tests/extract/test_reader.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.data.errors import StoreError

from .layout import footer_bytes, identity_rows

MOST_HANDLES = 512


class Handles:
    """path → descriptor, least recently opened closed first. `open` checks the shard's footer once a process."""

    def __init__(self) -> None:
        self._pid = -1
        self._fds: dict[Path, int | None] = {}

    def open(self, path: Path, shard_rows: int, row_bytes: int, used_rows: int) -> int | None:
        """A descriptor to `pread` rows from; None where the file's layout is not the identity (read it with zarr).

        Errors: StoreError where the file is gone, too short, or its footer is damaged.
        """
        if self._pid != os.getpid():
            # A parent's descriptors are left alone: they are the parent's to close.
            self._pid, self._fds = os.getpid(), {}
        if path in self._fds:
            return self._fds[path]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise StoreError("a committed shard file is missing", where=path, remedy=_VERIFY) from e
        try:
            size, tail = os.fstat(fd).st_size, footer_bytes(shard_rows)
            held = identity_rows(os.pread(fd, tail, max(0, size - tail)), shard_rows, row_bytes)
        except StoreError as e:
            os.close(fd)
            raise StoreError(e.what, where=path, remedy=_VERIFY) from e
        entry: int | None = fd
        if held is None:
            os.close(fd)
            entry = None
        elif held < used_rows or size != held * row_bytes + tail:
            os.close(fd)
            raise StoreError("a committed shard file has the wrong size", where=path, remedy=_VERIFY)
        if len(self._fds) >= MOST_HANDLES:
            old = self._fds.pop(next(iter(self._fds)))
            if old is not None:
                os.close(old)
        self._fds[path] = entry
        return entry

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self._pid == os.getpid():
            for fd in self._fds.values():
                if fd is not None:
                    os.close(fd)
        self._fds = {}


_VERIFY = "stillhouse inspect verify STORE names what is damaged"

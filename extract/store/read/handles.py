"""File handles of one process on shard files, opened when first read.

Guarantees: no handle is used by a process that did not open it. Nothing is opened at import, at `Store.open` or while
unpickling.
Try: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import stat
from collections.abc import Sequence
from pathlib import Path

from ....data.errors import StoreError
from ..disk.files import BlockReader, StoreFiles
from ..disk.layout import footer_bytes, identity_rows

RENEWALS = 3  # how often damaged bytes of an object store are fetched again
_VERIFY = "stillhouse inspect verify STORE names what is damaged"


def most_handles() -> int:
    """Return how many shard files stay open: each takes two descriptors, and half are left for others."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 4))


class Handle:
    """An open shard file: a descriptor to `pread` from and a memory map for what is in memory already, or `blocks`.

    The descriptor is closed with the last reference, so `Handles` may forget a handle that is in use.
    """

    __slots__ = ("blocks", "fd", "map", "path")

    def __init__(self, path: Path, fd: int, mapped: memoryview, blocks: BlockReader | None = None) -> None:
        self.path, self.fd, self.map, self.blocks = path, fd, mapped, blocks

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Handles:
    """Open shard files by path. The first opened is closed first, and `open` checks a footer once a process."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._pid = -1
        self._open: dict[Path, Handle | None] = {}
        self._most = most_handles()

    def opened(self, paths: Sequence[Path]) -> list[Handle | None] | None:
        """Return the handles of files that are all open, or None. This is much faster than `open` for each."""
        if self._pid != os.getpid():
            return None
        try:
            return [self._open[path] for path in paths]
        except KeyError:
            return None

    def open(self, path: Path, shard_rows: int, row_bytes: int, used_rows: int) -> Handle | None:
        """Return a handle, or None for a sound file in another layout than this package writes (read it with zarr)."""
        if self._pid != os.getpid():
            # The fork has copied the parent's descriptors; they are closed before any other is opened.
            self._pid, self._open = os.getpid(), {}
        try:
            return self._open[path]
        except KeyError:
            pass
        where = self._files.place(path)
        try:
            blocks = self._files.blocks(path)
            if blocks is not None:
                return self._keep(path, _through_blocks(blocks, path, where, shard_rows, row_bytes, used_rows))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # O_NONBLOCK: a named pipe would wait.
        except FileNotFoundError as e:
            raise StoreError("a committed shard file is missing", where=where, remedy=_VERIFY) from e
        except OSError as e:
            raise StoreError(f"a committed shard file cannot be opened: {e.strerror}", where=path) from e
        handle: Handle | None = None
        try:
            size, tail = os.fstat(fd).st_size, footer_bytes(shard_rows)
            if not stat.S_ISREG(os.fstat(fd).st_mode) or size < tail:
                raise StoreError("a committed shard file is too short, or not a regular file")
            held = identity_rows(os.pread(fd, tail, max(0, size - tail)), shard_rows, row_bytes)
            if held is not None and (held < used_rows or size != held * row_bytes + tail):
                raise StoreError("a committed shard file has the wrong size")
            if held is not None:
                mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
                if hasattr(mmap, "MADV_RANDOM"):
                    mapped.madvise(mmap.MADV_RANDOM)
                handle = Handle(path, fd, memoryview(mapped))
        except StoreError as e:
            raise StoreError(e.what, where=path, remedy=_VERIFY) from e
        finally:
            if handle is None:
                os.close(fd)
        return self._keep(path, handle)

    def _keep(self, path: Path, handle: Handle | None) -> Handle | None:
        if len(self._open) >= self._most:
            self._open.pop(next(iter(self._open)))
        self._open[path] = handle
        return handle

    def close(self) -> None:
        """Close all."""
        self._open = {}

    def unmap(self) -> None:
        """Close the files that are read through their map, so that their pages no longer count as this process's."""
        self._open = {p: h for p, h in self._open.items() if h is not None and h.blocks is not None}


def _through_blocks(
    blocks: BlockReader, path: Path, where: str, shard_rows: int, row_bytes: int, used_rows: int
) -> Handle:
    tail = bytearray(footer_bytes(shard_rows))
    begin = max(0, blocks.size - len(tail))
    blocks.read(memoryview(tail), begin)
    for attempt in range(RENEWALS + 1):
        try:
            rows = identity_rows(bytes(tail), shard_rows, row_bytes)
            break
        except StoreError as e:
            if attempt == RENEWALS:
                raise StoreError(e.what, where=where, remedy=_VERIFY) from e
            blocks.renew(begin, len(tail))
            blocks.read(memoryview(tail), begin)
    if rows is None:
        raise StoreError("its layout is another than ours", where=where, remedy="copy the store to a disk to read it")
    if rows < used_rows or blocks.size != rows * row_bytes + len(tail):
        raise StoreError("a committed shard file has the wrong size", where=where, remedy=_VERIFY)
    return Handle(path, -1, memoryview(b""), blocks)

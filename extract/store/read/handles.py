"""File handles of one process on shard files, opened when first read.

Invariant: no handle is used by a process that did not open it (they are keyed by pid), and nothing is opened at
import, at `Store.open` or while unpickling. Run: `pytest tests/extract/store/test_reader.py`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import stat
from pathlib import Path

from ....data.errors import StoreError
from ..disk.layout import footer_bytes, identity_rows
from ..remote.block_cache import Blocks
from ..remote.client import Missing
from ..remote.mirror import Mirror
from ..remote.paths import mirror_of


def most_handles() -> int:
    """How many shard files stay open: a map holds a descriptor of its own, so two each, and half are left to others."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 4))


class Handle:
    """An open shard file: a descriptor to `pread` from, and its memory map for what is in memory already; or, of a
    remote store, the `blocks` to read it through.

    The descriptor is closed with the last reference, so a handle that is in use may be forgotten by `Handles`.
    """

    __slots__ = ("blocks", "fd", "map", "path")

    def __init__(self, path: Path, fd: int, mapped: memoryview, blocks: Blocks | None = None) -> None:
        self.path, self.fd, self.map, self.blocks = path, fd, mapped, blocks

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Handles:
    """path → handle, the first opened closed first. `open` checks the shard's footer once a process."""

    def __init__(self) -> None:
        self._pid = -1
        self._open: dict[Path, Handle | None] = {}
        self._most = most_handles()

    def open(self, path: Path, shard_rows: int, row_bytes: int, used_rows: int) -> Handle | None:
        """A handle; None where the file's layout is not the identity (read it with zarr).

        Errors: StoreError where the file is gone, too short, or its footer is damaged.
        """
        if self._pid != os.getpid():
            # Inherited descriptors share nothing with the parent's but the file, and are closed before any is opened.
            self._pid, self._open = os.getpid(), {}
        try:
            return self._open[path]
        except KeyError:
            pass
        mirror = mirror_of(path)
        if mirror is not None and not path.exists():
            return self._keep(path, _remote(mirror, path, shard_rows, row_bytes, used_rows))
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe would wait
        except FileNotFoundError as e:
            raise StoreError("a committed shard file is missing", where=path, remedy=_VERIFY) from e
        except OSError as e:
            raise StoreError(f"a committed shard file cannot be opened: {e.strerror}", where=path) from e
        handle: Handle | None = None
        try:
            size, tail = os.fstat(fd).st_size, footer_bytes(shard_rows)
            if not stat.S_ISREG(os.fstat(fd).st_mode) or size < tail:
                raise StoreError("a committed shard file is too short, or no plain file")
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
        self._open = {}


def _remote(mirror: Mirror, path: Path, shard_rows: int, row_bytes: int, used_rows: int) -> Handle:
    where = f"{mirror.url}/{mirror.key(path)}"
    try:
        blocks = Blocks(mirror, path)
    except Missing as e:
        raise StoreError("a committed shard file is missing", where=where, remedy=_VERIFY) from e
    tail = bytearray(footer_bytes(shard_rows))
    blocks.read(memoryview(tail), max(0, blocks.size - len(tail)))
    held = identity_rows(bytes(tail), shard_rows, row_bytes)
    if held is None:
        raise StoreError("its layout is another than ours", where=where, remedy="copy the store to a disk to read it")
    if held < used_rows or blocks.size != held * row_bytes + len(tail):
        raise StoreError("a committed shard file has the wrong size", where=where, remedy=_VERIFY)
    return Handle(path, -1, memoryview(b""), blocks)


_VERIFY = "stillhouse inspect verify STORE names what is damaged"

"""Shard files of an object store, read in blocks through a cache on this disk that all processes share.

Guarantees: a block's name holds the version of its file, and its bytes are compared with their checksum before a
process uses them. Blocks that were used longest ago are removed when the cache is full.
Try: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Iterable
from typing import Any

from ....data.errors import StoreError
from .cache import cache_folder
from .client import Conflict, Missing, Objects

BLOCK_BYTES = 1 << 20
JOINED_BLOCKS = 8  # neighbours that are asked for in one request
TOUCH_S = 60.0  # A block in use is marked as used this often.
_CACHE = "give it more space: STILLHOUSE_CACHE_BYTES, or another disk: STILLHOUSE_CACHE"


class CachedFile:
    """One file of an object store, read through the cache. Raises Missing where there is no such object."""

    def __init__(self, objects: Objects, key: str) -> None:
        self.objects, self.key = objects, key
        meta = objects.head(key)
        self.size, self.etag = int(meta["size"]), meta["etag"]
        name = hashlib.blake2b(f"{objects.url} {key} {self.etag}".encode(), digest_size=12).hexdigest()
        self.folder = cache_folder() / "blocks" / name[:2] / name
        self._asked: dict[int, Any] = {}
        self._checked: dict[int, float] = {}

    def ask(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch what ranges (offset, bytes) need and the cache lacks, many requests at a time."""
        need: set[int] = set()
        for offset, size in ranges:
            need.update(range(offset // BLOCK_BYTES, -(-min(offset + size, self.size) // BLOCK_BYTES)))
        lacking = sorted(n for n in need if n not in self._asked and not (self.folder / str(n)).exists())
        while lacking:
            count = 1
            while count < min(len(lacking), JOINED_BLOCKS) and lacking[count] == lacking[0] + count:
                count += 1
            span = (lacking[0], lacking[0] + count)
            request = self.objects.ask_blocks(self.key, self.folder, span, BLOCK_BYTES, self.size, self.etag)
            self._asked |= dict.fromkeys(range(*span), request)
            del lacking[:count]

    def read(self, into: memoryview, offset: int) -> int:
        """Fill `into` from `offset` on and return the bytes read, fewer at the end of the file."""
        done, size = 0, max(0, min(len(into), self.size - offset))
        while done < size:
            number, inside = divmod(offset + done, BLOCK_BYTES)
            part = into[done : min(size, done + BLOCK_BYTES - inside)]
            self._read_block(number, inside, part)
            done += len(part)
        return done

    def copy(self, whole: bool) -> int:
        """Return a descriptor of a temporary copy; without `whole`, only its last block is filled."""
        begin = 0 if whole else max(0, self.size - BLOCK_BYTES)
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()) as copy:
            copy.truncate(self.size)
            self.ask([(begin, self.size - begin)])
            for offset in range(begin, self.size, BLOCK_BYTES):
                part = bytearray(min(BLOCK_BYTES, self.size - offset))
                self.read(memoryview(part), offset)
                os.pwrite(copy.fileno(), part, offset)
            return os.dup(copy.fileno())

    def _read_block(self, number: int, inside: int, part: memoryview) -> None:
        for _ in range(3):  # Another process may remove the block between the fetch and the read.
            self.ask([(number * BLOCK_BYTES + inside, len(part))])
            request = self._asked.get(number)
            if request is not None:
                try:
                    self.objects.wait(request)
                except (Missing, Conflict) as e:
                    what, where = "a shard was replaced while it was read", f"{self.objects.url}/{self.key}"
                    raise StoreError(what, where=where, remedy="open the store again") from e
                finally:
                    self._asked = {n: r for n, r in self._asked.items() if r is not request}
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self.folder / str(number), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if not self._is_whole(fd, number):
                        (self.folder / str(number)).unlink(missing_ok=True)
                    elif os.preadv(fd, [part], inside) == len(part):
                        return
                finally:
                    os.close(fd)
        raise StoreError("the cache loses blocks as fast as they come", where=self.folder, remedy=_CACHE)

    def _is_whole(self, fd: int, number: int) -> bool:
        """Whether a block is what came. It is checked once a process, since the disk may have lost power."""
        now = time.monotonic()
        last = self._checked.get(number)
        if last is not None and now - last < TOUCH_S:
            return True
        with contextlib.suppress(OSError):
            os.utime(self.folder / str(number))  # `evict` removes what was used longest ago.
        self._checked[number] = now
        if last is not None:
            return True
        size = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
        data = os.pread(fd, size + 5, 0)
        return len(data) == size + 4 and zlib.crc32(data[:-4]).to_bytes(4, "little") == data[-4:]

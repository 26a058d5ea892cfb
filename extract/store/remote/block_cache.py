"""Shard files of an object store, read in blocks through a cache on this disk that all processes share.

Guarantees: a block's name holds the version of its file, and its bytes are compared with their checksum before a
process uses them. Whoever finds other bytes than the store's own checksums say has them fetched again (`renew`). Blocks
that were used longest ago are removed when the cache is full.
Try: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from ....data.errors import StoreError
from ..disk.durable import pwrite_all
from .cache import TOUCH_S, cache_error, cache_folder, made_folder, mark_used
from .client import Conflict, Missing, Objects

BLOCK_BYTES = 1 << 20
JOINED_BLOCKS = 8  # neighbours that are asked for in one request
_CACHE = "give it more space: STILLHOUSE_CACHE_BYTES, or another disk: STILLHOUSE_CACHE"


class CachedFile:
    """One file of an object store, read through the cache. Raises Missing where there is no such object."""

    def __init__(self, objects: Objects, key: str, note_renewed: Callable[[], None]) -> None:
        self.objects, self.key, self._note_renewed = objects, key, note_renewed
        self.where = f"{objects.url}/{key}"
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
        self._fetch(sorted(n for n in need if n not in self._asked and not (self.folder / str(n)).exists()))

    def _fetch(self, numbers: list[int]) -> None:
        """Begin to fetch blocks, given in ascending order."""
        at = 0
        while at < len(numbers):
            count = 1
            while at + count < len(numbers) and count < JOINED_BLOCKS and numbers[at + count] == numbers[at] + count:
                count += 1
            span = (numbers[at], numbers[at] + count)
            request = self.objects.ask_blocks(self.key, self.folder, span, BLOCK_BYTES, self.size, self.etag)
            self._asked |= dict.fromkeys(range(*span), request)
            at += count

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
        folder = made_folder(cache_folder())
        with tempfile.TemporaryFile(dir=folder) as copy:
            try:
                copy.truncate(self.size)
                self.ask([(begin, self.size - begin)])
                for offset in range(begin, self.size, BLOCK_BYTES):
                    part = bytearray(min(BLOCK_BYTES, self.size - offset))
                    self.read(memoryview(part), offset)
                    pwrite_all(copy.fileno(), memoryview(part), offset)
                return os.dup(copy.fileno())
            except OSError as e:
                raise cache_error(e, folder) from e

    def renew(self, offset: int, size: int) -> bool:
        """Fetch the blocks of a range again, and return whether other bytes came than the cache had."""
        numbers = list(range(offset // BLOCK_BYTES, -(-min(offset + size, self.size) // BLOCK_BYTES)))
        before = {n: self._stored(n) for n in numbers}
        self._fetch(numbers)
        for n in numbers:
            self._wait(n)
        return any(before[n] != self._stored(n) for n in numbers)

    def _stored(self, number: int) -> bytes | None:
        try:
            return (self.folder / str(number)).read_bytes()
        except OSError:
            return None

    def _wait(self, number: int) -> None:
        request = self._asked.get(number)
        if request is None:
            return
        try:
            self.objects.wait(request)
        except (Missing, Conflict) as e:
            what = "a shard was replaced while it was read"
            raise StoreError(what, where=self.where, remedy="open the store again") from e
        finally:
            self._asked = {n: r for n, r in self._asked.items() if r is not request}

    def _read_block(self, number: int, inside: int, part: memoryview) -> None:
        path = self.folder / str(number)
        for _ in range(3):  # Another process may remove the block between the fetch and the read.
            self.ask([(number * BLOCK_BYTES + inside, len(part))])
            self._wait(number)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if not self._is_whole(fd, number):
                        self._note_renewed()
                        path.unlink(missing_ok=True)
                    elif os.preadv(fd, [part], inside) == len(part):
                        return
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue
            except OSError as e:
                raise cache_error(e, path) from e
        raise StoreError("the cache loses blocks as fast as they come", where=self.folder, remedy=_CACHE)

    def _is_whole(self, fd: int, number: int) -> bool:
        """Whether a block is what came. It is checked once a process, since the disk may have lost power."""
        now = time.monotonic()
        last = self._checked.get(number)
        if last is not None and now - last < TOUCH_S:
            return True
        mark_used(self.folder / str(number))
        self._checked[number] = now
        if last is not None:
            return True
        size = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
        data = os.pread(fd, size + 5, 0)
        return len(data) == size + 4 and zlib.crc32(data[:-4]).to_bytes(4, "little") == data[-4:]

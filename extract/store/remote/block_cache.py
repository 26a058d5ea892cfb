"""Shard files of an object store, read in blocks through a cache on this disk that all processes share.

Invariant: a block's name holds the generation of its file, and its bytes are compared with their checksum before a
process uses it. `transfers.py` fetches blocks and drops what was used longest ago.
Run: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ....data.errors import StoreError
from ....data.files.atomic import plain_descriptor
from .client import Conflict, Missing, cache_folder
from .mirror import Mirror
from .paths import mirror_of

BLOCK_BYTES = 1 << 20
JOINED_BLOCKS = 8  # neighbours that are asked for in one request
TOUCH_S = 60.0  # a block in use is marked as used this often
_CACHE = "give it more room: STILLHOUSE_CACHE_BYTES, or another disk: STILLHOUSE_CACHE"


class Blocks:
    """One remote shard file, read through the cache. Errors of reading: StoreError."""

    def __init__(self, mirror: Mirror, path: Path) -> None:
        self.mirror, self.path, self.key = mirror, path, mirror.key(path)
        meta = mirror.objects.head(self.key)  # Missing is the caller's
        self.size, self.etag = int(meta["size"]), meta["etag"]
        name = hashlib.blake2b(f"{mirror.url} {self.key} {self.etag}".encode(), digest_size=12).hexdigest()
        self.folder = cache_folder() / "blocks" / name[:2] / name
        self._asked: dict[int, Any] = {}
        self._seen: dict[int, float] = {}

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
            sent = self.mirror.objects.send(
                "blocks", self.key, folder=str(self.folder), first=lacking[0], last=lacking[0] + count,
                block=BLOCK_BYTES, size=self.size, if_match=self.etag,
            )  # fmt: skip
            self._asked |= dict.fromkeys(range(lacking[0], lacking[0] + count), sent)
            del lacking[:count]

    def read(self, into: memoryview, offset: int) -> int:
        """Fill `into` from `offset` on; returns the bytes read, fewer at the end of the file."""
        done, size = 0, max(0, min(len(into), self.size - offset))
        while done < size:
            number, inside = divmod(offset + done, BLOCK_BYTES)
            part = into[done : min(size, done + BLOCK_BYTES - inside)]
            self._read_block(number, inside, part)
            done += len(part)
        return done

    def _read_block(self, number: int, inside: int, part: memoryview) -> None:
        for _ in range(3):  # another process may drop it between our fetching and our reading
            self.ask([(number * BLOCK_BYTES + inside, len(part))])
            sent = self._asked.get(number)
            if sent is not None:
                try:
                    self.mirror.objects.wait(sent)
                except (Missing, Conflict) as e:
                    raise StoreError(
                        "a shard was replaced while it was read",
                        where=f"{self.mirror.url}/{self.key}",
                        remedy="open the store again",
                    ) from e
                finally:
                    self._asked = {n: s for n, s in self._asked.items() if s is not sent}
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self.folder / str(number), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if self._whole(fd, number):
                        if os.preadv(fd, [part], inside) == len(part):
                            return
                    else:
                        (self.folder / str(number)).unlink(missing_ok=True)
                finally:
                    os.close(fd)
        raise StoreError("the cache loses blocks as fast as they come", where=self.folder, remedy=_CACHE)

    def _whole(self, fd: int, number: int) -> bool:
        """Whether a block is what came: looked at once a process, for the disk may have lost power since."""
        now = time.monotonic()
        last = self._seen.get(number)
        if last is not None and now - last < TOUCH_S:
            return True
        with contextlib.suppress(OSError):
            os.utime(self.folder / str(number))  # `evict` removes what was used longest ago
        self._seen[number] = now
        if last is not None:
            return True
        size = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
        data = os.pread(fd, size + 5, 0)
        return len(data) == size + 4 and zlib.crc32(data[:-4]).to_bytes(4, "little") == data[-4:]


def descriptor(path: Path, whole: bool) -> int:
    """A file descriptor of a shard file; of a remote one, on a temporary copy of its end, or of all of it.

    Errors: OSError as from os.open, and for what is no plain file.
    """
    mirror = mirror_of(path)
    if mirror is None or path.exists():
        return plain_descriptor(path)
    try:
        blocks = Blocks(mirror, path)
    except Missing as e:
        raise FileNotFoundError(2, os.strerror(2), str(path)) from e
    begin = 0 if whole else max(0, blocks.size - BLOCK_BYTES)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache_folder()) as copy:
        copy.truncate(blocks.size)
        blocks.ask([(begin, blocks.size - begin)])
        for offset in range(begin, blocks.size, BLOCK_BYTES):
            part = bytearray(min(BLOCK_BYTES, blocks.size - offset))
            blocks.read(memoryview(part), offset)
            os.pwrite(copy.fileno(), part, offset)
        return os.dup(copy.fileno())

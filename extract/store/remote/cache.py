"""The folder on this disk for what comes from object stores, its limit, and files there that prove themselves.

Guarantees: a file of the cache is whole or absent, and what a disk has damaged since is found before it is used.
`evict` removes only what can be fetched again, and one process at a time removes. Trouble with this disk is called
that, and never the object store's.
Try: `pytest tests/extract/store/test_remote.py -k bounded`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from ....data.errors import StoreError, UsageError
from ....data.files.lock import FileLock

TOUCH_S = 60.0  # A file in use is marked as used this often.
HELD_S = 600.0  # Files of a store's plan that were used so short a time ago stay: a process may be about to open them.
OTHER_CACHE = "name another folder with STILLHOUSE_CACHE, or a smaller size with STILLHOUSE_CACHE_BYTES"


def cache_folder() -> Path:
    """Return $STILLHOUSE_CACHE, or the folder `stillhouse` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("STILLHOUSE_CACHE") or os.path.join(home, "stillhouse"))


def made_folder(folder: Path) -> Path:
    """Make a folder of the cache and return it. Raises StoreError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise cache_error(e, folder) from e
    return folder


def cache_error(e: OSError, where: Path) -> StoreError:
    """Return the error for a cache on this disk that cannot be used."""
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk of the cache is full" if full else f"the cache cannot be used: {e.strerror or e}"
    return StoreError(what, where=where, expected="a folder on this disk that may be written", remedy=OTHER_CACHE)


def cache_limit_bytes() -> int:
    """Return $STILLHOUSE_CACHE_BYTES, or half of the disk's free bytes, at most 200 GB.

    Raises UsageError for a number that is none, or that is beyond what the disk can hold.
    """
    given = os.environ.get("STILLHOUSE_CACHE_BYTES")
    folder = made_folder(cache_folder())
    free = shutil.disk_usage(folder).free
    if given is None:
        return min(200 * 10**9, free // 2)
    if not given.isdecimal() or int(given) < 1 << 20:
        raise UsageError(f"STILLHOUSE_CACHE_BYTES={given}", expected="bytes, a million at least")
    limit = int(given)
    if limit > free and limit > (most := free + sum(size for _, size, _ in _files(folder))):
        what = f"STILLHOUSE_CACHE_BYTES={given} is more than the disk of the cache can hold"
        expected = f"at most {most}, the bytes that are free or hold the cache already"
        raise UsageError(what, where=folder, expected=expected, remedy="give fewer, or another disk: STILLHOUSE_CACHE")
    return limit


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of the cache under its name when it is whole. Raises StoreError where this disk does not let us."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    for last in (False, True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as f:
                for part in parts:
                    f.write(part)
            os.replace(draft, path)
            return
        except OSError as e:
            with contextlib.suppress(OSError):
                draft.unlink()
            # Another process may have removed the folder or the draft meanwhile.
            if last or not isinstance(e, FileNotFoundError):
                raise cache_error(e, path) from e


def mark_used(path: Path) -> None:
    """Note that a file of the cache is in use now, which `evict` goes by."""
    for file in (path, _seal(path)):
        with contextlib.suppress(OSError):
            os.utime(file)


def keep(path: Path, data: bytes, etag: str) -> None:
    """Write a file of the cache that came whole, and beside it what it is recognised by."""
    write_file(_seal(path), f"{len(data)} {zlib.crc32(data):08x} {etag}".encode())
    write_file(path, data)


def kept_etag(path: Path) -> str | None:
    """Return the etag of a file that `keep` has written; None where there is none, or where it is damaged."""
    try:
        data, seal = path.read_bytes(), _seal(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    size, _, rest = seal.partition(" ")
    crc, _, etag = rest.partition(" ")
    return etag if (size, crc) == (str(len(data)), f"{zlib.crc32(data):08x}") else None


def is_sealed(path: Path) -> bool:
    """Return whether there is what a file of `keep` is recognised by. `evict` may have removed it."""
    return _seal(path).exists()


def _seal(path: Path) -> Path:
    return path.with_name(f".{path.name}.sum")


def evict(cache: Path, limit: int) -> None:
    """Remove what was used longest ago until a tenth of `limit` bytes is free, unless another process does so.

    The files of stores that are in use stay, blocks excepted, which have a quarter of the limit in any case.
    """
    lock = FileLock(cache / "lock")
    if not lock.acquire():
        return
    try:
        files, mirrors, now = sorted(_files(cache)), os.path.join(cache, "mirrors", ""), time.time()
        held = {path: size for used, size, path in files if path.startswith(mirrors) and now - used < HELD_S}
        files = [file for file in files if file[2] not in held]
        total, limit = sum(size for _, size, _ in files), max(limit - sum(held.values()), limit // 4)
        left = limit - limit // 10 if total > limit else total
        for _, size, path in files:
            if total <= left:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
    finally:
        lock.release()


def _files(cache: Path) -> Iterator[tuple[float, int, str]]:
    """Yield (last use, bytes, path) of what can be fetched again. The folders of writers are left out."""
    for base in ("blocks", "mirrors"):
        for folder, _, names in os.walk(cache / base):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    s = os.stat(path)
                    yield max(s.st_mtime, s.st_atime), s.st_size, path

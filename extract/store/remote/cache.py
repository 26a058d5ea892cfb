"""The folder on this disk for what comes from object stores, and its limit.

Guarantees: `evict` removes only what can be fetched again, and one process at a time removes.
Try: `pytest tests/extract/store/test_remote.py -k bounded`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ....data.errors import UsageError
from ....data.files.lock import FileLock


def cache_folder() -> Path:
    """Return $STILLHOUSE_CACHE, or the folder `stillhouse` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("STILLHOUSE_CACHE") or os.path.join(home, "stillhouse"))


def cache_limit_bytes() -> int:
    """Return $STILLHOUSE_CACHE_BYTES, or half of the disk's free bytes, at most 200 GB."""
    given = os.environ.get("STILLHOUSE_CACHE_BYTES")
    if given is not None:
        if not given.isdigit() or int(given) < 1 << 20:
            raise UsageError(f"STILLHOUSE_CACHE_BYTES={given}", expected="bytes, a million at least")
        return int(given)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return min(200 * 10**9, shutil.disk_usage(folder).free // 2)


def evict(cache: Path, limit: int) -> None:
    """Remove what was used longest ago until a tenth of `limit` bytes is free, unless another process does so."""
    lock = FileLock(cache / "lock")
    if not lock.acquire():
        return
    try:
        files = sorted(_files(cache))
        total = sum(size for _, size, _ in files)
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

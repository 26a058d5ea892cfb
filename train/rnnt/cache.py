"""Where numba keeps compiled kernels: beside their sources, in the user's cache, or in a private temporary folder.

numba loads what it finds in such a folder and runs it.
Guarantees: the temporary folder belongs to this user, and no other user can write to it or put another in its place.
Try: `pytest tests/train/rnnt/test_cache.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from typing import Any

from numba import config, njit


def compiled(function, **options):
    """Compile a function with njit, without the interpreter's lock, and keep what is compiled where that works."""
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # numba can write neither beside the source nor under HOME.
        folder = private_folder()
    if folder is None:
        return njit(nogil=True, **options)(function)
    settings: Any = config  # It gets its names when it is imported.
    before, settings.CACHE_DIR = settings.CACHE_DIR, folder
    try:
        return njit(cache=True, nogil=True, **options)(function)
    finally:
        settings.CACHE_DIR = before


@functools.cache
def private_folder() -> str | None:
    """Return a folder for temporary files that only this user can have written to, or None."""
    try:
        parent = tempfile.gettempdir()
        folder = os.path.join(parent, f"stillhouse-numba-{os.getuid()}")
        above = os.stat(parent)
        if above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX:
            return None  # Anybody may rename the folder and put another in its place.
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
        return folder if mine and os.access(folder, os.W_OK | os.X_OK) else None
    except OSError:
        return None

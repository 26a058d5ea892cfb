"""Making what was written outlast a crash of the machine.

Invariant: when `sync` returns, the file's content, or the folder's list of names, is on disk.
Exercised by `stillhouse corpus features` and `stillhouse train`.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

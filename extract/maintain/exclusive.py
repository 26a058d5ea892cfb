"""What the commands that delete from a store share: exclusive access to the plan, and its replacement.

Guarantees: store.json is replaced once, when everything that it names is on disk. A killed command leaves the old or
the new store.
Try: `pytest tests/extract/maintain/test_kills.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...data.files.lock import FileLock
from ..store.disk.locks import exclusive_access
from ..store.format import plan as plans
from ..store.format.block_sums import Sums
from ..store.format.plan import Plan
from ..store.storage import open_files


@dataclass(frozen=True)
class Removed:
    """What a command removed from a store, or would remove. `bytes` is the disk space that becomes free."""

    store: str
    views: list[str] = field(default_factory=list)
    utterances: int = 0
    tokens: int = 0  # of utterances that cannot be read any more, over all teachers
    moved_tokens: int = 0  # of readable utterances that shared a shard with those
    files: int = 0
    bytes: int = 0
    done: bool = True


@contextmanager
def exclusive_plan(root: Path) -> Iterator[tuple[Plan, Path]]:
    """Yield a store's plan and a scratch folder on its disk, while no other process plans or writes.

    Raises NoStoreError if there is no store at `root`, and LockedError if another process writes to it.
    """
    files = open_files(root)
    files.require_writable()
    paths = plans.read_plan(files).paths
    with FileLock(paths.lock("plan"), wait=True), exclusive_access(paths):
        scratch = paths.tmp / f"maintain-{os.getpid()}"
        with FileLock(scratch / "lock", wait=True):
            try:
                yield plans.read_plan(files), scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def replace_plan(before: Plan, after: Plan, sums: Sums | None = None) -> None:
    """Write the generations that only `after` has, then its store.json. `sums` are the checksums of their rows."""
    numbers = {g.number for g in before.generations}
    for generation in after.generations:
        if generation.number not in numbers:
            plans.write_generation(replace(after, generations=before.generations), generation, sums or {})
    if after != before:
        plans.write_head(after)

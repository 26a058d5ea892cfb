"""Changes that no writer may live through: a changed corpus, `store rm`, `store gc`.

Invariant: a writer shows that it lives by its folder under tmp/ (made under the lock `tmp`) and reads the plan after
that; who changes what plans mean holds that lock and finds no living folder. So nobody writes by a plan that has gone.
Run: `pytest tests/extract/pipeline/test_refresh.py -k writer`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from ....data.errors import LockedError
from .durable import Lock
from .layout import Paths


@contextmanager
def exclusive_access(paths: Paths) -> Iterator[None]:
    """While this is held no writer begins. Errors: LockedError where one is at work."""
    with Lock(paths.lock("tmp"), wait=True):
        living = [f.name for f in paths.tmp.iterdir() if (f / "lock").exists()] if paths.tmp.is_dir() else []
        for name in living:
            lock = Lock(paths.tmp / name / "lock")
            free = lock.acquire()
            if free:  # left by one that died
                shutil.rmtree(paths.tmp / name, ignore_errors=True)
            lock.release()
            if not free:
                raise LockedError(
                    "a writer is at work here, by the plan that is to change",
                    where=paths.tmp / name,
                    remedy="let it finish or stop it (what it committed stays), then give the same command again",
                )
        yield

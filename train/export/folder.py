"""A folder that is there whole or not at all, and replaces only one of its own kind.

Invariant: a kill at any moment leaves the old folder or the new one, perhaps under a name that the next export to the
same place puts right. Exercised by `stillhouse export RUN --out FOLDER --force`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...data.errors import UsageError
from ...data.files.atomic import sync
from ..run.load import EXPORT_HEAD


@contextlib.contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A draft beside `out` that becomes it, on disk, when the block ends well; nothing is left where it does not.

    A process that was killed leaves its draft, and the folder that it was about to replace under another name: the
    next one sweeps the first and puts the second back. Raises UsageError where something is there: without `force`, or
    that no export wrote.
    """
    _sweep(out)
    if out.exists() or out.is_symlink():
        if not force:
            raise UsageError("is already there", where=out, remedy="--force replaces it, or choose another --out")
        if not (out / EXPORT_HEAD).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"holds no {EXPORT_HEAD}, so no export wrote it, and is not replaced", where=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (out.parent / f".{out.name}.{os.getpid()}.{what}" for what in ("new", "old"))
    draft.mkdir()
    try:
        yield draft
        sync(*draft.rglob("*"), draft)
        if out.exists():
            out.rename(old)
        draft.rename(out)
        sync(out.parent)
    finally:
        for path in (draft, old):
            shutil.rmtree(path, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Clear what killed exports to `out` left."""
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        pid, _, what = left.name.removeprefix(f".{out.name}.").partition(".")
        if what not in ("new", "old") or not pid.isdigit() or (int(pid) != os.getpid() and _lives(int(pid))):
            continue
        if what == "old" and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Write a folder completely or not at all, and replace only an earlier export.

Guarantees: after a kill at any moment the old folder or the new one exists. The next export to the same place restores
its name if necessary.
Try: `stillhouse export RUN --out FOLDER --force`.
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
    """Yield a draft folder that replaces `out`, synced to disk, if the block ends without an exception.

    An exception deletes the draft. A killed process leaves its draft, and the folder to be replaced under
    another name. The next call deletes the draft and restores that folder.

    Raises UsageError if `out` exists, and `force` is not set or no export wrote it.
    """
    _recover(out)
    if out.exists() or out.is_symlink():
        if not force:
            raise UsageError("the folder already exists", where=out, remedy="use --force or another --out")
        if not (out / EXPORT_HEAD).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"the folder has no {EXPORT_HEAD}, so no export wrote it", where=out)
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


def _recover(out: Path) -> None:
    """Delete or restore what killed exports to `out` left."""
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        pid, _, what = left.name.removeprefix(f".{out.name}.").partition(".")
        if what not in ("new", "old") or not pid.isdigit() or (int(pid) != os.getpid() and _is_running(int(pid))):
            continue
        if what == "old" and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # The process is another user's.
    except ProcessLookupError:
        return False
    return True

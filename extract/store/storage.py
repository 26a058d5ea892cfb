"""Open the files of a store by its path or URL. This is the one place that asks which of the two it is.

Guarantees: a new store is whole or not there. On a disk it is built beside its name and renamed at the end. In an
object store its store.json is put last, and the same command continues what was begun under the URL.
Try: `stillhouse store cp STORE s3://BUCKET/PREFIX`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from ...data.errors import StoreError, UsageError
from ...data.files.atomic import sync
from ...data.files.lock import FileLock
from ...data.files.outputs import check_folder
from .disk.files import StoreFiles
from .format.plan import Plan, read_plan
from .remote.client import is_url, split_url
from .remote.files import reading_files, writing_files


def open_files(store: str | Path | StoreFiles) -> StoreFiles:
    """Return the files of a store to be read. Raises NoStoreError where a URL has none. Folders are not examined."""
    if isinstance(store, StoreFiles):
        return store
    return reading_files(store) if is_url(store) else StoreFiles(Path(store))


def explain_change(error: StoreError, store: str | Path | StoreFiles, plan: Plan) -> None:
    """Raise an error that says so where the store has changed since `plan` was read."""
    try:
        numbers = [g.number for g in read_plan(open_files(store)).generations]
    except StoreError:
        return
    if numbers != [g.number for g in plan.generations]:
        what = f"{error.what}; and the store has changed since it was opened"
        remedy = "open it again, or call its refresh()"
        raise type(error)(what, where=error.where, remedy=remedy) from error


def writable_files(store: str | Path) -> AbstractContextManager[StoreFiles]:
    """Return a context of the files of a store to be written. What is reported committed is in the store by then.

    Raises UsageError for a folder that holds something else than a store.
    """
    if is_url(store):
        return writing_files(store)
    check_place(store)
    return nullcontext(StoreFiles(Path(store)))


def check_place(store: str | Path) -> None:
    """Raise UsageError where a store cannot be written: a file, or a folder that holds something else."""
    if not is_url(store):
        check_folder(Path(store), _is_store, "a store")


def _is_store(names: set[str]) -> bool:
    """Return whether a folder with these names is a store, or what a planner left that was killed."""
    return "store.json" in names or ("locks" in names and names <= {"data.zarr", "locks", "tmp", "plan", "commits"})


def address_of(store: str | Path) -> str:
    """Return a store's path or URL as one would type it: a Path has removed a slash from s3://."""
    return "s3://{}/{}".format(*split_url(store)) if is_url(store) else str(store)


def has_locks(store: str | Path) -> bool:
    """Return whether the writers of a store see each other's file locks."""
    return not is_url(store)


def on_disk(store: str | Path) -> Path:
    """Return the folder of a store. Raises UsageError where it is in an object store."""
    if is_url(store):
        what, expected = "nothing in an object store can be deleted or moved", "a store on a disk"
        remedy = "copy what you keep to another name (stillhouse store cp, subset and merge read and write URLs)"
        raise UsageError(what, where=address_of(store), expected=expected, remedy=remedy)
    return Path(store)


@contextmanager
def new_files(out: str | Path, undertaking: str) -> Iterator[StoreFiles]:
    """Yield the files of a store that becomes `out` at the end. Raises UsageError where something is there already.

    `undertaking` is a hash of everything that the new store is made of. In an object store, a command with the same
    hash continues what another one began.
    """
    if is_url(out):
        with writing_files(out) as files:
            files.begin_new_store(undertaking)
            yield files
    else:
        with _staging(Path(out)) as root:
            yield StoreFiles(root)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when all of it is on disk. Folders that killed commands left are removed."""
    root = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        if out.exists():
            raise UsageError("is there already", where=out, remedy="give another name, or remove it")
        os.stat(root)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise UsageError(f"cannot be made: {e.strerror}", where=out, remedy="give another name") from e
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.*.partial"):
        lock = FileLock(old / "builder.lock")
        if lock.acquire():
            shutil.rmtree(old, ignore_errors=True)
            lock.release()
    with FileLock(root / "builder.lock", wait=True):
        try:
            yield root
            sync(*(p for p in root.rglob("*") if p.is_dir()))
            (root / "builder.lock").unlink()
            os.rename(root, out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise

"""Build a new store beside its final name on a disk, or under its URL without the store.json that makes it a store.

Guarantees: a store of that name is complete or does not exist. On a disk the folder is renamed at the end. In an object
store, store.json is put last, and only if there is none. What is under the URL before that belongs to one command, and
the same command resumes it.
Try: `stillhouse store cp STORE s3://BUCKET/PREFIX`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...data.errors import UsageError
from ..pipeline.extract import share_arrays
from ..store.disk.durable import Lock, fsync_all, fsync_folder
from ..store.format.plan import Plan
from ..store.remote.client import Conflict, is_url
from ..store.remote.mirror import Mirror, Planned
from ..store.remote.paths import mirror_of, writable_copy

CLAIM = "locks/build.json"


@contextmanager
def staging_folder(out: Path | str, fingerprint: str) -> Iterator[Path]:
    """Yield a folder that becomes `out` at the end. `fingerprint` is a hash of all that the new store is made of.

    Raises UsageError if something is at `out` already.
    """
    if not is_url(out):
        with _local_staging(Path(out)) as root:
            yield root
        return
    with writable_copy(out) as root:
        mirror = mirror_of(root)
        assert mirror is not None
        if mirror.etag is not None:
            raise _taken(mirror)
        _claim(mirror, fingerprint)
        yield root


def publish_store(plan: Plan, fingerprint: str) -> None:
    """Put store.json into an object store, which makes the store exist. On a disk `staging_folder` does that."""
    mirror = mirror_of(plan.paths.root)
    if mirror is None:
        return
    for name in plan.teachers:
        share_arrays(plan, name)
    try:
        mirror.publish_plan(plan.paths.store_json, by=fingerprint)
    except Planned as e:
        raise _taken(mirror) from e


def _taken(mirror: Mirror) -> UsageError:
    return UsageError("a store is there already", where=mirror.url, remedy="give another name, or delete it")


def _claim(mirror: Mirror, fingerprint: str) -> None:
    """Mark what is under a URL as the work of this command. Raises UsageError if another has put objects there."""
    note = mirror.root / "claim"
    note.write_text(json.dumps({"builds": fingerprint}))
    others = [k for k in mirror.objects.list("") if k != CLAIM]
    claimed = CLAIM in mirror.objects.list("locks")
    if others and not claimed:
        raise UsageError(
            f"{len(others)} objects are there, and no store",
            where=mirror.url,
            expected="nothing",
            remedy="give another name, or delete what is under this one",
        )
    if not claimed:
        try:
            mirror.objects.put(CLAIM, note, "create")
            return
        except Conflict:
            pass  # another command began just now, or the answer to our own attempt was lost
    if not mirror.objects.same(CLAIM, note):
        raise UsageError(
            "another store has been begun there and never finished",
            where=mirror.url,
            remedy="give the command again that began it, or another name, or delete what is under this one",
        )


@contextmanager
def _local_staging(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when all of it is on disk. Folders that killed commands left are deleted."""
    if out.exists():
        raise UsageError("something is there already", where=out, remedy="give another name, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.*.partial"):
        lock = Lock(old / "builder.lock")
        if lock.acquire():
            shutil.rmtree(old, ignore_errors=True)
            lock.release()
    root = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with Lock(root / "builder.lock", wait=True):
        try:
            yield root
            fsync_all([p for p in root.rglob("*") if p.is_dir()])
            (root / "builder.lock").unlink()
            os.rename(root, out)
            fsync_folder(out.parent)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise

"""A store in an object store, as a folder on this disk that fills itself: the other modules read and write files.

Readers of one generation share a folder, named after it; a writer has one of its own. Hidden states go through a cache
of blocks instead (`blocks.py`).
Run: `stillhouse inspect info s3://BUCKET/PREFIX`; `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .client import Objects, cache_folder, is_url, no_store
from .mirror import Mirror, Planned

T = TypeVar("T")
_ROOT = re.compile(r".*?\.mirror(?=/|$)")
_mirrors: dict[str, Mirror] = {}


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a path lies in; None for a path of an ordinary store."""
    text = str(path)
    if ".mirror" not in text:
        return None
    found = _ROOT.match(text)
    if found is None:
        return None
    if found[0] not in _mirrors:
        try:
            origin = json.loads(Path(found[0], ".origin").read_bytes())
        except (OSError, ValueError):
            return None
        _mirrors[found[0]] = Mirror(origin["url"], Path(found[0]), origin["etag"], origin["writes"])
    return _mirrors[found[0]]


def address_of(root: Path) -> Path | str:
    """The URL that a mirror is of, for people and other processes; any other folder is itself."""
    mirror = mirror_of(root)
    return root if mirror is None else mirror.url


def retry_plan(root: Path, make: Callable[[], T]) -> T:
    """`make` a plan; where somebody else did so meanwhile in an object store, again, from theirs."""
    while True:
        try:
            return make()
        except Planned:
            mirror = mirror_of(root)
            assert mirror is not None
            mirror.reset()


def local(path: Path) -> Path:
    """A path that may be opened: itself, or where a file of a remote store has been brought."""
    mirror = mirror_of(path)
    return path if mirror is None else mirror.local(path)


def local_copy(path: str | Path) -> Path:
    """The folder to read a store from: itself, or the mirror of a URL as it is now.

    Errors: NoStoreError where there is no store at a URL; StoreError where the object store does not answer.
    """
    if not is_url(path):
        return Path(path)
    objects = Objects(path)
    with tempfile.TemporaryDirectory(dir=_made(cache_folder())) as scratch:
        head = Path(scratch, "store.json")
        meta = objects.get({"store.json": head}).get("store.json")
        if meta is None:
            raise no_store(objects.url)
        name = hashlib.blake2b(f"{objects.url} {meta['etag']}".encode(), digest_size=12).hexdigest()
        root = _made(cache_folder() / "mirrors" / f"{name}.mirror")
        if not (root / ".origin").exists():
            Path(scratch, "origin").write_text(json.dumps({"url": objects.url, "etag": meta["etag"], "writes": False}))
            os.replace(Path(scratch, "origin"), root / ".origin")
        os.replace(head, root / "store.json")
    return root


@contextlib.contextmanager
def writable_copy(path: str | Path) -> Iterator[Path]:
    """The folder to write a store in: itself; for a URL a mirror of this process, gone at the end.

    What is reported committed lies in the object store by then.
    """
    if not is_url(path):
        yield Path(path)
        return
    objects = Objects(path)
    unique = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}.mirror"
    base = _made(cache_folder() / "writers")
    _sweep(base)
    root = _made(base / unique)
    try:
        meta = objects.get({"store.json": root / "store.json"}).get("store.json")
        origin = {"url": objects.url, "etag": meta and meta["etag"], "writes": True, "pid": os.getpid()}
        (root / ".origin").write_text(json.dumps(origin))
        yield root
    finally:
        _mirrors.pop(str(root), None)
        shutil.rmtree(root, ignore_errors=True)


def _sweep(base: Path) -> None:
    """Remove what writers of this machine left that are dead."""
    for folder in base.iterdir():
        host, pid, *_ = (*folder.name.rsplit("-", 2), "", "")
        if host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

"""The files of a store in an object store: a folder on this disk stands for it, and files come when they are asked for.

Readers of one version of a store share a folder. A writer has one of its own, and what it writes is a file there first.

Guarantees: what lies in such a folder has been in the object store, whole. A commit record is put last, and only where
there is none, so what is reported committed is in the object store.
Try: `stillhouse inspect info s3://BUCKET/PREFIX`; `pytest tests/extract/store/test_remote_writing.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ....data.errors import StaleError, StoreError, UsageError
from ..disk.files import StoreFiles
from .assembly import apply_parts
from .block_cache import CachedFile
from .cache import TOUCH_S, cache_folder, is_sealed, keep, kept_etag, made_folder, mark_used
from .client import Conflict, Missing, Objects, no_store

T = TypeVar("T")
BY_ITEM = ("input_hash", "context_left", "context_right", "crc32c")  # arrays that work items write parts of
BY_SHARD = ("hidden", "code", "scale", "norm_mean", "norm_std", "codebook")
CLAIM_S = 600.0  # a planner that has not finished this long after its claim is taken for dead
BUILD_CLAIM = "locks/build.json"
_OTHER_NAME = "another name, or delete what is under this one"
_AGAIN = "give the same command again: it follows that plan"


class PlannedElsewhereError(StaleError):
    """Another process planned this store first."""


class RemoteFiles(StoreFiles):
    """The store at s3://BUCKET/PREFIX, for which the folder `root` of this disk stands.

    `etag` is the version of store.json in `root`; None: there is no store yet. If it is `writable`, `root` belongs to a
    writer of this process.
    """

    has_locks = False
    can_be_torn = False
    fills_disk = False
    is_copied = True

    def __init__(self, url: str, root: Path, etag: str | None, writable: bool) -> None:
        super().__init__(root)
        self.objects, self.etag, self.writable = Objects(url), etag, writable
        self.renewed: list[str] = []
        self._used: dict[Path, float] = {}  # when this process marked files as used, after it had compared them
        self._listed: dict[str, dict[str, tuple[int, str]]] = {}
        self._assembly = root
        if not writable:
            self._assembly = root / f"assembled-{os.getpid()}-{secrets.token_hex(4)}"
            weakref.finalize(self, _remove_own, self._assembly, os.getpid())
        self._applied: dict[str, set[str]] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._own: set[str] = set()

    @property
    def address(self) -> str:
        return self.objects.url

    def place(self, path: Path) -> str:
        return f"{self.address}/{self.key(path)}"

    def key(self, path: Path) -> str:
        """Return the object that a file under `root` stands for, relative to the store's URL."""
        return str(path.relative_to(self.root))

    # --- reading ---

    def fetch(self, paths: Iterable[Path]) -> None:
        """Bring files that are not on this disk. Those that the object store lacks stay away."""
        wanted = {self.key(p): p for p in paths if not self._is_here(p)}
        if wanted:
            for key in self.objects.get(wanted, keep=not self.writable):
                self._used[wanted[key]] = time.monotonic()
                if self.writable:
                    self._sent[key] = _stamp(wanted[key])

    def _is_here(self, path: Path) -> bool:
        """Whether a file is on this disk as it came. It is compared once a process: the disk may have lost power."""
        if not self.writable and time.monotonic() - self._used.get(path, -TOUCH_S) >= TOUCH_S:
            mark_used(path)  # before it is looked for, so that no other process removes it from here on
            if path not in self._used and kept_etag(path) is None:
                if path.exists() and is_sealed(path):
                    self.note_renewed(path)
                return False
            self._used[path] = time.monotonic()
        return path.exists()

    def note_renewed(self, path: Path) -> None:
        if (place := self.place(path)) not in self.renewed:
            self.renewed.append(place)

    def local(self, path: Path) -> Path:
        parts = path.relative_to(self.root).parts
        if len(parts) > 3 and parts[0] == "data.zarr" and parts[2] in BY_ITEM and parts[3] == "c":
            return self._assembled(path)
        self.fetch([path])
        return path

    def record_names(self, folder: Path) -> list[str]:
        # By the list, since another process may remove files from this disk.
        keys = self._list(self.key(folder))
        self.fetch(self.root / k for k in keys if k.endswith(".json"))
        return [k.rsplit("/", 1)[1] for k in keys]

    def _list(self, folder: str) -> dict[str, tuple[int, str]]:
        """Return what is in a folder: for a writer, now; for a reader, when it first looked. Replaced copies go."""
        if self.writable:
            return self.objects.list(folder)
        if folder not in self._listed:
            self._listed[folder] = self.objects.list(folder)
            for key, (_, etag) in self._listed[folder].items():
                path = self.root / key
                if path.exists() and kept_etag(path) not in (None, etag):  # None: see `_is_here`.
                    self._used.pop(path, None)
                    path.unlink(missing_ok=True)
        return self._listed[folder]

    def forget(self, folder: Path) -> bool:
        if self.writable:
            return False
        self._applied = {}
        for base in (self.root, self._assembly):
            shutil.rmtree(base / folder.relative_to(self.root), ignore_errors=True)
        return True

    def revalidate(self) -> None:
        self._listed = {}
        self._list("")

    def sizes(self, folder: Path) -> Iterator[tuple[Path, int]]:
        key = "" if folder == self.root else self.key(folder)
        return ((self.root / k, size) for k, (size, _) in self._list(key).items())

    def empty_folders(self) -> list[Path]:
        return []  # An object store knows none.

    def count_files(self, folder: Path) -> int | None:
        return None

    def blocks(self, path: Path) -> CachedFile | None:
        if path.exists():
            return None
        try:
            return CachedFile(self.objects, self.key(path), lambda: self.note_renewed(path))
        except Missing as e:
            raise FileNotFoundError(2, os.strerror(2), str(path)) from e

    def descriptor(self, path: Path, whole: bool) -> int:
        blocks = self.blocks(path)
        return super().descriptor(path, whole) if blocks is None else blocks.copy(whole)

    def renew(self, path: Path, whole: bool) -> bool:
        blocks = self.blocks(path)
        return blocks is not None and blocks.renew(0 if whole else max(0, blocks.size - 1), blocks.size)

    def _assembled(self, path: Path) -> Path:
        """Return a chunk of an array that work items write parts of, as it is now.

        The chunk is the object, where there is one, with the parts that items put beside their commits. Each process
        makes its own. A writer's own parts are in its file already.
        """
        _, teacher, name, _, *index = path.relative_to(self.root).parts
        axes = [int(i) for i in index]
        record = json.loads(self.local(self.root / "store.json").read_bytes())["teachers"][teacher]
        meta = json.loads(self.local(self.root / "data.zarr" / teacher / name / "zarr.json").read_bytes())
        target = self._assembly / path.relative_to(self.root)
        mark_used(target)
        if not target.exists():
            self._applied.pop(str(target), None)
            self.objects.get({self.key(path): target})
        context = record["contexts"][axes[0]]
        folder = self.root / "commits" / teacher / context.replace(":", "-")
        listed = [k for k in self._list(self.key(folder)) if k.endswith(".npz")]
        done = self._applied.setdefault(str(target), set())
        new = [k for k in listed if k not in done and k not in self._own]
        new.sort(key=lambda k: (int(k.split(".")[-2]), k))  # later generations last
        if new:
            self.fetch(self.root / k for k in new)
            member = f"{name}.{record['layers'][axes[1]]}" if name == "crc32c" else name
            apply_parts(target, meta, axes, member, [self.root / k for k in new])
            done |= set(new)
        return target

    # --- writing ---

    def require_writable(self) -> None:
        if not self.writable:
            remedy = f"stillhouse store cp {self.address} FOLDER, then change FOLDER"
            raise StoreError("this command changes only stores on a disk", where=self.address, remedy=remedy)

    def require_growable(self) -> None:
        what = "the corpus has changed, and rows cannot be added to a store in an object store"
        remedy = "bring it to a disk, refresh it there and put it under another name: "
        remedy += f"stillhouse store cp {self.address} FOLDER, the same command with FOLDER, "
        raise UsageError(what, where=self.address, remedy=f"{remedy}stillhouse store cp FOLDER s3://BUCKET/NEW")

    def retry_plan(self, make_plan: Callable[[], T]) -> T:
        while True:
            try:
                return make_plan()
            except PlannedElsewhereError:
                self._take_their_plan()

    def _take_their_plan(self) -> None:
        """Forget what was planned here, and take what the object store has now."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        head = self.root / "store.json"
        head.unlink(missing_ok=True)
        self._sent, self._applied = {}, {}
        self.etag = self.objects.get({"store.json": head})["store.json"]["etag"]

    def publish_plan(self, by: str = "") -> None:
        """Put every file of the plan that is new or has changed, then store.json, unless another writer was first.

        A claim beside store.json lets one writer alone do so. Others wait for it, except those with the same `by`.
        """
        self._claim_plan(by)
        head = self.root / "store.json"
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            if self._of_plan(path) and self._sent.get(self.key(path)) != _stamp(path):
                self.objects.put(self.key(path), path)
                self._sent[self.key(path)] = _stamp(path)
        try:
            self.etag = self.objects.put("store.json", head, self.etag or "create")
        except Conflict as e:
            if not self.objects.same("store.json", head):
                raise (self._store_exists() if by else self._planned_elsewhere()) from e
            self.etag = self.objects.head("store.json")["etag"]

    def _claim_plan(self, by: str) -> None:
        """Wait until the plan after this version of store.json is this writer's to put."""
        version = hashlib.blake2b((self.etag or "new").encode(), digest_size=8).hexdigest()
        claim, file = f"locks/plan-{version}.json", self.root / "claim"
        own = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time_ns()}
        file.write_text(json.dumps({"by": by} if by else own))
        waited = 0.0
        while True:
            try:
                self.objects.put(claim, file, "create")
                return
            except Conflict:
                if self.objects.same(claim, file):  # The answer to an earlier attempt of this writer was lost.
                    return
            with contextlib.suppress(Missing):
                if self.objects.head("store.json")["etag"] != self.etag:
                    raise self._store_exists() if by else self._planned_elsewhere()
            if waited > CLAIM_S:  # The planner that holds the claim is dead.
                self.objects.put(claim, file)
                return
            time.sleep(pause := min(5.0, 0.2 + waited / 4))
            waited += pause

    def _store_exists(self) -> UsageError:
        return UsageError("a store is there already", where=self.address, remedy="give another name, or remove it")

    def _planned_elsewhere(self) -> PlannedElsewhereError:
        return PlannedElsewhereError("another command has planned this store", where=self.address, remedy=_AGAIN)

    def _of_plan(self, path: Path) -> bool:
        parts = path.relative_to(self.root).parts
        by_items = len(parts) > 3 and parts[3] == "c" and parts[2] in (*BY_ITEM, *BY_SHARD)
        return parts[0] == "plan" or (parts[0] == "data.zarr" and not by_items)

    def publish_commit(self, record: Path, data: list[Path], values: dict[str, Any] | None, overwrite: bool) -> bool:
        """Put what a commit record speaks of, then the record. Raises StoreError where other bytes are there."""
        key = self.key(record)
        for path in data:
            self._put_data(path, overwrite)
        if values is not None:
            beside = record.with_suffix(".npz")
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **values)
            beside.write_bytes(buffer.getvalue())
            self._put_data(beside, overwrite)
            self._own.add(self.key(beside))
        try:
            self.objects.put(key, record, "create")
        except Conflict:
            if self.objects.same(key, record):
                return True
            self.objects.get({key: record})
            return False
        finally:
            for path in data if values is not None else ():
                path.unlink()  # From here on it is read through the cache.
        return True

    def _put_data(self, path: Path, overwrite: bool) -> None:
        key = self.key(path)
        try:
            self.objects.put(key, path, "overwrite" if overwrite else "create")
        except Conflict as e:
            if not self._same(key, path):
                expected = "the same bytes: writers of one store run on one kind of processor"
                remedy = "if no other writer is at work, delete this object and give the command again"
                what, where = "another writer has put other bytes here", self.place(path)
                raise StoreError(what, where=where, expected=expected, remedy=remedy) from e

    def _same(self, key: str, path: Path) -> bool:
        if path.suffix != ".npz":
            return self.objects.same(key, path)
        theirs = path.with_name(f".{path.name}.theirs")  # Zip archives hold the time of writing.
        self.objects.get({key: theirs})
        with np.load(theirs, allow_pickle=False) as a, np.load(path, allow_pickle=False) as b:
            same = sorted(a.files) == sorted(b.files) and all(np.array_equal(a[n], b[n]) for n in a.files)
        theirs.unlink()
        return same

    def publish_arrays(self, paths: Iterable[Path]) -> None:
        for path in paths:
            target = self._assembled(path)
            if target.exists():
                self.objects.put(self.key(path), target)

    def begin_new_store(self, undertaking: str) -> None:
        """Claim the URL for a store that several commands may build, all with the same `undertaking`."""
        if self.etag is not None:
            raise self._store_exists()
        file = self.root / "claim"
        file.write_text(json.dumps({"builds": undertaking}))
        others = [k for k in self.objects.list("") if k != BUILD_CLAIM]
        claimed = BUILD_CLAIM in self.objects.list("locks")
        if others and not claimed:
            what = f"{len(others)} objects are there, and no store"
            raise UsageError(what, where=self.address, expected="nothing", remedy=f"give {_OTHER_NAME}")
        if not claimed:
            # In a conflict another command began just now, or the answer to our own attempt was lost.
            with contextlib.suppress(Conflict):
                self.objects.put(BUILD_CLAIM, file, "create")
                return
        if not self.objects.same(BUILD_CLAIM, file):
            what = "another store has been begun there and never finished"
            remedy = f"give the command again that began it, or {_OTHER_NAME}"
            raise UsageError(what, where=self.address, remedy=remedy)


def reading_files(url: str | Path) -> RemoteFiles:
    """Return the files of the store at a URL as it is now. Raises NoStoreError where there is none."""
    objects = Objects(url)
    try:
        head, etag = objects.read("store.json")
    except Missing:
        raise no_store(objects.url) from None
    name = hashlib.blake2b(f"{objects.url} {etag}".encode(), digest_size=12).hexdigest()
    root = made_folder(cache_folder() / "mirrors" / name)
    keep(root / "store.json", head, etag)
    return RemoteFiles(objects.url, root, etag, writable=False)


@contextlib.contextmanager
def writing_files(url: str | Path) -> Iterator[RemoteFiles]:
    """Yield the files of a store at a URL, in a folder of this process that is removed at the end."""
    objects = Objects(url)
    base = made_folder(cache_folder() / "writers")
    _remove_dead_writers(base)
    root = made_folder(base / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}")
    try:
        meta = objects.get({"store.json": root / "store.json"}).get("store.json")
        yield RemoteFiles(objects.url, root, meta["etag"] if meta else None, writable=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _remove_dead_writers(base: Path) -> None:
    """Remove the folders of writers of this machine that are dead."""
    for folder in base.iterdir():
        host, pid, *_ = (*folder.name.rsplit("-", 2), "", "")
        if host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not a fork of the process that made it
        shutil.rmtree(folder, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int]:
    s = path.stat()
    return s.st_mtime_ns, s.st_size

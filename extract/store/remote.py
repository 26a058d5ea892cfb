"""A store in an object store, as a folder on this disk that fills itself: the other modules read and write files.

Invariant: what a mirror's folder holds, the object store held, whole, under the generation that the folder is named
after; hidden states go through a cache of blocks instead, shared by all processes and bounded. What a writer makes is
a file in its own mirror first, then an object, and its commit record is put last and only where there is none.
Run: `stillhouse inspect info s3://BUCKET/PREFIX`; `pytest tests/extract/test_remote.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...data.errors import StaleError, StoreError
from .objects import Conflict, Missing, Objects, cache_folder, is_url, no_store

T = TypeVar("T")
BLOCK_BYTES = 1 << 20
JOINED_BLOCKS = 8  # neighbours that are asked for in one request
TOUCH_S = 60.0  # a block in use is marked as used this often
BY_UNIT = ("input_hash", "context_left", "context_right", "crc32c")  # arrays that units write parts of
_ROOT = re.compile(r".*?\.mirror(?=/|$)")
BY_SHARD = ("hidden", "scale", "norm_mean", "norm_std")
CLAIM_S = 600.0  # a planner that has not finished in that time after its claim is dead
_AGAIN = "give the same command again: it goes by that plan"


class Planned(StaleError):
    """Somebody else planned first."""


class Mirror:
    """One store of an object store. `root` is its folder here; a writer's belongs to it alone."""

    def __init__(self, url: str, root: Path, etag: str | None, writes: bool) -> None:
        self.objects, self.root, self.etag, self.writes = Objects(url), root, etag, writes
        self.url = self.objects.url
        self._applied: dict[str, set[str]] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._own: set[str] = set()

    def key(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    # --- reading ---

    def fetch(self, paths: Iterable[Path]) -> None:
        """Bring files that are not here; those that do not exist there stay away."""
        wanted = {self.key(p): p for p in paths if not p.exists()}
        if wanted:
            for key in self.objects.get(wanted):
                self._sent[key] = _stamp(wanted[key])

    def local(self, path: Path) -> Path:
        """A file, brought here if need be. It may still not exist."""
        parts = path.relative_to(self.root).parts
        if len(parts) > 3 and parts[0] == "data.zarr" and parts[2] in BY_UNIT and parts[3] == "c":
            return self._assembled(path)
        if not path.exists():
            self.fetch([path])
        return path

    def sync(self, folder: Path) -> None:
        """Bring all commit records of a folder that are not here."""
        self.fetch(self.root / k for k in self.objects.list(self.key(folder)) if k.endswith(".json"))

    def sizes(self, folder: Path) -> dict[Path, int]:
        """Every file under a folder of the store and its bytes."""
        key = "" if folder == self.root else self.key(folder)
        return {self.root / k: size for k, size in self.objects.list(key).items()}

    def _assembled(self, path: Path) -> Path:
        """A chunk of an array that units write parts of: the object, if there is one, and on it what units put beside
        their commits. Made anew in each process; a writer's own parts are in its file already.
        """
        _, teacher, name, _, *index = path.relative_to(self.root).parts
        axes = [int(i) for i in index]
        record = json.loads(self.local(self.root / "store.json").read_bytes())["teachers"][teacher]
        meta = json.loads(self.local(self.root / "data.zarr" / teacher / name / "zarr.json").read_bytes())
        target = path if self.writes else self.root / f"assembled-{os.getpid()}" / path.relative_to(self.root)
        if not target.exists():
            self._applied.pop(str(target), None)
            self.objects.get({self.key(path): target})
        context = record["contexts"][axes[0]]
        folder = self.root / "commits" / teacher / context.replace(":", "-")
        listed = [k for k in self.objects.list(self.key(folder)) if k.endswith(".npz")]
        done = self._applied.setdefault(str(target), set())
        new = sorted((k for k in listed if k not in done and k not in self._own), key=_by_generation)
        if new:
            self.fetch(self.root / k for k in new)
            member = f"{name}.{record['layers'][axes[1]]}" if name == "crc32c" else name
            self._apply(target, meta, axes, member, [self.root / k for k in new])
            done |= set(new)
        return target

    def _apply(self, target: Path, meta: dict[str, Any], axes: list[int], member: str, parts: list[Path]) -> None:
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        length = meta["chunk_grid"]["configuration"]["chunk_shape"][-1]
        whole = np.fromfile(target, dtype) if target.exists() else np.zeros(length, dtype)
        begin = axes[-1] * length
        for part in parts:
            with np.load(part, allow_pickle=False) as saved:
                if member not in saved:
                    continue
                first, values = int(saved["first"]), saved[member]
                a, b = max(begin, first), min(begin + length, first + len(values))
                if a < b:
                    whole[a - begin : b - begin] = values[a - first : b - first]
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
        whole.tofile(draft)
        os.replace(draft, target)

    # --- writing ---

    def publish_plan(self, head: Path, by: str = "") -> None:
        """Put every file of the plan that is new or has changed here, then store.json, where nobody was first.

        A claim beside it lets one writer alone do so; others wait for it, but for who claims as the same `by`.
        Errors: Planned where they have its plan.
        """
        claim = f"locks/plan-{hashlib.blake2b((self.etag or 'new').encode(), digest_size=8).hexdigest()}.json"
        note = self.root / "claim"
        own = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time_ns()}
        note.write_text(json.dumps({"by": by} if by else own))
        waited = 0.0
        while True:
            try:
                self.objects.put(claim, note, "create")
                break
            except Conflict:
                if self.objects.same(claim, note):  # ours: the answer to an earlier attempt was lost
                    break
            try:
                if self.objects.head("store.json")["etag"] != self.etag:
                    raise Planned("another command has planned this store", where=self.url, remedy=_AGAIN)
            except Missing:
                pass
            if waited > CLAIM_S:
                self.objects.put(claim, note)  # its planner is dead
                break
            time.sleep(pause := min(5.0, 0.2 + waited / 4))
            waited += pause
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            if self._of_plan(path) and self._sent.get(self.key(path)) != _stamp(path):
                self.objects.put(self.key(path), path)
                self._sent[self.key(path)] = _stamp(path)
        try:
            self.etag = self.objects.put("store.json", head, self.etag or "create")
        except Conflict as e:
            if not self.objects.same("store.json", head):
                raise Planned("another command has planned this store", where=self.url, remedy=_AGAIN) from e
            self.etag = self.objects.head("store.json")["etag"]

    def _of_plan(self, path: Path) -> bool:
        parts = path.relative_to(self.root).parts
        by_units = len(parts) > 3 and parts[3] == "c" and parts[2] in (*BY_UNIT, *BY_SHARD)
        return parts[0] == "plan" or (parts[0] == "data.zarr" and not by_units)

    def reset(self) -> None:
        """Forget what was planned here, and take what the object store has now."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        (self.root / "store.json").unlink(missing_ok=True)
        self._sent, self._applied = {}, {}
        self.etag = self.objects.get({"store.json": self.root / "store.json"})["store.json"]["etag"]

    def publish(self, record: Path, data: list[Path], values: dict[str, Any] | None, overwrite: bool) -> bool:
        """Put what a commit speaks of, then the record. False where another writer's record came first.

        `values` are the unit's parts of shared arrays. Errors: StoreError where an object is there with other bytes.
        """
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
            for path in data:
                if values is not None:
                    path.unlink()  # it is read through the cache from here on
        return True

    def _put_data(self, path: Path, overwrite: bool) -> None:
        key = self.key(path)
        try:
            self.objects.put(key, path, "overwrite" if overwrite else "create")
        except Conflict as e:
            if not self._same(key, path):
                raise StoreError(
                    "another writer has put other bytes here",
                    where=f"{self.url}/{key}",
                    expected="the same bytes: writers of one store run on one kind of processor",
                    remedy="if no other writer is at work, delete this object and give the command again",
                ) from e

    def _same(self, key: str, path: Path) -> bool:
        if path.suffix != ".npz":
            return self.objects.same(key, path)
        theirs = path.with_name(f".{path.name}.theirs")  # zip archives hold the time of writing
        self.objects.get({key: theirs})
        with np.load(theirs, allow_pickle=False) as a, np.load(path, allow_pickle=False) as b:
            same = sorted(a.files) == sorted(b.files) and all(np.array_equal(a[n], b[n]) for n in a.files)
        theirs.unlink()
        return same

    def put_arrays(self, paths: Iterable[Path]) -> None:
        """Put shared arrays whole, for readers that know Zarr alone; ours go by the units' own parts."""
        for path in paths:
            target = self._assembled(path)
            if target.exists():
                self.objects.put(self.key(path), target)


def _by_generation(key: str) -> tuple[int, str]:
    return int(key.split(".")[-2]), key


def _stamp(path: Path) -> tuple[int, int]:
    s = path.stat()
    return s.st_mtime_ns, s.st_size


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


def origin(root: Path) -> Path | str:
    """The URL that a mirror is of, for people and other processes; any other folder is itself."""
    mirror = mirror_of(root)
    return root if mirror is None else mirror.url


def planned(root: Path, make: Callable[[], T]) -> T:
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


def located(path: str | Path) -> Path:
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
def workspace(path: str | Path) -> Iterator[Path]:
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


# --- blocks of shard files ---


class Blocks:
    """One remote shard file, read through the cache. Errors of reading: StoreError."""

    def __init__(self, mirror: Mirror, path: Path) -> None:
        self.mirror, self.path, self.key = mirror, path, mirror.key(path)
        meta = mirror.objects.head(self.key)  # Missing is the caller's
        self.size, self.etag = int(meta["size"]), meta["etag"]
        name = hashlib.blake2b(f"{mirror.url} {self.key} {self.etag}".encode(), digest_size=12).hexdigest()
        self.folder = cache_folder() / "blocks" / name[:2] / name
        self._asked: dict[int, Any] = {}
        self._seen: dict[int, float] = {}

    def ask(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch what ranges (offset, bytes) need and the cache lacks, many requests at a time."""
        need: set[int] = set()
        for offset, size in ranges:
            need.update(range(offset // BLOCK_BYTES, -(-min(offset + size, self.size) // BLOCK_BYTES)))
        lacking = sorted(n for n in need if n not in self._asked and not (self.folder / str(n)).exists())
        while lacking:
            count = 1
            while count < min(len(lacking), JOINED_BLOCKS) and lacking[count] == lacking[0] + count:
                count += 1
            sent = self.mirror.objects.send(
                "blocks", self.key, folder=str(self.folder), first=lacking[0], last=lacking[0] + count,
                block=BLOCK_BYTES, size=self.size, if_match=self.etag,
            )  # fmt: skip
            self._asked |= dict.fromkeys(range(lacking[0], lacking[0] + count), sent)
            del lacking[:count]

    def read(self, into: memoryview, offset: int) -> int:
        """Fill `into` from `offset` on; returns the bytes read, fewer at the end of the file."""
        done, size = 0, max(0, min(len(into), self.size - offset))
        while done < size:
            number, inside = divmod(offset + done, BLOCK_BYTES)
            part = into[done : min(size, done + BLOCK_BYTES - inside)]
            self._read_block(number, inside, part)
            done += len(part)
        return done

    def _read_block(self, number: int, inside: int, part: memoryview) -> None:
        for _ in range(3):  # another process may drop it between our fetching and our reading
            self.ask([(number * BLOCK_BYTES + inside, len(part))])
            sent = self._asked.get(number)
            if sent is not None:
                try:
                    self.mirror.objects.wait(sent)
                except (Missing, Conflict) as e:
                    raise StoreError(
                        "a shard was replaced while it was read",
                        where=f"{self.mirror.url}/{self.key}",
                        remedy="open the store again",
                    ) from e
                finally:
                    self._asked = {n: s for n, s in self._asked.items() if s is not sent}
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self.folder / str(number), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if self._whole(fd, number):
                        if os.preadv(fd, [part], inside) == len(part):
                            return
                    else:
                        (self.folder / str(number)).unlink(missing_ok=True)
                finally:
                    os.close(fd)
        raise StoreError("the cache loses blocks as fast as they come", where=self.folder, remedy=_CACHE)

    def _whole(self, fd: int, number: int) -> bool:
        """Whether a block is what came: looked at once a process, for the disk may have lost power since."""
        now = time.monotonic()
        last = self._seen.get(number)
        if last is not None and now - last < TOUCH_S:
            return True
        with contextlib.suppress(OSError):
            os.utime(self.folder / str(number))  # `evict` removes what was used longest ago
        self._seen[number] = now
        if last is not None:
            return True
        size = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
        data = os.pread(fd, size + 5, 0)
        return len(data) == size + 4 and zlib.crc32(data[:-4]).to_bytes(4, "little") == data[-4:]


_CACHE = "give it more room: STILLHOUSE_CACHE_BYTES, or another disk: STILLHOUSE_CACHE"


def descriptor(path: Path, whole: bool) -> int:
    """A file descriptor of a shard file; of a remote one, on a temporary copy of its end, or of all of it.

    Errors: OSError as from os.open, and for what is no plain file.
    """
    mirror = mirror_of(path)
    if mirror is None or path.exists():
        if os.path.lexists(path) and not path.is_file():  # a named pipe would wait
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        blocks = Blocks(mirror, path)
    except Missing as e:
        raise FileNotFoundError(2, os.strerror(2), str(path)) from e
    begin = 0 if whole else max(0, blocks.size - BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=_made(cache_folder())) as copy:
        copy.truncate(blocks.size)
        blocks.ask([(begin, blocks.size - begin)])
        for offset in range(begin, blocks.size, BLOCK_BYTES):
            part = bytearray(min(BLOCK_BYTES, blocks.size - offset))
            blocks.read(memoryview(part), offset)
            os.pwrite(copy.fileno(), part, offset)
        return os.dup(copy.fileno())

"""A folder on this disk that stands for a store in an object store: files are brought when they are asked for, and what
a writer makes is a file here first.

Invariant: what a mirror's folder holds, the object store held, whole, under the generation that the folder is named
after. A commit record is put last, and only where there is none. `remote.py` says where the folders lie.
Run: `pytest tests/extract/store/test_remote_writing.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import StaleError, StoreError
from .client import Conflict, Missing, Objects

BY_UNIT = ("input_hash", "context_left", "context_right", "crc32c")  # arrays that units write parts of
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

"""Objects of one bucket and prefix, moved to and from files by a process of its own (transfers.py).

Invariant: a process that was forked never uses what its parent had: helpers are keyed by pid and started when first
needed; nothing is opened at import. Run: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ....data.errors import NoStoreError, StoreError, UsageError

_URL = re.compile(r"s3:/{1,2}([^/]+)/?(.*)")
_KEY_ENDS_HELPER = "its helper process ended"


def is_url(path: str | Path) -> bool:
    """Whether this names an object store: s3://BUCKET/PREFIX (a Path makes s3:/ of it)."""
    return _URL.fullmatch(str(path)) is not None


def split_url(path: str | Path) -> tuple[str, str]:
    """(bucket, prefix). Errors: UsageError without a prefix."""
    found = _URL.fullmatch(str(path))
    if found is None or not found[2].strip("/"):
        raise UsageError(f"{path} names no store", expected="s3://BUCKET/PREFIX")
    return found[1], found[2].strip("/")


def cache_folder() -> Path:
    """$STILLHOUSE_CACHE, or stillhouse in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("STILLHOUSE_CACHE") or os.path.join(home, "stillhouse"))


def cache_limit_bytes() -> int:
    """$STILLHOUSE_CACHE_BYTES, or half of what the disk has free or holds of it already, at most 200 GB."""
    given = os.environ.get("STILLHOUSE_CACHE_BYTES")
    if given is not None:
        if not given.isdigit() or int(given) < 1 << 20:
            raise UsageError(f"STILLHOUSE_CACHE_BYTES={given}", expected="bytes, a million at least")
        return int(given)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return min(200 * 10**9, shutil.disk_usage(folder).free // 2)


class Missing(Exception):
    """There is no such object."""


class Conflict(Exception):
    """The object exists, or is not the one that was expected."""


class _Helper:
    """The process, and a thread that hands its replies to who waits for them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        if find_spec("obstore") is None:
            raise UsageError("s3:// needs obstore", remedy="pip install 'stillhouse[cloud]'")
        settings = {
            "timeout_s": float(os.environ.get("STILLHOUSE_REMOTE_TIMEOUT_S", "60")),
            "attempts": int(os.environ.get("STILLHOUSE_REMOTE_ATTEMPTS", "7")),
            "cache": str(cache_folder()),
            "limit_bytes": cache_limit_bytes(),
        }
        command = [sys.executable, "-I", str(Path(__file__).with_name("helper.py")), bucket, prefix]
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._gate = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._next = 0
        self._dead = False
        threading.Thread(target=self._listen, name="stillhouse-objects", daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            reply = json.loads(line)
            with self._gate:
                future = self._waiting.pop(reply["n"])
            future.set_result(reply)
        with self._gate:
            self._dead = True
            left, self._waiting = self._waiting, {}
        for future in left.values():
            future.set_result({"kind": "failed", "message": _KEY_ENDS_HELPER})

    @property
    def alive(self) -> bool:
        return not self._dead

    def send(self, request: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        assert self._process.stdin is not None
        with self._gate:
            if self._dead:
                future.set_result({"kind": "failed", "message": _KEY_ENDS_HELPER})
                return future
            self._next += 1
            self._waiting[self._next] = future
            with contextlib.suppress(OSError):  # the listener sees the end and tells all who wait
                self._process.stdin.write(json.dumps({"n": self._next, **request}) + "\n")
                self._process.stdin.flush()
        return future

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


_helpers: dict[tuple[int, str, str], _Helper] = {}  # by pid: entries of a parent are kept and never used


@atexit.register
def close_all() -> None:
    """End this process's helpers; others are started when they are needed."""
    for key in [k for k in _helpers if k[0] == os.getpid()]:
        _helpers.pop(key).close()


class Objects:
    """What lies under s3://BUCKET/PREFIX. Keys are relative to it. All methods may be called from several threads."""

    def __init__(self, url: str | Path) -> None:
        self.bucket, self.prefix = split_url(url)
        self.url = f"s3://{self.bucket}/{self.prefix}"

    def _helper(self) -> _Helper:
        key = (os.getpid(), self.bucket, self.prefix)
        found = _helpers.get(key)
        if found is None or not found.alive:
            found = _helpers[key] = _Helper(self.bucket, self.prefix)
        return found

    def send(self, op: str, key: str, **more: Any) -> tuple[str, Future[Any]]:
        """Begin a request; `wait` for it. See `transfers.Worker.do_…` for what there is."""
        return key, self._helper().send({"op": op, "key": key, **more})

    def wait(self, sent: tuple[str, Future[Any]]) -> Any:
        """Errors: Missing, Conflict; StoreError naming the object where it cannot be reached."""
        key, reply = sent[0], sent[1].result()
        if "ok" in reply:
            return reply["ok"]
        if reply["kind"] == "missing":
            raise Missing(key)
        if reply["kind"] == "exists":
            raise Conflict(key)
        denied = reply["kind"] == "denied"
        raise StoreError(
            f"the object store {'refuses' if denied else 'does not answer'}: {reply['message']}",
            where=f"{self.url}/{key}".rstrip("/"),
            expected="credentials that may read it" if denied else "an answer",
            remedy="see AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            + ("" if denied else "; what was committed is safe, the same command goes on"),
        )

    def list(self, folder: str) -> dict[str, int]:
        """{key: bytes} of all objects in a folder and those below it."""
        return dict(self.wait(self.send("list", "", prefix=f"{folder}/" if folder else "")))

    def head(self, key: str) -> dict[str, Any]:
        """Its size and etag. Errors: Missing."""
        return self.wait(self.send("head", key))

    def get(self, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
        """Objects into files, {key: file}, many at a time. Returns size and etag of those that exist."""
        sent = [self.send("get", key, file=str(path)) for key, path in files.items()]
        found = {}
        for each in sent:
            try:
                found[each[0]] = self.wait(each)
            except Missing:
                continue
        return found

    def put(self, key: str, path: Path, mode: str = "overwrite") -> str:
        """A file as an object; mode as in `transfers.Worker.do_put`. Returns its etag. Errors: Conflict."""
        return self.wait(self.send("put", key, file=str(path), mode=mode))["etag"]

    def same(self, key: str, path: Path) -> bool:
        """Whether an object has a file's bytes. Errors: Missing."""
        return self.wait(self.send("same", key, file=str(path)))


def no_store(url: str) -> NoStoreError:
    return NoStoreError("there is no store", where=url, remedy=f"stillhouse extract CORPUS {url} …")

"""Objects of one bucket and prefix, moved to and from files by obstore in a thread of this process.

Guarantees: a file under its final name is whole, since it is written beside it and renamed. A process that was forked
after the first request is refused, because the threads of obstore do not survive a fork. Nothing is opened at import.
Try: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import random
import re
import threading
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ....data.errors import NoStoreError, StoreError, UsageError
from .cache import cache_folder, cache_limit_bytes, evict

CONCURRENT = 64  # requests at a time
UPLOADS = 4  # of them, requests that hold a whole file in memory
SWEEP_SHARE = 50  # The cache is measured again after this part of its limit has been written.
_URL = re.compile(r"s3:/{1,2}([^/]+)/?(.*)")
_KINDS = {
    "missing": {"FileNotFoundError", "NotFoundError"},
    "exists": {"AlreadyExistsError", "PreconditionError", "NotModifiedError"},
    "denied": {"PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError"},
}

Request = tuple[str, Future[Any]]  # an object's key, and the answer to come


class Missing(Exception):
    """There is no such object."""


class Conflict(Exception):
    """The object exists, or is not the one that was expected."""


class RequestFailed(Exception):
    """A request had no success: `kind` is missing, exists (a condition was not met), denied or failed."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def is_url(path: str | Path) -> bool:
    """Return whether this names an object store: s3://BUCKET/PREFIX. (A Path makes s3:/ of s3://.)"""
    return _URL.fullmatch(str(path)) is not None


def split_url(path: str | Path) -> tuple[str, str]:
    """Return (bucket, prefix). Raises UsageError where there is no prefix."""
    parts = _URL.fullmatch(str(path))
    if parts is None or not parts[2].strip("/"):
        raise UsageError(f"{path} names no store", expected="s3://BUCKET/PREFIX")
    return parts[1], parts[2].strip("/")


def no_store(url: str) -> NoStoreError:
    """Return the error for a URL without a store."""
    return NoStoreError("there is no store", where=url, remedy=f"stillhouse extract CORPUS {url} …")


class _Loop:
    """The thread of this process that waits for answers."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.events = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.events.run_forever, name="stillhouse-objects", daemon=True)
        self.thread.start()

    def close(self) -> None:
        async def cancel() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(cancel(), self.events).result(timeout=5)
        self.events.call_soon_threadsafe(self.events.stop)
        self.thread.join(timeout=5)
        if not self.thread.is_alive():
            self.events.close()


_loop: _Loop | None = None
_buckets: dict[tuple[str, str], _Bucket] = {}
_gate = threading.Lock()


@atexit.register
def close_all() -> None:
    """End the requests of this process. New ones read the settings in the environment anew."""
    global _loop
    with _gate:
        loop, _loop = _loop, None
        _buckets.clear()
    if loop is not None and loop.pid == os.getpid():
        loop.close()


class _Bucket:
    """One bucket and prefix: its obstore client, and how its requests are run."""

    def __init__(self, bucket: str, prefix: str, loop: _Loop) -> None:
        if find_spec("obstore") is None:
            raise UsageError("s3:// needs obstore", remedy="pip install 'stillhouse[cloud]'")
        import obstore
        from obstore.store import S3Store

        timeout_s = float(os.environ.get("STILLHOUSE_REMOTE_TIMEOUT_S", "60"))
        http = any(os.environ.get(k, "").startswith("http://") for k in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
        self.obstore, self.loop = obstore, loop
        limits: Any = {"timeout": f"{timeout_s}s", "connect_timeout": f"{min(5, timeout_s)}s", "allow_http": http}
        # Whole requests with their bodies are retried below.
        self.store = S3Store(bucket, prefix=prefix or None, client_options=limits, retry_config={"max_retries": 0})
        self.attempts = int(os.environ.get("STILLHOUSE_REMOTE_ATTEMPTS", "7"))
        self.cache, self.limit = cache_folder(), cache_limit_bytes()
        self.written = self.limit  # so that the first write measures the cache
        self.requests, self.uploads = asyncio.Semaphore(CONCURRENT), asyncio.Semaphore(UPLOADS)

    def begin(self, operation: Callable[[], Awaitable[Any]], upload: bool = False) -> Future[Any]:
        """Run an operation in the thread that waits for answers."""
        return asyncio.run_coroutine_threadsafe(self._run(operation, upload), self.loop.events)

    async def _run(self, operation: Callable[[], Awaitable[Any]], upload: bool) -> Any:
        async with self.uploads if upload else self.requests:
            for attempt in range(1, self.attempts + 1):
                try:
                    return await operation()
                except Exception as e:
                    names = {c.__name__ for c in type(e).__mro__}
                    kind = next((kind for kind, errors in _KINDS.items() if names & errors), "failed")
                    if kind != "failed" or attempt == self.attempts:
                        lines = [line for line in str(e).splitlines() if line.strip()] or [repr(e)]
                        tries = f" ({attempt} attempts)" if attempt > 1 else ""
                        raise RequestFailed(kind, lines[0].strip()[:300] + tries) from e
                    await asyncio.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))

    async def read(self, key: str, span: tuple[int, int] | None = None, etag: str = "") -> tuple[bytes, dict[str, Any]]:
        """Return an object's bytes [begin, end) and its size and etag; `etag`: only of this version."""
        options: Any = ({"range": span} if span else {}) | ({"if_match": etag} if etag else {})
        answer = await self.obstore.get_async(self.store, key, options=options or None)
        data = bytes(await answer.bytes_async())
        first, end = answer.range
        if len(data) != end - first:
            raise OSError(f"{key}: {len(data)} bytes came of {end - first}")
        return data, {"etag": answer.meta["e_tag"], "size": answer.meta["size"]}

    def write(self, path: Path, *parts: bytes | memoryview) -> None:
        """Write a file of the cache, and remove others where there are too many."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident():x}.tmp")
        with open(draft, "wb") as f:
            for part in parts:
                f.write(part)
        os.replace(draft, path)
        self.written += sum(map(len, parts))
        if self.written > self.limit // SWEEP_SHARE:
            self.written = 0
            evict(self.cache, self.limit)


class Objects:
    """The objects under s3://BUCKET/PREFIX. Keys are relative to it. Several threads may call all methods.

    Raises StoreError naming the object where it cannot be reached, or where this process was forked from one that has
    read an object store.
    """

    def __init__(self, url: str | Path) -> None:
        self.bucket, self.prefix = split_url(url)
        self.url = f"s3://{self.bucket}/{self.prefix}"

    def _client(self) -> _Bucket:
        global _loop
        if _loop is not None and _loop.pid != os.getpid():  # Before the lock, which the fork may have copied as held.
            raise StoreError(
                "this process was forked from one that has read an object store, and cannot read it",
                where=self.url,
                expected="a process that is started afresh",
                remedy='use the start method "spawn", as in DataLoader(…, multiprocessing_context="spawn")',
            )
        with _gate:
            key = self.bucket, self.prefix
            if key not in _buckets:
                _loop = _loop or _Loop()
                _buckets[key] = _Bucket(*key, _loop)
            return _buckets[key]

    def wait(self, request: Request) -> Any:
        """Return the answer to a request. Raises Missing, Conflict, or StoreError naming the object."""
        key, answer = request
        try:
            return answer.result()
        except RequestFailed as e:
            if e.kind == "missing":
                raise Missing(key) from e
            if e.kind == "exists":
                raise Conflict(key) from e
            failed, denied = e, e.kind == "denied"
        except CancelledError:
            failed, denied = RequestFailed("failed", "this process has closed its connections"), False
        raise StoreError(
            f"the object store {'refuses' if denied else 'does not answer'}: {failed}",
            where=f"{self.url}/{key}".rstrip("/"),
            expected="credentials that may read it" if denied else "an answer",
            remedy="see AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            + ("" if denied else "; what was committed is safe, the same command resumes"),
        )

    def list(self, folder: str) -> dict[str, int]:
        """Return {key: bytes} of all objects in a folder and those below it."""
        client = self._client()

        async def operation() -> dict[str, int]:
            found: dict[str, int] = {}
            async for chunk in client.obstore.list(client.store, f"{folder}/" if folder else None):
                found |= {m["path"]: m["size"] for m in chunk}
            return dict(sorted(found.items()))

        return self.wait(("", client.begin(operation)))

    def head(self, key: str) -> dict[str, Any]:
        """Return an object's size and etag. Raises Missing."""
        client = self._client()

        async def operation() -> dict[str, Any]:
            meta = await client.obstore.head_async(client.store, key)
            return {"etag": meta["e_tag"], "size": meta["size"]}

        return self.wait((key, client.begin(operation)))

    def get(self, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
        """Bring objects into files, {key: file}, many at a time. Return size and etag of those that exist."""
        client = self._client()

        async def operation(key: str, path: Path) -> dict[str, Any]:
            data, meta = await client.read(key)
            client.write(path, data)
            return meta

        requests = [(k, client.begin(lambda k=k, p=p: operation(k, p))) for k, p in files.items()]  # type: ignore[misc]
        found = {}
        for request in requests:
            with contextlib.suppress(Missing):
                found[request[0]] = self.wait(request)
        return found

    def ask_blocks(self, key: str, folder: Path, span: tuple[int, int], block: int, size: int, etag: str) -> Request:
        """Begin to bring blocks [first, last) of an object, each into FOLDER/NUMBER with its CRC-32 behind it."""
        client, (first, last) = self._client(), span

        async def operation() -> None:
            start, end = first * block, min(last * block, size)
            view = memoryview((await client.read(key, (start, end), etag))[0])
            for n in range(first, last):
                part = view[n * block - start : (n + 1) * block - start]
                client.write(folder / str(n), part, zlib.crc32(part).to_bytes(4, "little"))

        return key, client.begin(operation)

    def put(self, key: str, path: Path, mode: str = "overwrite") -> str:
        """Put a file as an object and return its etag. Raises Conflict where the object is not as `mode` says.

        `mode` is "create" (only where there is none), "overwrite", or the etag of the version to replace.
        """
        client = self._client()
        condition: Any = mode if mode in ("create", "overwrite") else {"e_tag": mode}

        async def operation() -> str:
            data = path.read_bytes()
            done = await client.obstore.put_async(client.store, key, data, mode=condition, use_multipart=False)
            return done["e_tag"]

        return self.wait((key, client.begin(operation, upload=True)))

    def same(self, key: str, path: Path) -> bool:
        """Return whether an object has a file's bytes. Raises Missing."""
        client = self._client()

        async def operation() -> bool:
            return (await client.read(key))[0] == path.read_bytes()

        return self.wait((key, client.begin(operation, upload=True)))

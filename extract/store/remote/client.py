"""Objects of one bucket and prefix, moved to and from files by obstore in a thread of this process.

Guarantees: a file under its final name is whole: as long as the server says, of the version that was asked for, and
with the MD5 that its etag is, where it is one. A server that has never answered is given up within seconds. A process
that was forked after the first request is refused, because the threads of obstore do not survive a fork. Nothing is
opened at import.
Try: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
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

from ....data.errors import NoStoreError, StillhouseError, StoreError, UsageError
from .cache import cache_folder, cache_limit_bytes, evict, keep, write_file
from .failures import WORDS, DamagedAnswer, RequestFailed, in_one_line, kind_of, proves_itself

CONCURRENT = 64  # requests at a time
UPLOADS = 4  # of them, requests that hold a whole file in memory
SWEEP_SHARE = 50  # The cache is measured again after this part of its limit has been written.
FIRST_S = 10.0  # for each of the two attempts to reach a server that has never answered
_MD5 = re.compile(r"[0-9a-f]{32}")
_URL = re.compile(r"s3:/{1,2}([^/]+)/?(.*)")

Request = tuple[str, Future[Any]]  # an object's key, and the answer to come


class Missing(Exception):
    """There is no such object."""


class Conflict(Exception):
    """The object exists, or is not the one that was expected."""


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

        timeout_s = _number("STILLHOUSE_REMOTE_TIMEOUT_S", 60.0)
        self.attempts = int(_number("STILLHOUSE_REMOTE_ATTEMPTS", 7))
        self.first_s = min(FIRST_S, 2 * timeout_s)
        endpoints = [os.environ[k] for k in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT") if os.environ.get(k)]
        for url in endpoints:
            if not re.match(r"https?://[^/]", url):
                raise UsageError(f"AWS_ENDPOINT_URL={url}", expected="a URL, as in http://localhost:9000")
        http = any(url.startswith("http://") for url in endpoints)
        self.obstore, self.loop = obstore, loop
        limits: Any = {"timeout": f"{timeout_s}s", "connect_timeout": f"{min(5, timeout_s)}s", "allow_http": http}
        try:  # Whole requests with their bodies are retried below.
            self.store = S3Store(bucket, prefix=prefix or None, client_options=limits, retry_config={"max_retries": 0})
        except Exception as e:  # obstore has errors of many classes for settings.
            what = f"the settings of the object store: {in_one_line(e)}"
            raise UsageError(what, where=f"s3://{bucket}", remedy="see the variables AWS_…") from e
        self.cache, self.limit = cache_folder(), cache_limit_bytes()
        self.written = self.limit  # so that the first write measures the cache
        self.answered = False
        self.etags_are_md5: bool | None = None  # None: nothing that came has shown it yet
        self._disputed: dict[str, tuple[str, str]] = {}  # {key: (etag, MD5)} of what came
        self._misput: dict[str, str] = {}  # {key: etag} of what the server has got otherwise than it was sent
        self.requests, self.uploads = asyncio.Semaphore(CONCURRENT), asyncio.Semaphore(UPLOADS)

    def begin(self, operation: Callable[[], Awaitable[Any]], upload: bool = False) -> Future[Any]:
        """Run an operation in the thread that waits for answers."""
        return asyncio.run_coroutine_threadsafe(self._run(operation, upload), self.loop.events)

    async def _run(self, operation: Callable[[], Awaitable[Any]], upload: bool) -> Any:
        async with self.uploads if upload else self.requests:
            attempt = 0
            while True:
                attempt += 1
                try:
                    answer = await (operation() if self.answered else asyncio.wait_for(operation(), self.first_s))
                    self.answered = True
                    return answer
                except StillhouseError:  # This disk's fault, which no other attempt changes.
                    raise
                except Exception as e:
                    kind = kind_of(e, self.answered)
                    self.answered |= kind not in ("unreachable", "credentials")
                    most = {"failed": self.attempts, "damaged": self.attempts, "unreachable": 2}.get(kind, 1)
                    if kind == "unreachable" and self.answered:
                        most = self.attempts
                    if attempt >= most:
                        tries = f" ({attempt} attempts)" if attempt > 1 else ""
                        raise RequestFailed(kind, in_one_line(e) + tries) from e
                    await asyncio.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))

    async def read(self, key: str, span: tuple[int, int] | None = None, etag: str = "") -> tuple[bytes, dict[str, Any]]:
        """Return an object's bytes [begin, end) and its size and etag; `etag`: only of this version."""
        options: Any = ({"range": span} if span else {}) | ({"if_match": etag} if etag else {})
        answer = await self.obstore.get_async(self.store, key, options=options or None)
        data = bytes(await answer.bytes_async())
        first, end = answer.range
        found = {"etag": answer.meta["e_tag"] or "", "size": answer.meta["size"]}
        if len(data) != end - first:
            raise DamagedAnswer(f"{key}: {len(data)} bytes came of {end - first}")
        if span is not None and (first, end) != tuple(span):
            raise DamagedAnswer(f"{key}: bytes {first} to {end} came, and {span[0]} to {span[1]} were asked for")
        if etag and found["etag"] != etag:
            raise DamagedAnswer(f"{key}: the version {found['etag']} came, and {etag} was asked for")
        return data, found

    async def read_whole(self, key: str) -> tuple[bytes, dict[str, Any]]:
        """Return all bytes of an object, with its size and etag. Raises DamagedAnswer where others came."""
        data, found = await self.read(key)
        tag, own = found["etag"].strip('"'), proves_itself(key, data)
        if not _MD5.fullmatch(tag) or self.etags_are_md5 is False:
            if own is False:
                raise DamagedAnswer(f"{key} differs from its own checksum")
            return data, found
        md5 = _md5(data)
        if md5 == tag:
            self.etags_are_md5 = True
            return data, found
        # A bucket that encrypts with keys of its own has other etags. Objects with a checksum of their own show it.
        if own and (self.etags_are_md5 or self._disputed.get(key) == (tag, md5)):
            if self.etags_are_md5 is None:
                self.etags_are_md5 = False
            return data, found
        self._disputed[key] = tag, md5
        raise DamagedAnswer(f"{key} has the etag {tag}, and the MD5 of what came is {md5}")

    async def put(self, key: str, data: bytes, mode: Any) -> str:
        """Put an object and return its etag. What the server has got otherwise than it was sent is replaced."""
        if key in self._misput:
            mode = {"e_tag": self._misput[key]}
        etag = (await self.obstore.put_async(self.store, key, data, mode=mode, use_multipart=False))["e_tag"] or ""
        self._misput.pop(key, None)
        tag = etag.strip('"')
        doubtful = _MD5.fullmatch(tag) and self.etags_are_md5 is not False and _md5(data) != tag
        if doubtful and (await self.read(key))[0] != data:
            self._misput[key] = etag
            raise DamagedAnswer(f"{key} is not what was put")
        return etag

    def keep(self, path: Path, data: bytes, etag: str) -> None:
        """Write a file of the cache with what it is recognised by."""
        keep(path, data, etag)
        self._count(len(data))

    def write(self, path: Path, *parts: bytes | memoryview) -> None:
        """Write a file of the cache, and remove others where there are too many."""
        write_file(path, *parts)
        self._count(sum(map(len, parts)))

    def _count(self, size: int) -> None:
        self.written += size
        if self.written > self.limit // SWEEP_SHARE:
            self.written = 0
            evict(self.cache, self.limit)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UsageError(f"{name}={text}", expected="a number above 0")
    return value


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
            failed = e
        except CancelledError:
            failed = RequestFailed("failed", "this process has closed its connections")
        what, expected, remedy = WORDS[failed.kind]
        where = f"s3://{self.bucket}" if failed.kind == "bucket" else f"{self.url}/{key}".rstrip("/")
        raise StoreError(what.format(failed), where=where, expected=expected, remedy=remedy)

    def list(self, folder: str) -> dict[str, tuple[int, str]]:
        """Return {key: (bytes, etag)} of all objects in a folder and those below it."""
        client = self._client()

        async def operation() -> dict[str, tuple[int, str]]:
            found: dict[str, tuple[int, str]] = {}
            async for chunk in client.obstore.list(client.store, f"{folder}/" if folder else None):
                found |= {m["path"]: (m["size"], m["e_tag"] or "") for m in chunk}
            return dict(sorted(found.items()))

        return self.wait(("", client.begin(operation)))

    def head(self, key: str) -> dict[str, Any]:
        """Return an object's size and etag. Raises Missing."""
        client = self._client()

        async def operation() -> dict[str, Any]:
            meta = await client.obstore.head_async(client.store, key)
            return {"etag": meta["e_tag"] or "", "size": meta["size"]}

        return self.wait((key, client.begin(operation)))

    def read(self, key: str) -> tuple[bytes, str]:
        """Return an object's bytes and its etag. Raises Missing."""
        client = self._client()
        data, meta = self.wait((key, client.begin(lambda: client.read_whole(key))))
        return data, meta["etag"]

    def get(self, files: dict[str, Path], keep: bool = False) -> dict[str, dict[str, Any]]:
        """Bring objects into files, {key: file}, many at a time. Return size and etag of those that exist.

        With `keep`, each file has beside it what it is recognised by later (see cache.py).
        """
        client = self._client()

        async def operation(key: str, path: Path) -> dict[str, Any]:
            data, meta = await client.read_whole(key)
            if keep:
                client.keep(path, data, meta["etag"])
            else:
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
            return await client.put(key, path.read_bytes(), condition)

        return self.wait((key, client.begin(operation, upload=True)))

    def same(self, key: str, path: Path) -> bool:
        """Return whether an object has a file's bytes. Raises Missing."""
        client = self._client()

        async def operation() -> bool:
            return (await client.read_whole(key))[0] == path.read_bytes()

        return self.wait((key, client.begin(operation, upload=True)))

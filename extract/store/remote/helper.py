"""The process that talks to an object store, for the one that started it: requests in, files moved, replies out.

Invariant: a file under its final name is whole (written beside it, renamed), so a kill at any moment leaves nothing
that could be read; and obstore lives here alone, so its threads never meet a fork. One JSON object a line; exits when
its standard input closes. Imports nothing of this package, to start fast. Started by `objects.py`.
Run: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

CONCURRENT = 64  # requests at a time
UPLOADS = 4  # of them, uploads: each holds its file in memory
SWEEP_SHARE = 50  # the cache is measured anew after this part of its size has been written


class Failed(Exception):
    """`kind`: missing, exists (a condition was not met), denied, failed."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def kind_of(error: BaseException) -> str:
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"FileNotFoundError", "NotFoundError"}:
        return "missing"
    if names & {"AlreadyExistsError", "PreconditionError", "NotModifiedError"}:
        return "exists"
    if names & {"PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError"}:
        return "denied"
    return "failed"


class Worker:
    """Carries out requests on one bucket and prefix."""

    def __init__(self, bucket: str, prefix: str, settings: dict[str, Any]) -> None:
        import obstore
        from obstore.store import S3Store

        self.obstore = obstore
        http = any(os.environ.get(k, "").startswith("http://") for k in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
        self.store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "timeout": f"{settings['timeout_s']}s",
                "connect_timeout": f"{min(5, settings['timeout_s'])}s",
                "allow_http": http,
            },
            retry_config={"max_retries": 0},  # the retries are ours, whole requests with their bodies
        )
        self.attempts = int(settings["attempts"])
        self.cache, self.limit = settings["cache"], int(settings["limit_bytes"])
        self.written = self.limit  # so that the first write looks at what is there
        self.requests = asyncio.Semaphore(CONCURRENT)
        self.uploads = asyncio.Semaphore(UPLOADS)

    async def run(self, request: dict[str, Any]) -> Any:
        operation: Callable[[dict[str, Any]], Awaitable[Any]] = getattr(self, "do_" + request["op"])
        limit = self.uploads if request["op"] in ("put", "same") else self.requests
        async with limit:
            for attempt in range(1, self.attempts + 1):
                try:
                    return await operation(request)
                except Exception as e:
                    kind = kind_of(e)
                    if kind != "failed" or attempt == self.attempts:
                        lines = [line for line in str(e).splitlines() if line.strip()] or [repr(e)]
                        tries = f" ({attempt} attempts)" if attempt > 1 else ""
                        raise Failed(kind, lines[0].strip()[:300] + tries) from e
                    await asyncio.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1))

    async def _get(self, request: dict[str, Any], span: tuple[int, int] | None) -> tuple[bytes, dict[str, Any]]:
        options: Any = {}
        if span is not None:
            options["range"] = span
        if request.get("if_match"):
            options["if_match"] = request["if_match"]
        found = await self.obstore.get_async(self.store, request["key"], options=options or None)
        data = bytes(await found.bytes_async())
        first, end = found.range
        if len(data) != end - first:
            raise OSError(f"{request['key']}: {len(data)} bytes came of {end - first}")
        return data, {"etag": found.meta["e_tag"], "size": found.meta["size"]}

    async def do_get(self, request: dict[str, Any]) -> Any:
        """An object into a file."""
        data, meta = await self._get(request, None)
        self._write(request["file"], data)
        return meta

    async def do_blocks(self, request: dict[str, Any]) -> Any:
        """Blocks [first, last) of an object, each into a file FOLDER/NUMBER with its CRC-32 at the end."""
        size, block = request["size"], request["block"]
        start, end = request["first"] * block, min(request["last"] * block, size)
        data, _ = await self._get(request, (start, end))
        view = memoryview(data)
        for n in range(request["first"], request["last"]):
            part = view[n * block - start : (n + 1) * block - start]
            self._write(os.path.join(request["folder"], str(n)), part, zlib.crc32(part).to_bytes(4, "little"))
        return None

    async def do_head(self, request: dict[str, Any]) -> Any:
        meta = await self.obstore.head_async(self.store, request["key"])
        return {"etag": meta["e_tag"], "size": meta["size"]}

    async def do_list(self, request: dict[str, Any]) -> Any:
        """[[key, size], …] of all objects whose keys begin with the folder `prefix`."""
        found: list[list[Any]] = []
        async for chunk in self.obstore.list(self.store, request["prefix"] or None):
            found += [[m["path"], m["size"]] for m in chunk]
        return sorted(found)

    async def do_put(self, request: dict[str, Any]) -> Any:
        """A file as an object. mode: "create" (If-None-Match), "overwrite", or an etag that it must have (If-Match)."""
        mode: Any = request["mode"]
        mode = mode if mode in ("create", "overwrite") else {"e_tag": mode}
        with open(request["file"], "rb") as f:
            data = f.read()
        done = await self.obstore.put_async(self.store, request["key"], data, mode=mode, use_multipart=False)
        return {"etag": done["e_tag"]}

    async def do_same(self, request: dict[str, Any]) -> Any:
        """Whether an object has exactly a file's bytes."""
        data, _ = await self._get(request, None)
        with open(request["file"], "rb") as f:
            return f.read() == data

    def _write(self, path: str, *parts: bytes | memoryview) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        tmp = f"{path}.{os.getpid()}.{threading.get_ident():x}.tmp"
        with open(tmp, "wb") as f:
            for part in parts:
                f.write(part)
        os.replace(tmp, path)
        self.written += sum(map(len, parts))
        if self.written > self.limit // SWEEP_SHARE:
            self.written = 0
            evict(self.cache, self.limit)


def evict(cache: str, limit: int) -> None:
    """Remove what was used longest ago until the cache has a tenth of its limit free; one process at a time."""
    os.makedirs(cache, exist_ok=True)
    with open(os.path.join(cache, "lock"), "a") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        found = sorted(_files(cache))
        total = sum(size for _, size, _ in found)
        if total <= limit:
            return
        for _, size, path in found:
            if total <= limit - limit // 10:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size


def _files(cache: str) -> Iterator[tuple[float, int, str]]:
    """(last use, bytes, path) of what may be fetched again; writers' folders are not touched."""
    for base in ("blocks", "mirrors"):
        for folder, _, names in os.walk(os.path.join(cache, base)):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    s = os.stat(path)
                    yield max(s.st_mtime, s.st_atime), s.st_size, path


async def main() -> None:
    bucket, prefix, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    loop = asyncio.get_running_loop()
    out, gate = sys.stdout, threading.Lock()
    worker = Worker(bucket, prefix, settings)
    tasks: set[asyncio.Task[None]] = set()

    def reply(value: dict[str, Any]) -> None:
        with gate:
            out.write(json.dumps(value) + "\n")
            out.flush()

    async def serve(request: dict[str, Any]) -> None:
        began = time.perf_counter()
        try:
            found = {"ok": await worker.run(request)}
        except Failed as e:
            found = {"kind": e.kind, "message": str(e)}
        except Exception as e:
            found = {"kind": "failed", "message": repr(e)}
        reply({"n": request["n"], "seconds": time.perf_counter() - began, **found})

    def add(line: str) -> None:
        task = loop.create_task(serve(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(add, line)
        os._exit(0)  # who asked has gone; files are whole or absent

    threading.Thread(target=read, daemon=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this; it ends with its pipe
    asyncio.run(main())

"""An S3 server on loopback (moto's, a process of its own), and a proxy before it that counts requests and does harm."""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

# (method, path) -> what to do wrong, or None: "500" or "400 Code" (a status, and the code of an error), "drop" (half of
# the body), "slow", "lost" (done, but no answer), "flip" (one bit of the body), "cut" (fewer bytes, with a
# Content-Length that says so), "stale" (the first answer for this path)
Fault = Callable[[str, str], str | None]

# Moto looks at who asks, and not at the signature.
OWNER = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=0"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def moto() -> Iterator[int]:
    """The port of a server with one bucket, "bucket"."""
    for module in ("moto", "flask", "obstore"):
        if find_spec(module) is None:
            pytest.skip(f"no {module}; pip install 'moto[server]' obstore")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url, deadline = f"http://127.0.0.1:{port}/bucket", time.monotonic() + 60
            while True:
                try:
                    request = urllib.request.Request(url, data=b"", method="PUT")
                    urllib.request.urlopen(request, timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, "moto does not start"
                    time.sleep(0.05)
            yield port
        finally:
            server.kill()


class Proxy:
    """Passes requests on to `port`. `counts` by method; `put_keys`, the paths that were put; `bytes_out` of bodies;
    `fault` says what goes wrong.
    """

    def __init__(self, port: int) -> None:
        proxy = self
        self.counts: Counter[str] = Counter()
        self.bytes_out = 0
        self.put_keys: list[str] = []
        self.harmed: Counter[str] = Counter()
        self.fault: Fault = lambda method, path: None
        self.random = random.Random(0)  # where bits are flipped and bodies cut
        self.first: dict[tuple[str, str, str], tuple[list[tuple[str, str]], bytes]] = {}  # answers to GET, for "stale"
        self.slow = threading.Event()  # what a slow answer waits for: the end of the test

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.counts[self.command] += 1
                proxy.put_keys += [self.path] if self.command == "PUT" else []
                fault = proxy.fault(self.command, self.path)
                if fault is not None:
                    proxy.harmed[fault] += 1
                if fault and fault[:3].isdigit():
                    code = f"<Error><Code>{fault[4:]}</Code></Error>".encode() if fault[4:] else b""
                    self.send_response(int(fault[:3]))
                    self.send_header("Content-Length", str(len(code)))
                    self.end_headers()
                    self.wfile.write(code)
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                answered = answer.getheaders()
                if self.command == "GET" and answer.status < 300:
                    known = (self.command, self.path, self.headers.get("Range") or "")
                    first = proxy.first.setdefault(known, (answered, data))
                    answered, data = first if fault == "stale" else (answered, data)
                if fault == "flip" and data:
                    at = proxy.random.randrange(8 * len(data))
                    data = data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]
                if fault == "cut" and data:
                    data = data[: proxy.random.randrange(len(data))]
                self.send_response(answer.status)
                for k, v in answered:
                    if k.lower() not in ("connection", "transfer-encoding", "server", "date", "content-length"):
                        self.send_header(k, v)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if fault == "lost":  # done, but the answer never comes
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if fault in ("drop", "slow"):
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    if fault == "slow":
                        proxy.slow.wait(60)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(data)
                proxy.bytes_out += len(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.counts, self.harmed, self.bytes_out, self.put_keys = Counter(), Counter(), 0, []
        self.fault = lambda method, path: None
        self.random = random.Random(0)

    def close(self) -> None:
        self.slow.set()
        self._server.shutdown()
        self._server.server_close()


def settings(url: str, cache: Path) -> dict[str, str]:
    """The environment in which Stillhouse takes `url` for its object store, with a block cache of its own."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "STILLHOUSE_CACHE": str(cache),
        "STILLHOUSE_CACHE_BYTES": str(1 << 30),
        "STILLHOUSE_REMOTE_ATTEMPTS": "4",
    }


def upload(port: int, root: Path, prefix: str) -> str:
    """A local store as `aws s3 sync` would bring it there, without the parts beside its commits: its URL."""
    for path in root.rglob("*"):
        if path.is_file() and path.relative_to(root).parts[0] not in ("locks", "tmp"):
            put(port, f"{prefix}/{path.relative_to(root)}", path.read_bytes())
    return f"s3://bucket/{prefix}"


def keys(port: int, prefix: str) -> list[str]:
    """What the bucket holds under a prefix, asked of the server itself."""
    import xml.etree.ElementTree as ET

    found: list[str] = []
    token = ""
    while True:
        url = f"http://127.0.0.1:{port}/bucket?list-type=2&prefix={prefix}{token}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            tree = ET.fromstring(answer.read())
        space = tree.tag.split("}")[0] + "}"
        found += [e.text or "" for e in tree.iter(f"{space}Key")]
        more = tree.find(f"{space}NextContinuationToken")
        if more is None:
            return found
        token = f"&continuation-token={more.text}"


def get(port: int, key: str) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket/{key}", headers=OWNER)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


def put(port: int, key: str, data: bytes) -> None:
    headers = OWNER | {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket/{key}", data, headers, method="PUT")
    urllib.request.urlopen(request, timeout=30).close()

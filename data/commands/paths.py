"""Paths on the command line: an empty one, a URL and a quoted ~ do not become folders of that name.

Guarantees: file://PATH is PATH, and ~ at the beginning is the home folder. Only the path of a store may be s3://. A
file that the shell has opened as standard output is no input.
Try: `stillhouse extract corpus.jsonl "" --teacher MODEL`.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)


class AnyPath(click.Path):
    """A path of a file or folder, which may be absent unless `exists` is set. `stores`: s3:// is allowed."""

    def __init__(self, *, stores: bool = False, **options: Any) -> None:
        super().__init__(path_type=Path, **options)
        self.stores = stores

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path. A usage error names what cannot be one."""
        text = os.fspath(value)
        if not text.strip():
            self.fail("the path is empty; perhaps a variable of the shell is not set", param, ctx)
        if "\0" in text:
            self.fail("the path holds a NUL character", param, ctx)
        url = _URL.fullmatch(text)
        scheme = url["scheme"].lower() if url else ""
        if text.lower().startswith("file:") and not os.path.lexists(text):
            local = re.fullmatch(r"file:(?://(?:localhost)?(?=/))?(/(?!/).*)", text, re.IGNORECASE | re.DOTALL)
            if local is None:
                self.fail(f"{text} names no file of this machine; write file:///PATH, or the path itself", param, ctx)
            text = unquote(local[1])
        elif url and not (self.stores and scheme == "s3"):
            instead = "a path, or s3://BUCKET/PREFIX" if self.stores else "a path"
            self.fail(f"{text}: {scheme}:// is not supported here; give {instead}", param, ctx)
        elif re.match(r"~[^/]*(/|$)", text) and not os.path.lexists(text.split("/", 1)[0]):
            text = os.path.expanduser(text)
        if _is_standard_output(text):
            self.fail(
                f"{text} is also standard output (> or >>), which writes over it; choose another name", param, ctx
            )
        return super().convert(text, param, ctx)


def _is_standard_output(path: str) -> bool:
    """Return whether the shell has opened a regular file as standard output. Devices may be named twice."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return False
    with suppress(OSError, ValueError):
        own = os.fstat(1)
        return stat.S_ISREG(own.st_mode) and os.path.samestat(own, os.stat(path))
    return False


PATH = AnyPath()
STORE = AnyPath(stores=True)
EXISTING = AnyPath(exists=True)
NEW_FILE = AnyPath(dir_okay=False)

"""Trouble that any program can meet, in words: full disks, places that cannot be written, too little memory.

Guarantees: an error that is not such trouble is None, so that the command line can call it unexpected.
Try: `stillhouse corpus info corpus.jsonl --json > /dev/full`.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TypeVar

from ..errors import StillhouseError

E = TypeVar("E", bound=StillhouseError)

OUTPUT = "standard output"
AGAIN = "and repeat the command"
# errno: what is wrong, and what to do. OSErrors of other numbers are what the system calls them.
TROUBLE = {
    errno.ENOSPC: ("no space is left on the file system", f"free some space there, {AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some of your space there, {AGAIN}"),
    errno.EFBIG: ("the file would be larger than allowed", f"raise the limit, see `ulimit -f`, {AGAIN}"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.EACCES: ("this user has no permission", "choose another place, or change its owner or mode"),
    errno.EPERM: ("this user has no permission", "choose another place, or change its owner or mode"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter name"),
    errno.EMFILE: ("too many files are open", f"raise the limit, see `ulimit -n`, {AGAIN}"),
    errno.ENFILE: ("too many files are open on this machine", f"close other programs, {AGAIN}"),
    errno.EIO: ("the disk or the network file system failed", f"look at the system's log, {AGAIN}"),
    errno.ESTALE: ("the network file system lost the file", f"mount it again, {AGAIN}"),
    errno.ENOTDIR: ("a file lies where a folder is needed", "choose another place"),
    errno.EISDIR: ("a folder lies where a file is needed", "choose another place"),
    errno.ENOENT: ("no such file or folder", "check the name"),
}
INSTALL = "stillhouse doctor names what is missing; install that package again"
MEMORY = "raise the limit, see `ulimit -v`, close other programs, or choose smaller batches or a smaller model"
# What libraries raise instead of MemoryError: torch on the CPU and on CUDA, threads, and the loader of libraries.
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|can't start new thread|cannot allocate memory"
    r"|failed to map segment|Unable to allocate|bad_alloc"
    r"|could not create a (?:primitive|memory)|Resource temporarily unavailable",
    re.IGNORECASE,
)
# What the loader of libraries says of files that are missing, cut short, or of another system.
_LIBRARY = re.compile(
    r"cannot open shared object file|invalid ELF header|file too short|undefined symbol|wrong ELF class"
    r"|version [`'].*' not found|ELF load command|symbol not found|DLL load failed|Library not loaded"
)
_NUMBER = re.compile(r"os error (\d+)|errno = (\d+)|error code: (\d+)", re.IGNORECASE)


def os_error(error: Exception, path: Path | None) -> OSError | None:
    """Return the OSError that a library hid in the text of another exception, or None."""
    if isinstance(error, OSError) and error.errno is not None:
        found: int | None = error.errno
    else:
        match = _NUMBER.search(str(error))
        found = int(next(filter(None, match.groups()))) if match else None
    return None if found is None else OSError(found, os.strerror(found), *([] if path is None else [str(path)]))


def in_words(error: BaseException, where: object = None) -> StillhouseError | None:
    """Return ordinary trouble as an error in words, or None. `where` counts if the error names no file."""
    if isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError, OSError)) and _MEMORY.search(str(error))
    ):
        text = str(error).strip().splitlines()
        return StillhouseError(
            "there is too little memory" + (f": {text[0][:200]}" if text else ""), where=where, remedy=MEMORY
        )
    if isinstance(error, ImportError):
        return _import_error(error)
    if isinstance(error, Exception) and not isinstance(error, OSError) and "os error" in str(error):  # of Rust's
        error = os_error(error, Path(str(where)) if where is not None else None) or error
    if not isinstance(error, OSError) or error.errno is None:
        return _library_error(error) if isinstance(error, OSError) and _LIBRARY.search(str(error)) else None
    place = error.filename2 or error.filename or where  # A rename names its target second.
    if isinstance(place, bytes):
        place = os.fsdecode(place)
    known = TROUBLE.get(error.errno)
    if place is None and known is None:
        return None  # a socket, for example
    what, remedy = known or (os.strerror(error.errno), f"remove the cause, {AGAIN}")
    if error.errno == errno.ENOSPC and place not in (None, OUTPUT):
        what += _free(Path(str(place)))
    shown = str(place) if place is None or len(str(place)) < 300 else str(place)[:120] + "…"
    return StillhouseError(what, where=shown if place is not None else None, remedy=remedy)


def not_written(kind: type[E], error: OSError, path: Path, what: str = "cannot be written") -> E:
    """Return the error of a file that could not be written, as an error of a `kind`."""
    trouble = in_words(error, path) or StillhouseError(str(error))
    return kind(f"{what}: {trouble.what}", where=path, remedy=trouble.remedy)


def _import_error(error: ImportError) -> StillhouseError | None:
    """Return a package that is missing or broken in words, or None where the fault is Stillhouse's own."""
    package = (error.name or "").split(".")[0]
    if package == "stillhouse" or not (package or _LIBRARY.search(str(error))):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return StillhouseError(f"the package {package} is not installed", remedy=INSTALL)
    return _library_error(error)


def _library_error(error: Exception) -> StillhouseError:
    text = str(error).strip().splitlines()[0][:200]
    return StillhouseError(f"a library cannot be loaded: {text}", remedy=INSTALL)


def _free(place: Path) -> str:
    """Return how much is free where `place` is, in words, or nothing if that cannot be asked."""
    for folder in (place, *place.parents):
        try:
            s = os.statvfs(folder)
        except OSError:
            continue
        if s.f_files and not s.f_favail:
            return " (it may hold no more files)"
        return f" ({s.f_bavail * s.f_frsize / 1e6:.1f} of {s.f_blocks * s.f_frsize / 1e6:.1f} MB are free)"
    return ""

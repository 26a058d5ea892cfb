"""The machine itself: cores, memory, limits, and whether a folder's file system does what a store asks of it.

Invariant: leaves nothing behind in the folder that it tries. Exercised by: `stillhouse doctor --path FOLDER`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .check import Check

FILES = 1024  # open files of a gather over several views of many shards, with room for the rest
FREE_BYTES = 20 << 30


def machine(path: Path) -> Iterator[Check]:
    yield _cores()
    yield _memory()
    yield _open_files()
    yield _folder(path)
    for name, folder in (("disk", path), ("temporary files", Path(tempfile.gettempdir()))):
        yield _disk(name, folder)


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = [f"{k}={os.environ[k]}" for k in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS") if k in os.environ]
    return Check("machine", "cores", "ok", ", ".join([f"{usable} usable", *told]))


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Check("machine", "memory", "ok", "size unknown")
    limit = _cgroup_limit()
    shown = f"{total / 2**30:.1f} GiB"
    if limit is not None and limit < total:
        shown += f", this process may use {limit / 2**30:.1f}"
    few = min(total, limit or total) < 4 << 30
    remedy = "extraction of a small model needs about 2 GiB, training more: mind batch sizes" if few else None
    return Check("machine", "memory", "low" if few else "ok", shown, remedy)


def _cgroup_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def _open_files() -> Check:
    try:
        import resource
    except ImportError:  # not POSIX
        return Check("machine", "open files", "broken", "no resource limits here", "use Linux or macOS")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if n == resource.RLIM_INFINITY else f"{n:,}" for n in (soft, hard)]
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        what = f"no file may be larger than {size:,} bytes"
        return Check("machine", "limits", "low", what, "ulimit -f unlimited")
    low = soft != resource.RLIM_INFINITY and soft < FILES
    remedy = f"ulimit -n {4096 if hard == resource.RLIM_INFINITY else min(4096, hard)}" if low else None
    return Check("machine", "open files", "low" if low else "ok", f"{shown[0]}, at most {shown[1]}", remedy)


def _disk(name: str, folder: Path) -> Check:
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError as e:
        return Check("machine", name, "broken", f"{there}: {e.strerror}", "look after the disk")
    low = (free < FREE_BYTES and name == "disk") or free < 1 << 30
    remedy = "a view of 1,000 hours takes about 10 GB; `stillhouse extract --dry-run` says how much" if low else None
    return Check("machine", name, "low" if low else "ok", f"{free / 1e9:,.1f} GB free at {there.absolute()}", remedy)


def _folder(path: Path) -> Check:
    """Locks, hard links and reserved space, in a folder of its own inside `path`."""
    try:
        with tempfile.TemporaryDirectory(prefix=".stillhouse-doctor-", dir=path) as scratch:
            missing = _missing(Path(scratch))
    except OSError as e:
        return Check(
            "machine",
            "file system",
            "broken",
            f"{path.absolute()}: {e.strerror}",
            "give --path a folder that can be written",
        )
    if missing:
        what = f"{path.absolute()}: no {', no '.join(missing)}"
        return Check("machine", "file system", "broken", what, "put stores on a local disk, NFS 4 or Lustre")
    return Check("machine", "file system", "ok", f"{path.absolute()}: locks, links, atomic renames, reserved space")


def _missing(scratch: Path) -> list[str]:
    import fcntl

    missing = []
    with open(scratch / "a", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            missing.append("locks (flock)")
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, 1 << 16)
            except OSError:
                missing.append("reserved space (posix_fallocate)")
    try:
        os.link(scratch / "a", scratch / "b")
    except OSError:
        missing.append("hard links")
    try:
        os.replace(scratch / "a", scratch / "c")
    except OSError:
        missing.append("renames")
    return missing

"""The checks of `stillhouse doctor`: Python, libraries, GPU, extras and the machine, one line each.

Guarantees: no library, file system or GPU makes this fail. The schema `stillhouse.doctor/1` only grows.
Try: `stillhouse doctor --json`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .probes import NUMBA_CUDA, TRIES, Answer, ask
from .requirements import Need, install, installed, needs, satisfies

State = Literal["ok", "low", "absent", "broken"]
NOT_INSTALLED = "not installed"
OPEN_FILES = 1024  # enough for a gather over several views of many shards
FREE_BYTES, MEMORY_BYTES = 20 << 30, 4 << 30
DRIVER = Path("/proc/driver/nvidia/gpus")  # The driver of NVIDIA makes a folder here for each GPU.


@dataclass(frozen=True)
class Check:
    """One line of the answer. "low" works, but slowly or with little left. Only "broken" must be repaired."""

    group: str  # "python", "library", "gpu", "extra" or "machine"
    name: str
    state: State
    what: str
    remedy: str | None = None


def as_json(checks: list[Check]) -> dict[str, Any]:
    """Return the checks in the schema of docs/reference/doctor.md."""
    ok = not any(c.state == "broken" for c in checks)
    return {"schema": "stillhouse.doctor/1", "ok": ok, "checks": [asdict(c) for c in checks]}


def examine(path: Path) -> list[Check]:
    """Return all checks in the order in which they are shown. `path` is the folder for stores."""
    required = [n for n in needs() if n.extra != "dev"]
    names = {n.name: n.module for n in required if installed(n.name) is not None}
    # The slowest imports start first, so that they do not delay the end.
    slow = ("transformers", "torchaudio", "torch", "numba")
    programs = {
        name: f"import {names[name]}\n{TRIES.get(name, '')}" for name in sorted(names, key=lambda n: n not in slow)
    }
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        numba_cuda = pool.submit(ask, NUMBA_CUDA)
        answers = dict(zip(programs, pool.map(ask, programs.values())))
    return [
        *_python(required),
        *(_library(n, answers.get(n.name)) for n in required if n.extra is None),
        *_gpu(answers.get("torch", Answer(error=NOT_INSTALLED)), numba_cuda.result()),
        *_extras([n for n in required if n.extra], answers),
        *machine(path),
    ]


def _python(required: list[Need]) -> Iterator[Check]:
    old = sys.version_info < (3, 11)
    what = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Check("python", "Python", "broken" if old else "ok", what, "install Python 3.11 or newer" if old else None)
    version = installed("stillhouse")
    if version is None or not required:
        yield Check("python", "stillhouse", "broken", "the installation is incomplete", "pip install --editable .")
    else:
        yield Check("python", "stillhouse", "ok", f"{version} in {Path(__file__).resolve().parents[2]}")


def _library(need: Need, answer: Answer | None) -> Check:
    version = installed(need.name)
    if version is None or answer is None:
        return Check("library", need.name, "broken", NOT_INSTALLED, need.remedy)
    reinstall = f"pip install --force-reinstall '{need.name}{need.versions}'"
    if answer.error is not None:
        if need.name == "torchaudio":
            reinstall = "reinstall torch and torchaudio from one index, both for the CPU or both for the same CUDA"
        return Check("library", need.name, "broken", f"{version} does not work: {answer.error}", reinstall)
    if not satisfies(version, need.versions):
        return Check("library", need.name, "broken", f"{version}, expected {need.versions}", need.remedy)
    what = ", ".join(filter(None, [version, answer.get("what"), answer.get("low")]))
    low = answer.get("low") is not None
    return Check("library", need.name, "low" if low else "ok", what, reinstall if low else None)


def _gpu(torch: Answer, numba: Answer) -> Iterator[Check]:
    gpus = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    seen = torch.get("devices")
    if gpus or seen:
        yield Check("gpu", "CUDA driver", "ok", f"{gpus or len(seen)} devices")
    else:
        what, remedy = "none, so everything runs on the CPU", "for a GPU: the driver of NVIDIA"
        yield Check("gpu", "CUDA driver", "absent", what, remedy)
    if seen:
        yield Check("gpu", "torch on CUDA", "ok", "; ".join(seen))
    elif gpus:
        what = torch.error or f"torch sees no device ({torch.get('what')})"
        remedy = "install a torch that is built for the CUDA version that nvidia-smi shows, or an older one"
        yield Check("gpu", "torch on CUDA", "broken", what, remedy)
    if numba.error is not None:
        yield Check("gpu", "numba on CUDA", "broken", f"does not work: {numba.error}", install("gpu"))
    elif numba.get("available"):
        yield Check("gpu", "numba on CUDA", "ok", "compiles and runs kernels")
    elif gpus or seen:
        yield Check("gpu", "numba on CUDA", "broken", "numba sees no device", install("gpu"))
    else:
        yield Check("gpu", "numba on CUDA", "absent", "no device", f"on a machine with a GPU: {install('gpu')}")


def _extras(required: list[Need], answers: dict[str, Answer]) -> Iterator[Check]:
    """One line for each extra. It is broken if a part of it is installed and does not work."""
    for extra in dict.fromkeys(str(n.extra) for n in required):
        parts = [_library(n, answers.get(n.name)) for n in required if n.extra == extra]
        missing = [c.name for c in parts if c.what == NOT_INSTALLED]
        broken = [f"{c.name} {c.what}" for c in parts if c.state == "broken" and c.what != NOT_INSTALLED]
        if broken:
            yield Check("extra", extra, "broken", "; ".join(broken), install(extra))
        elif missing:
            yield Check("extra", extra, "absent", f"without {', '.join(missing)}", install(extra))
        else:
            yield Check("extra", extra, "ok", ", ".join(f"{c.name} {c.what}" for c in parts))


def machine(path: Path) -> Iterator[Check]:
    """Yield the checks of cores, memory, limits, and the file system of `path`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [f"{k}={os.environ[k]}" for k in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS") if k in os.environ]
    yield Check("machine", "cores", "ok", ", ".join([f"{usable} usable", *threads]))
    yield _memory()
    yield _open_files()
    yield _folder(path)
    for name, folder in (("disk", path), ("temporary files", Path(tempfile.gettempdir()))):
        yield _disk(name, folder)


def _memory() -> Check:
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # There is no such file, or it says "max".
            continue
    what = f"{sizes[0] / 2**30:.1f} GiB"
    if min(sizes) < sizes[0]:
        what += f", of which this process may use {min(sizes) / 2**30:.1f} GiB"
    low = min(sizes) < MEMORY_BYTES
    remedy = "use small batches: to extract a small model needs about 2 GiB, and training more" if low else None
    return Check("machine", "memory", "low" if low else "ok", what, remedy)


def _open_files() -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if n == resource.RLIM_INFINITY else f"{n:,}" for n in (soft, hard)]
    low = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    remedy = f"ulimit -n {4096 if hard == resource.RLIM_INFINITY else min(4096, hard)}" if low else None
    return Check("machine", "open files", "low" if low else "ok", f"{shown[0]}, at most {shown[1]}", remedy)


def _disk(name: str, folder: Path) -> Check:
    folder = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/")).absolute()
    try:
        free = shutil.disk_usage(folder).free
    except OSError as e:
        return Check("machine", name, "broken", f"{folder}: {e.strerror}", "check the disk")
    low = (free < FREE_BYTES and name == "disk") or free < 1 << 30
    remedy = "a view of 1,000 hours takes about 10 GB; `stillhouse extract --dry-run` shows how much" if low else None
    return Check("machine", name, "low" if low else "ok", f"{free / 1e9:,.1f} GB free at {folder}", remedy)


def _folder(path: Path) -> Check:
    """Try the file system in a new folder inside `path`, which is deleted again."""
    shown = path.absolute()
    try:
        with tempfile.TemporaryDirectory(prefix=".stillhouse-doctor-", dir=path) as scratch:
            missing = _missing(Path(scratch))
    except OSError as e:
        what, remedy = f"{shown}: {e.strerror}", "give --path a folder that can be written"
        return Check("machine", "file system", "broken", what, remedy)
    if missing:
        what, remedy = f"{shown}: no {', no '.join(missing)}", "put stores on a local disk, NFS 4 or Lustre"
        return Check("machine", "file system", "broken", what, remedy)
    return Check("machine", "file system", "ok", f"{shown}: locks, links, atomic renames, reserved space")


def _missing(scratch: Path) -> list[str]:
    import fcntl

    missing = []
    with open(scratch / "a", "wb") as file:
        tries = {
            "locks (flock)": lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            "reserved space (posix_fallocate)": lambda: (
                os.posix_fallocate(file.fileno(), 0, 1 << 16) if hasattr(os, "posix_fallocate") else None
            ),
            "hard links": lambda: os.link(scratch / "a", scratch / "b"),
            "renames": lambda: os.replace(scratch / "a", scratch / "c"),
        }
        for name, attempt in tries.items():
            try:
                attempt()
            except OSError:
                missing.append(name)
    return missing

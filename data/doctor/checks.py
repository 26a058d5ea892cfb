"""All that `stillhouse doctor` looks at, each as one line: what is there, whether it works, what to do.

Invariant: nothing that is looked at can make this fail; every check says something. Exercised by: `stillhouse doctor`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from . import probes
from .probes import Answer, ask, together
from .requirements import Need, install, installed, module, needs, satisfies

State = Literal["ok", "low", "absent", "broken"]


@dataclass(frozen=True)
class Check:
    """`state`: "ok"; "low" works, but not well; "absent" is not needed by everyone; "broken" has to be mended."""

    group: str  # "python", "library", "gpu", "extra" or "machine"
    name: str
    state: State
    what: str
    remedy: str | None = None


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The schema is in docs/reference/doctor.md and only grows."""
    ok = not any(c.state == "broken" for c in checks)
    return {"schema": "stillhouse.doctor/1", "ok": ok, "checks": [asdict(c) for c in checks]}


def examine(path: Path) -> list[Check]:
    """Everything, in the order in which it is shown; `path` is where stores are to lie."""
    asked = needs()
    libraries = [n for n in asked if n.extra is None]
    others = [n for n in asked if n.extra not in (None, "dev")]
    there = list(dict.fromkeys(n.name for n in [*libraries, *others] if installed(n.name) is not None))
    questions: dict[str, Callable[[], Answer]] = {
        name: partial(ask, probes.OF.get(name, f"import {module(name)}")) for name in there
    }
    questions |= {
        " driver": partial(ask, probes.DRIVER),
        " numba.cuda": partial(ask, probes.NUMBA_CUDA),
        " simulator": partial(ask, probes.NUMBA_CUDA, NUMBA_ENABLE_CUDASIM="1"),
    }
    # The slow ones first, so that none is left over at the end
    order = sorted(questions, key=lambda name: name not in ("transformers", "torchaudio", "torch", "numba"))
    answers = dict(zip(order, together([questions[name] for name in order])))
    return [
        *_python(asked),
        *(_library(n, answers.get(n.name)) for n in libraries),
        *_gpu(answers),
        *_extras(others, answers),
        *machine(path),
    ]


def _python(asked: list[Need]) -> Iterator[Check]:
    old = sys.version_info < (3, 11)
    what = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Check("python", "Python", "broken" if old else "ok", what, "Python 3.11 or newer" if old else None)
    version = installed("stillhouse")
    if version is None or not asked:
        yield Check("python", "stillhouse", "broken", "its installation is incomplete", "pip install --editable .")
    else:
        yield Check("python", "stillhouse", "ok", f"{version} in {Path(__file__).resolve().parents[2]}")


def _library(need: Need, answer: Answer | None) -> Check:
    version = installed(need.name)
    if version is None or answer is None:
        return Check("library", need.name, "broken", "not installed", need.remedy)
    if answer.error is not None:
        again = f"pip install --force-reinstall '{need.name}{need.versions}'"
        if need.name == "torchaudio":
            again = "install torch and torchaudio anew from one place, both for the CPU or both for the same CUDA"
        return Check("library", need.name, "broken", f"{version} does not work: {answer.error}", again)
    if not satisfies(version, need.versions):
        return Check("library", need.name, "broken", f"{version}, {need.versions} asked for", need.remedy)
    if answer.get("implementation") == "python":
        what = f"{version}, without its compiled part: checksums are some hundred times slower"
        return Check("library", need.name, "low", what, "pip install --force-reinstall google-crc32c")
    return Check("library", need.name, "ok", ", ".join([version, *_details(need.name, answer)]))


def _details(name: str, answer: Answer) -> list[str]:
    if name == "torch":
        built = answer.get("built_for")
        return [f"built for CUDA {built}" if built else "built for the CPU", f"{answer.get('threads')} threads"]
    if name == "numba":
        return [f"threads by {answer.get('layer')}"]
    if name == "soundfile":
        formats = [f for f in ("WAV", "FLAC", "OGG", "MP3") if f in (answer.get("formats") or [])]
        return [f"libsndfile {answer.get('libsndfile')}: {' '.join(formats)} and more"]
    if name == "h5py":
        return [f"HDF5 {answer.get('hdf5')}"]
    if name == "zarr":
        return ["sharding and crc32c work"]
    return []


def _gpu(answers: dict[str, Answer]) -> Iterator[Check]:
    driver, torch = answers[" driver"], answers.get("torch", Answer(error="not installed"))
    devices = driver.get("devices") or 0
    if driver.error or (driver.get("there") and driver.get("init")):
        what = driver.error or f"the driver does not start: CUDA error {driver.get('init')}"
        yield Check("gpu", "CUDA driver", "broken", what, "look at nvidia-smi; install the driver anew")
    elif not devices:
        what = "none, so everything runs on the CPU" if not driver.get("there") else "there, but it sees no device"
        yield Check("gpu", "CUDA driver", "absent", what, "for a GPU: NVIDIA's driver")
    else:
        yield Check("gpu", "CUDA driver", "ok", f"for CUDA {driver.get('version')}, {devices} devices")
    if torch.get("cuda"):
        yield Check("gpu", "torch on CUDA", "ok", "; ".join(torch.get("devices") or []))
    elif devices:
        what = torch.error or f"sees no device; built for {torch.get('built_for') or 'the CPU'}"
        remedy = f"install a torch that is built for CUDA {driver.get('version')} or older"
        yield Check("gpu", "torch on CUDA", "broken", what, remedy)
    numba = answers[" numba.cuda"]
    if numba.error is not None:
        what = f"does not work: {numba.error}"
        yield Check("gpu", "numba on CUDA", "broken", what, install("gpu"))
    elif numba.get("available"):
        yield Check("gpu", "numba on CUDA", "ok", "compiles and runs kernels")
    elif devices:
        yield Check("gpu", "numba on CUDA", "broken", "sees no device", install("gpu"))
    else:
        yield Check("gpu", "numba on CUDA", "absent", "no device", f"on a machine with a GPU: {install('gpu')}")
    simulator = answers[" simulator"]
    if simulator.error is not None:
        what = f"does not work: {simulator.error}; only tests of the kernels need it"
        yield Check("gpu", "numba's simulator", "low", what, "pip install --force-reinstall numba")
    else:
        yield Check("gpu", "numba's simulator", "ok", "runs kernels without a device, for tests")


def _extras(asked: list[Need], answers: dict[str, Answer]) -> Iterator[Check]:
    """A line an extra: broken if something of it is there and does not work."""
    for extra in dict.fromkeys(n.extra for n in asked):
        mine = [n for n in asked if n.extra == extra]
        have = {n.name: installed(n.name) for n in mine}
        broken = [f"{n.name} does not work: {e}" for n in mine if n.name in answers and (e := answers[n.name].error)]
        broken += [
            f"{n.name} {v}, {n.versions} asked for"
            for n in mine
            if (v := have[n.name]) and not satisfies(v, n.versions)
        ]
        missing = [name for name, version in have.items() if version is None]
        shown = ", ".join(f"{name} {version}" for name, version in have.items() if version is not None)
        if broken:
            yield Check("extra", str(extra), "broken", "; ".join(broken), install(str(extra)))
        elif missing:
            yield Check("extra", str(extra), "absent", f"without {', '.join(missing)}", install(str(extra)))
        else:
            yield Check("extra", str(extra), "ok", shown)


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

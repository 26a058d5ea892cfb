"""All that `stillhouse doctor` looks at, each as one line: what is there, whether it works, what to do.

Invariant: nothing that is looked at can make this fail; every check says something. Exercised by: `stillhouse doctor`.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import programs
from .check import Check
from .machine import machine
from .probes import Answer, ask, together
from .requirements import Need, install, installed, module, needs, satisfies


def examine(path: Path) -> list[Check]:
    """Everything, in the order in which it is shown; `path` is where stores are to lie."""
    asked = needs()
    libraries = [n for n in asked if n.extra is None]
    others = [n for n in asked if n.extra not in (None, "dev")]
    there = list(dict.fromkeys(n.name for n in [*libraries, *others] if installed(n.name) is not None))
    questions: dict[str, Callable[[], Answer]] = {
        name: partial(ask, programs.OF.get(name, f"import {module(name)}")) for name in there
    }
    questions |= {
        " driver": partial(ask, programs.DRIVER),
        " numba.cuda": partial(ask, programs.NUMBA_CUDA),
        " simulator": partial(ask, programs.NUMBA_CUDA, NUMBA_ENABLE_CUDASIM="1"),
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

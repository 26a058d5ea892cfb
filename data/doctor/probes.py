"""Ask another Python process: it may fail, crash, print or hang, and this one only hears of it.

Invariant: nothing of what is probed is imported here, and no answer takes longer than its limit.
Exercised by: `stillhouse doctor`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

MARK = "stillhouse doctor:"
LIMIT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """`facts` of a program that ended well, else the `error` in one line."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def get(self, name: str) -> Any:
        return self.facts.get(name)


def ask(program: str, limit_s: float = LIMIT_S, **environment: str) -> Answer:
    """Run a program that fills a dict `facts`; -P keeps modules of the current folder out of it."""
    text = f"facts = {{}}\n{program}\nimport json\nprint({MARK!r} + json.dumps(facts))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", text],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer in {limit_s:g} s")
    except OSError as e:
        return Answer(error=f"cannot start {sys.executable}: {e.strerror}")
    if done.returncode < 0:
        return Answer(error=f"crashed: {_signal(-done.returncode)}")
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Answer(error=lines[-1] if lines else f"ended with exit code {done.returncode}")
    return Answer(json.loads(said[-1].removeprefix(MARK)))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def together(questions: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """Several at once, as many as there are cores; the answers in order."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return list(pool.map(lambda question: question(), questions))


TORCH = """
import torch
assert float(torch.ones(8, 8).mm(torch.ones(8, 8)).sum()) == 512
facts.update(built_for=torch.version.cuda, threads=torch.get_num_threads(), cuda=torch.cuda.is_available())
facts["devices"] = []
if facts["cuda"]:
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts["devices"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}")
    assert float(torch.ones(8, device="cuda").sum()) == 8
"""

TORCHAUDIO = """
import torch, torchaudio
from torchaudio.compliance.kaldi import fbank
assert fbank(torch.zeros(1, 16000), num_mel_bins=80).shape[1] == 80
"""

DRIVER = """
import ctypes
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError:
    driver = None
facts.update(there=driver is not None, devices=0)
if driver is not None:
    number = ctypes.c_int()
    facts["init"] = driver.cuInit(0)
    if not driver.cuDriverGetVersion(ctypes.byref(number)):
        facts["version"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if not facts["init"] and not driver.cuDeviceGetCount(ctypes.byref(number)):
        facts["devices"] = number.value
"""

NUMBA = """
import numba, numpy
@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(len(x)):
        s += x[i]
    return s
assert total(numpy.ones(64)) == 64
facts.update(layer=numba.threading_layer(), threads=numba.get_num_threads())
"""

NUMBA_CUDA = """
import numpy
from numba import cuda
@cuda.jit
def seven(x):
    x[0] = 7
facts["available"] = bool(cuda.is_available())
if facts["available"]:
    x = numpy.zeros(1)
    seven[1, 1](x)
    assert x[0] == 7
"""

ZARR = """
import numpy, zarr
from zarr.storage import MemoryStore
x = numpy.arange(256, dtype="float16").reshape(128, 2)
a = zarr.create_array(MemoryStore(), shape=x.shape, dtype=x.dtype, chunks=(64, 2), shards=(128, 2), compressors=None)
a[:] = x
assert (a[:] == x).all()
"""

CRC32C = """
import google_crc32c
assert google_crc32c.value(b"123456789") == 0xE3069283
facts["implementation"] = google_crc32c.implementation
"""

SOUNDFILE = """
import io, numpy, soundfile
facts.update(libsndfile=soundfile.__libsndfile_version__, formats=sorted(soundfile.available_formats()))
for kind in ("WAV", "FLAC", "OGG"):
    file = io.BytesIO()
    soundfile.write(file, numpy.zeros(1600), 16000, format=kind)
    file.seek(0)
    assert len(soundfile.read(file)[0]) == 1600, kind
"""

H5PY = """
import h5py
facts["hdf5"] = h5py.version.hdf5_version
"""

SENTENCEPIECE = """
import sentencepiece
sentencepiece.SentencePieceProcessor()
"""

TRANSFORMERS = """
from transformers import AutoModel, AutoTokenizer
"""

# By the name of the distribution; of all others the import is tried
OF = {
    "torch": TORCH,
    "torchaudio": TORCHAUDIO,
    "numba": NUMBA,
    "zarr": ZARR,
    "google-crc32c": CRC32C,
    "soundfile": SOUNDFILE,
    "h5py": H5PY,
    "sentencepiece": SENTENCEPIECE,
    "transformers": TRANSFORMERS,
}

"""Import a library in another Python process, where it may fail, crash, print or hang.

Guarantees: this process imports nothing of what it probes, and no answer takes longer than its limit.
Try: `stillhouse doctor`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

MARK = "stillhouse doctor:"
LIMIT_S = 120.0

# Some libraries can be imported and still not work, so these lines run after the import. `facts["what"]` is shown after
# the version, and `facts["low"]` if the library works badly.
TRIES = {
    "google-crc32c": """
if google_crc32c.implementation == "python":
    facts["low"] = "without its compiled part, checksums are some hundred times slower"
""",
    # numba looks for a folder that it can write its cache to when a function with a cache is made. It raises
    # RuntimeError where there is none, and the kernels of the loss then go to a temporary folder.
    "numba": f"""
assert numba.njit(lambda: 7)() == 7
try:
    numba.njit(cache=True)(eval(compile("lambda: 7", {__file__!r}, "eval")))
except RuntimeError:
    from stillhouse.train.rnnt.cache import private_folder
    folder = private_folder()
    if folder is None:
        facts["low"] = "no folder can keep compiled kernels, so each process compiles them: set NUMBA_CACHE_DIR"
    else:
        facts["what"] = f"kernels are kept in {{folder}}: NUMBA_CACHE_DIR names another folder"
""",
    "soundfile": """
import io
for kind in ("WAV", "FLAC", "OGG"):
    file = io.BytesIO()
    soundfile.write(file, [0.0] * 1600, 16000, format=kind)
    file.seek(0)
    assert len(soundfile.read(file)[0]) == 1600, kind
facts["what"] = f"libsndfile {soundfile.__libsndfile_version__}"
""",
    "torch": """
facts["what"] = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
assert not facts["devices"] or float(torch.ones(8, device="cuda").sum()) == 8
""",
}
NUMBA_CUDA = """
import numpy
from numba import cuda
@cuda.jit
def seven(x):
    x[0] = 7
x, facts["available"] = numpy.zeros(1), bool(cuda.is_available())
if facts["available"]:
    seven[1, 1](x)
    assert x[0] == 7
"""


@dataclass(frozen=True)
class Answer:
    """What a program put into `facts`, or the error that ended it, in one line."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def get(self, name: str) -> Any:
        """Return one fact, or None."""
        return self.facts.get(name)


def ask(program: str, limit_s: float = LIMIT_S) -> Answer:
    """Run a program that fills a dict `facts` of JSON values. It cannot import modules of the current folder."""
    text = f"facts = {{}}\n{program}\nimport json\nprint({MARK!r} + json.dumps(facts))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", text],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer in {limit_s:g} s")
    except OSError as e:
        return Answer(error=f"cannot start {sys.executable}: {e.strerror}")
    if done.returncode < 0:
        number = -done.returncode
        named = number in {s.value for s in signal.Signals}
        return Answer(error=f"crashed: {signal.Signals(number).name if named else f'signal {number}'}")
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answers:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Answer(error=lines[-1] if lines else f"ended with exit code {done.returncode}")
    return Answer(json.loads(answers[-1].removeprefix(MARK)))

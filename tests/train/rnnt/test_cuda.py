"""The CUDA kernels without a GPU: in numba's simulator against the reference, and compiled to machine code.

Both run in a process of their own: the simulator is chosen before numba is imported. No GPU has run these kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = ["dtypes", "layouts", "shapes", "many_threads", "extremes", "joint", "pruned", "tdt", "device_lengths"]


@pytest.mark.parametrize("case", CASES)
def test_in_the_simulator(case):
    run = subprocess.run(
        [sys.executable, str(HERE / "cuda_simulated.py"), case], capture_output=True, text=True, timeout=170,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert run.stdout.strip().endswith("ok")


def test_numba_does_not_warn_of_our_small_grids():
    """Its warning comes where a launch is configured, and would be an error where warnings are."""
    from numba.cuda.dispatcher import config

    from stillhouse.train.rnnt.cuda.launch import _configured

    class Kernel:
        def __getitem__(self, given):
            if given[0] is None:
                raise ValueError("no grid")
            return given, config.CUDA_LOW_OCCUPANCY_WARNINGS

    before = config.CUDA_LOW_OCCUPANCY_WARNINGS
    assert before
    assert _configured(Kernel(), (1, 2), 8, "stream") == (((1, 2), 8, "stream"), 0)
    with pytest.raises(ValueError, match="no grid"):
        _configured(Kernel(), None, 8, "stream")
    assert before == config.CUDA_LOW_OCCUPANCY_WARNINGS


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper(tmp_path):
    """Needs the extra `gpu` in this interpreter (or one named by STILLHOUSE_CUDA_PYTHON) and ptxas on the path."""
    python = os.environ.get("STILLHOUSE_CUDA_PYTHON", sys.executable)
    root = HERE.parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / ".typing")}
    probe = subprocess.run([python, "-c", "import numba_cuda"], capture_output=True)
    if probe.returncode or not shutil.which("ptxas"):
        pytest.skip("no numba-cuda, or no ptxas on the path")
    run = subprocess.run(
        [python, str(HERE / "cuda_compiled.py"), str(tmp_path)], capture_output=True, text=True, timeout=1500,
        env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    table = json.loads(run.stdout)
    assert {row["arch"] for row in table} == {"sm_80", "sm_90"}
    for row in table:
        limit = 96 if row["dtype"] == "float64" else 64
        assert row["registers"] <= limit and row["spill_bytes"] == 0, row

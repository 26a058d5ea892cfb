"""Kills at random moments: rows that were reported are neither lost nor computed again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.features.compute import FeatureFile, compute_features
from stillhouse.data.manifest import Corpus


@pytest.mark.parametrize(
    ("seed", "kills"), [(1, 25), *(pytest.param(seed, 100, marks=pytest.mark.slow) for seed in (2, 3))]
)
def test_kills_lose_nothing_and_repeat_nothing(
    make_corpus: Callable[..., Corpus], tmp_path: Path, seed: int, kills: int
) -> None:
    corpus = make_corpus(24)
    path = tmp_path / "killed.h5"
    script = Path(__file__).with_name("kill_child.py")
    command = [sys.executable, str(script), str(corpus.path), str(path), str(kills), str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["killed"] == kills
    done: set[str] = set()
    reports, rows = 0, 0
    for lines in result["reports"]:
        for line in lines:
            assert "error" not in line
            if "restart" in line:
                done, rows = set(), 0
            if "there" in line:
                # Every run finds at least what earlier ones reported, and never less than before.
                assert line["there"] >= max(rows, 2 * len(done))
                rows = line["there"]
            for id in line.get("done", []):
                assert id not in done, "computed twice"
                done.add(id)
                reports += 1
    assert reports >= 24  # each once at least
    assert any(f.endswith(".tmp") for files in result["files"] for f in files), "no kill fell into a write"

    compute_features(corpus, tmp_path / "whole.h5", (1.0, 1.1), workers=0)
    whole, killed = FeatureFile(tmp_path / "whole.h5"), FeatureFile(path)
    assert set(killed.open().keys()) == set(whole.open().keys())
    assert len(killed.row_ids) == 48
    assert killed.damaged_rows() == []
    for speed in (1.0, 1.1):
        np.testing.assert_allclose(
            killed.gather(whole.ids, speed)[0], whole.gather(whole.ids, speed)[0], rtol=2e-3, atol=2e-3
        )
    assert not list(tmp_path.glob("*.parts"))


def test_workers_leave_when_their_parent_is_killed(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make_corpus(40)
    path = tmp_path / "f.h5"
    code = (
        "from stillhouse.data.features.compute import compute_features\n"
        "from stillhouse.data.manifest import read_manifest\n"
        "if __name__ == '__main__':\n"
        f"    corpus = read_manifest({str(corpus.path)!r})\n"
        f"    compute_features(corpus, {str(path)!r}, (0.9, 1.0, 1.1), workers=1, part_s=0.5,\n"
        "        on_part=lambda part: print(len(part.ids), flush=True))\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker stayed"
        os.sched_yield()
    process.stdout.close()
    report = compute_features(corpus, path, (0.9, 1.0, 1.1), workers=0)
    assert report.rows_before >= 3
    assert report.rows_before + report.rows_computed == 120
    assert FeatureFile(path).damaged_rows() == []


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

"""Several processes on one store, here or on a Ray cluster: the same bytes, and errors of workers are raised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stillhouse.data.errors import StoreError, TeacherError, UsageError
from stillhouse.data.manifest import write_manifest
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.pipeline.workers import parse_part, start_ray_workers, start_workers
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded
from .test_crash import tree
from .test_extract import long_corpus

REQUEST = Request("t", [0, 2], ["alone", "both:4"])
SETTINGS = ["--name", "t", "--layers", "0,2", "--context", "alone", "--context", "both:4", "--device", "cpu"]


def test_three_workers_make_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    load = {"source": str(bert), "device": "cpu"}
    summary = extract(
        tmp_path / "three", long_corpus(), loaded(bert), REQUEST, start_workers=start_workers("t", load, 3, (0, 1))
    )
    extract(tmp_path / "one", long_corpus(), loaded(bert), REQUEST)
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    assert summary.units_done_now == summary.units > 4 and summary.rows_done_now == 2 * summary.tokens
    assert len(summary.views) == 4 and verify(Store.open(tmp_path / "three")) == []


def test_the_error_of_a_worker(bert: Path, tmp_path: Path) -> None:
    load = {"source": str(tmp_path / "no model here"), "device": "cpu"}
    with pytest.raises(TeacherError, match="there is no such folder"):
        extract(
            tmp_path / "s", long_corpus(1), loaded(bert), REQUEST, start_workers=start_workers("t", load, 2, (0, 1))
        )


def test_a_killed_worker(bert: Path, tmp_path: Path) -> None:
    load = {"source": str(bert), "device": "cpu"}
    make_plan(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST)

    def start(plan):
        workers = start_workers("t", load, 2, (0, 1))(plan)  # type: ignore[misc]
        os.kill(workers._processes[0].pid, signal.SIGKILL)
        return workers

    with pytest.raises(StoreError, match="worker-1 died"):
        extract(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST, start_workers=start)
    assert extract(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST).views


def test_parts() -> None:
    assert parse_part("2/4") == (2, 4) and parse_part(None) == (0, 1)
    for bad in ("4/4", "1", "-1/3", "a/b"):
        with pytest.raises(UsageError):
            parse_part(bad)


def shell(corpus: Path, store: Path, *more: str) -> dict:
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(corpus), str(store), "--json", *more]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # as many threads as there are cores
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_manifest(tmp_path / "corpus.jsonl", long_corpus().utterances)
    return tmp_path / "corpus.jsonl"


@pytest.mark.slow
def test_one_worker_and_three_make_the_same_bytes(bert: Path, corpus: Path, tmp_path: Path) -> None:
    one = shell(corpus, tmp_path / "one", "--teacher", str(bert), *SETTINGS)
    three = shell(corpus, tmp_path / "three", "--teacher", str(bert), *SETTINGS, "--workers", "3")
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert one["units_done_now"] == three["units_done_now"] == one["units"] > 4
    assert one["fed_tokens"] == three["fed_tokens"]


@pytest.mark.slow
def test_a_ray_cluster_of_two_makes_the_same_bytes(bert: Path, corpus: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("no Ray; pip install 'stillhouse[cluster]'")
    ray = shell(corpus, tmp_path / "ray", "--teacher", str(bert), *SETTINGS, "--engine", "ray", "--workers", "2")
    shell(corpus, tmp_path / "one", "--teacher", str(bert), *SETTINGS)
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    assert ray["units_done_now"] == ray["units"] > 4 and len(ray["views"]) == 4
    assert verify(Store.open(tmp_path / "ray")) == []
    done = {r["writer"]["pid"] for r in map(_json, (tmp_path / "ray" / "commits").rglob("[0-9]*.json"))}
    assert 1 <= len(done) <= 2
    state = shell(corpus, tmp_path / "ray", "--status")
    assert state["complete"] and all(c["running"] == 0 for c in state["contexts"])


def _json(path: Path) -> dict:
    return json.loads(path.read_bytes())


@pytest.mark.slow
def test_the_error_of_a_ray_worker(bert: Path, corpus: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("no Ray; pip install 'stillhouse[cluster]'")
    plan = make_plan(tmp_path / "s", long_corpus(1), loaded(bert), Request("t", [0], ["alone"]))
    load = {"source": str(tmp_path / "gone"), "device": "cpu"}
    with pytest.raises(Exception, match="gone: cannot be loaded"):
        start_ray_workers("t", load, 2, (0, 1), None)(plan).finish()

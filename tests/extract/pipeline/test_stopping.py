"""SIGTERM and SIGUSR1 during an extraction: what is whole is committed, the message is true, the command resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stillhouse.data.manifest import write_manifest
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from ..conftest import make_corpus, sentences

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [t for t in sentences() if t.isascii()] * 12
    write_manifest(tmp_path / "corpus.jsonl", make_corpus(texts, 5).utterances)
    return tmp_path / "corpus.jsonl"


def start(corpus: Path, store: Path, teacher: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(corpus), str(store), "--teacher", str(teacher)]
    command += ["--name", "t", "--layers", "0-2", "--context", "alone", "--context", "both:4", "--device", "cpu"]
    command += ["--batch-tokens", "64", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def wait_for_a_commit(process: subprocess.Popen[str], store: Path) -> None:
    while process.poll() is None and not any(store.glob("commits/t/*/[0-9]*.json")):
        pass
    assert process.poll() is None, process.communicate()


def check_stopped(process: subprocess.Popen[str], store: Path, name: str) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143 and out == "", err
    said = re.search(
        rf"^stopped by {name}: (\d+) of (\d+) work items of t are committed\. Repeat the command", err, re.M
    )
    assert said is not None and "error" not in err and "Traceback" not in err, err
    contexts = status(store).contexts
    assert (int(said[1]), int(said[2])) == (sum(c.done for c in contexts), sum(c.units for c in contexts))
    assert 1 <= int(said[1]) < int(said[2]) and not any(c.running for c in contexts)
    assert not any((store / "tmp").iterdir())


def check_resumes(corpus: Path, store: Path, teacher: Path, *more: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in store.glob("commits/t/*/[0-9]*.json")}
    process = start(corpus, store, teacher, *more, "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["units_done_now"] == summary["units"] - len(before)
    assert {p: p.stat().st_mtime_ns for p in before} == before and verify(Store.open(store)) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_one_process(bert: Path, corpus: Path, tmp_path: Path, name: str) -> None:
    process = start(corpus, tmp_path / "s", bert)
    wait_for_a_commit(process, tmp_path / "s")
    process.send_signal(getattr(signal, name))
    check_stopped(process, tmp_path / "s", name)
    check_resumes(corpus, tmp_path / "s", bert)


def children(pid: int) -> list[int]:
    """The worker processes of a process."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in found if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_several_workers(bert: Path, corpus: Path, tmp_path: Path, to_all: bool) -> None:
    """Slurm signals all processes of a step, `kill` the one that it is given. All end."""
    process = start(corpus, tmp_path / "s", bert, "--workers", "2")
    wait_for_a_commit(process, tmp_path / "s")
    workers = children(process.pid)
    assert len(workers) == 1
    for pid in [process.pid, *(workers if to_all else [])]:
        os.kill(pid, signal.SIGUSR1)
    check_stopped(process, tmp_path / "s", "SIGUSR1")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    check_resumes(corpus, tmp_path / "s", bert, "--workers", "2")


@pytest.mark.slow
def test_a_ray_cluster(bert: Path, corpus: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("no Ray; pip install 'stillhouse[cluster]'")
    process = start(corpus, tmp_path / "s", bert, "--engine", "ray", "--workers", "2")
    wait_for_a_commit(process, tmp_path / "s")
    process.send_signal(signal.SIGTERM)
    check_stopped(process, tmp_path / "s", "SIGTERM")
    check_resumes(corpus, tmp_path / "s", bert, "--engine", "ray", "--workers", "2")


def test_before_anything_is_planned(bert: Path, corpus: Path, tmp_path: Path) -> None:
    """A lock on the plan keeps the command waiting there."""
    from stillhouse.data.files.lock import FileLock
    from stillhouse.extract.store.disk.paths import Paths
    from stillhouse.extract.store.storage import open_files

    with FileLock(Paths(open_files(tmp_path / "s")).lock("plan")):
        process = start(corpus, tmp_path / "s", bert)
        lock = str(tmp_path / "s" / "locks" / "plan.lock")
        while process.poll() is None and lock not in open_files_of(process.pid):
            pass
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "stopped by SIGTERM. Repeat the command to resume." in err, err
    assert not (tmp_path / "s" / "store.json").exists()


def open_files_of(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue
    return found

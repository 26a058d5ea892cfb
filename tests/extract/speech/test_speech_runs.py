"""Speech teachers with several writers: the same bytes by however many, whoever is killed, here and in a bucket."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import s3
import soundfile

from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.pipeline.workers import start_workers
from stillhouse.extract.pipeline.workers.on_ray import run_task
from stillhouse.extract.speech.encoder import load_encoder
from stillhouse.extract.speech.teacher import SpeechTeacher
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.verify.verify import verify

from ..pipeline.test_crash import DRIVER, ENV, tree
from ..pipeline.test_workers import shell
from .test_rows import saved

REQUEST = Request("t", [0, 2], ["alone"])
TORTURE = DRIVER.with_name("torture_child.py")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A corpus of three shards, the teacher, and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("runs")
    rng, utterances = np.random.default_rng(1), []
    for k in range(36):
        samples = 0.1 * rng.standard_normal(int(16000 * rng.uniform(2.0, 3.4)))
        soundfile.write(folder / f"{k}.flac", samples, 16000)
        utterances.append(Utterance(id=f"u{k}", text="a", audio=f"{k}.flac", session=f"s{k // 3}"))
    write_manifest(folder / "corpus.jsonl", utterances)
    model = saved("whisper", folder / "model")
    teacher = speech(folder / "corpus.jsonl", model)
    summary = extract(folder / "calm", teacher.corpus, teacher, REQUEST)
    assert summary.units == summary.units_done_now == 3
    return folder / "corpus.jsonl", model, folder / "calm"


def speech(manifest: Path, model: Path) -> SpeechTeacher:
    return SpeechTeacher(load_encoder(str(model)), read_manifest(manifest))


def commits(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "commits").rglob("*.json"))


def test_killed_at_crash_points(calm: tuple[Path, Path, Path], tmp_path: Path) -> None:
    corpus, model, whole = calm
    phases = ["mid_write:9", "before_link:2", "after_link:1"]
    command = [sys.executable, DRIVER, corpus, tmp_path / "s", model, "alone", *phases]
    done = subprocess.run([str(c) for c in command], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["killed"] for entry in log] == [9] * len(phases) + [0]
    rows = [entry["rows"] for entry in log]
    assert rows == sorted(rows) and rows[-1] == 2 * Store.open(whole).teacher("t").tokens
    assert tree(tmp_path / "s") == tree(whole) and commits(tmp_path / "s") == commits(whole)
    assert verify(Store.open(tmp_path / "s")) == []


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(calm: tuple[Path, Path, Path], tmp_path: Path) -> None:
    corpus, model, whole = calm
    teacher = speech(corpus, model)
    load = {"source": str(model), "device": "cpu", "corpus": corpus}
    start = start_workers("t", load, 2, (0, 1))
    summary = extract(tmp_path / "two", teacher.corpus, teacher, REQUEST, start_workers=start)
    assert tree(tmp_path / "two") == tree(whole) and summary.units_done_now == summary.units
    assert summary.rows_done_now == summary.tokens and summary.audio_s == pytest.approx(summary.tokens / 50)


def test_parts_of_a_job_array_and_a_node_without_the_corpus(calm: tuple[Path, Path, Path], tmp_path: Path) -> None:
    corpus, model, whole = calm
    teacher = speech(corpus, model)
    for part in (0, 1):
        extract(tmp_path / "s", teacher.corpus, teacher, REQUEST, part=(part, 2))
    assert tree(tmp_path / "s") == tree(whole)
    plan = make_plan(tmp_path / "other", teacher.corpus, teacher, REQUEST)
    load = {"source": str(model), "device": "cpu", "corpus": tmp_path / "gone.jsonl"}
    error = run_task(plan.created, str(tmp_path / "other"), "t", load, (0, 1), 1)
    assert "gone.jsonl: there is no such manifest" in str(error) and "every node needs the corpus" in str(error)


def test_into_a_bucket(calm: tuple[Path, Path, Path], proxy: s3.Proxy, server: int) -> None:
    corpus, model, whole = calm
    teacher = speech(corpus, model)
    url = "s3://bucket/speech"
    load = {"source": str(model), "device": "cpu", "corpus": corpus}
    extract(url, teacher.corpus, teacher, REQUEST, part=(0, 2))  # type: ignore[arg-type]
    start = start_workers("t", load, 1, (0, 1))
    extract(url, teacher.corpus, teacher, REQUEST, start_workers=start)  # type: ignore[arg-type]
    want = tree(whole)
    assert {k.removeprefix("speech/data.zarr/") for k in s3.keys(server, "speech/data.zarr/")} == set(want)
    assert all(s3.get(server, f"speech/data.zarr/{name}") == data for name, data in want.items())
    there, here, views = Store.open(url), Store.open(whole), [View("t", "alone", 0), View("t", "alone", 2)]
    a, b = there.gather(here.utterance_ids, views), here.gather(here.utterance_ids, views)
    assert all(np.array_equal(a.states[v], b.states[v]) for v in views) and a.token_id == {}
    assert extract(url, teacher.corpus, teacher, REQUEST).units_done_now == 0  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_three_writers_killed_again_and_again(calm: tuple[Path, Path, Path], tmp_path: Path, dtype: str) -> None:
    corpus, model, _ = calm
    teacher = speech(corpus, model)
    extract(tmp_path / "calm", teacher.corpus, teacher, Request("t", [0, 2], ["alone"], dtype=dtype))
    command = [sys.executable, TORTURE, corpus, tmp_path / "s", model, "alone", 12, 5]
    environment = ENV | {"STILLHOUSE_TEST_DTYPE": dtype}
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    log = json.loads(done.stdout)
    assert log["failed"] == 0 and log["history"] == sorted(log["history"])
    assert tree(tmp_path / "s") == tree(tmp_path / "calm") and commits(tmp_path / "s") == commits(tmp_path / "calm")


@pytest.mark.slow
def test_a_ray_cluster_and_two_workers_make_the_same_bytes(calm: tuple[Path, Path, Path], tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("no Ray; pip install 'stillhouse[cluster]'")
    corpus, model, whole = calm
    settings = ["--teacher", str(model), "--name", "t", "--layers", "0,2", "--device", "cpu", "--workers", "2"]
    shell(corpus, tmp_path / "local", *settings)
    ray = shell(corpus, tmp_path / "ray", *settings, "--engine", "ray")
    assert tree(tmp_path / "ray") == tree(tmp_path / "local") == tree(whole)
    assert ray["units_done_now"] == ray["units"] and ray["axis"] == "frame"

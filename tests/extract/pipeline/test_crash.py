"""SIGKILL at named crash points: nothing is lost, written twice or half written, and no uncommitted row is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.data.manifest import write_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus, sentences

CONTEXTS = ["alone", "both:4"]
DRIVER = Path(__file__).with_name("crash_child.py")
LIB = str(Path(__file__).parents[2] / "lib")
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join(filter(None, [LIB, os.environ.get("PYTHONPATH")])),
}


def tree(root: Path) -> dict[str, bytes]:
    """Return all bytes of the Zarr hierarchy but for drafts. They must not depend on how often writers are killed."""
    data = root / "data.zarr"
    files = (p for p in sorted(data.rglob("*")) if p.is_file() and not p.match(".*.tmp"))
    return {str(p.relative_to(data)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> tuple[Path, Path, Path]:
    """A corpus of several shards, the teacher, and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("crash")
    texts = [t for t in sentences() if t.isascii()] * 4
    corpus = make_corpus(texts, per_session=5, path=str(folder / "corpus.jsonl"))
    write_manifest(corpus.path, corpus.utterances)
    extract(folder / "calm", corpus, loaded(bert), Request("t", [0, 2], CONTEXTS))
    return corpus.path, bert, folder / "calm"


def attempts(setting: tuple[Path, Path, Path], root: Path, phases: list[str]) -> list[dict]:
    corpus, teacher, _ = setting
    command = [sys.executable, str(DRIVER), str(corpus), str(root), str(teacher), ",".join(CONTEXTS), *phases]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_every_crash_point(setting: tuple[Path, Path, Path], tmp_path: Path) -> None:
    phases = [
        "planned:1", "allocated:1", "mid_write:3", "before_rename:1", "mid_rename:1", "renamed:1", "before_link:1",
        "after_link:1", "mid_write:300", "renamed:2", "mid_rename:4", "before_link:3", "after_link:2",
    ]  # fmt: skip
    log = attempts(setting, tmp_path / "s", phases)
    assert [entry["killed"] for entry in log] == [signal.SIGKILL] * len(phases) + [0]
    assert log[-1]["exit"] == 0
    rows = [entry["rows"] for entry in log]
    assert rows == sorted(rows) and rows[0] == 0 and rows[-1] > 0  # what was committed stays
    by_phase = {entry["phase"]: entry for entry in log}
    assert not by_phase["planned:1"]["planned"]  # the plan exists when store.json does
    # Before the link a work item does not count, although its files have their names. After it, the item is committed.
    assert by_phase["renamed:1"]["rows"] == by_phase["before_link:1"]["rows"] == 0
    assert by_phase["after_link:1"]["rows"] > 0
    calm = setting[2]
    assert log[-1]["rows"] == sum(
        len(Store.open(calm).gather(Store.open(calm).utterance_ids, [v]).states[v]) for v in Store.open(calm).views
    )
    assert tree(tmp_path / "s") == tree(calm)
    assert sorted(p.name for p in (tmp_path / "s" / "commits").rglob("*.json")) == sorted(
        p.name for p in (calm / "commits").rglob("*.json")
    )
    assert not list((tmp_path / "s" / "tmp").iterdir())
    assert verify(Store.open(tmp_path / "s")) == []


def test_left_files_are_reported_and_deleted(setting: tuple[Path, Path, Path], tmp_path: Path) -> None:
    corpus, teacher, _ = setting
    script = DRIVER.read_text().replace('[*phases, ""]', "phases")
    (tmp_path / "driver.py").write_text(script)
    command = [sys.executable, str(tmp_path / "driver.py"), str(corpus), str(tmp_path / "s"), str(teacher), "alone"]
    subprocess.run([*command, "mid_write:9"], env=ENV, check=True, capture_output=True, timeout=120)
    found = verify(Store.open(tmp_path / "s"))
    assert [f.what for f in found] == ["left by a writer that died"]
    from stillhouse.data.manifest import read_manifest

    extract(tmp_path / "s", read_manifest(corpus), loaded(teacher), Request("t", [0, 2], ["alone"]))
    assert verify(Store.open(tmp_path / "s")) == []

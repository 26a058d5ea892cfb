"""SIGKILL while a store changes: the old or the new state can be read, and the same command resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.data.manifest import Corpus, write_manifest
from stillhouse.extract.maintain.combine import merge
from stillhouse.extract.maintain.garbage import unreferenced_files
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus, sentences
from ..pipeline.test_crash import ENV
from ..pipeline.test_refresh import edited
from .kill_child import CONTEXTS, LAYERS, seen

DRIVER = Path(__file__).with_name("kill_child.py")
REQUEST = Request("t", LAYERS, CONTEXTS)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> tuple[Path, Corpus, Path]:
    """(a store, the changed corpus, the teacher)."""
    folder = tmp_path_factory.mktemp("life")
    corpus = make_corpus([t for t in sentences() if t.isascii()] * 3, per_session=5, path=str(folder / "corpus.jsonl"))
    extract(folder / "s", corpus, loaded(bert), REQUEST)
    now = edited(corpus, u3="something else entirely", u50=None, u51="more", u99="the end of it")
    write_manifest(now.path, now.utterances)
    return folder / "s", now, bert


def attempts(action: str, root: Path, setting: tuple[Path, Corpus, Path], phases: list[str]) -> list[dict]:
    _, now, teacher = setting
    words = [action, str(root), str(teacher), str(now.path), str(root.with_name("out")), *phases]
    done = subprocess.run([sys.executable, str(DRIVER), *words], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["killed"] for e in log] == [signal.SIGKILL] * len(phases) + [0], done.stderr
    assert log[-1]["exit"] == 0, done.stderr
    return log


def test_refresh(setting: tuple[Path, Corpus, Path], tmp_path: Path) -> None:
    """Before store.json is replaced the old state is read. After that the new one is, as far as it is extracted."""
    shutil.copytree(setting[0], tmp_path / "s")
    before = seen(tmp_path / "s")
    extract(tmp_path / "calm", setting[1], loaded(setting[2]), REQUEST)
    fresh = Store.open(tmp_path / "calm")
    phases = ["grown:1", "planned:1", "mid_write:3", "before_link:1", "after_link:1"]
    log = attempts("refresh", tmp_path / "s", setting, phases)
    assert log[0]["seen"] == log[1]["seen"] == before
    after = log[-1]["seen"]
    for entry in log[2:]:
        for view, held in entry["seen"].items():
            assert held.items() <= after[view].items()  # a part of the new state, and nothing of the old one
    lengths = [sum(map(len, e["seen"].values())) for e in log[2:]]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == 4 * len(setting[1].utterances)
    store = Store.open(tmp_path / "s")
    assert verify(store) == [] and status(tmp_path / "s").complete
    for view in store.views:
        ids = store.utterance_ids
        assert (store.input_hash(ids, view) == fresh.input_hash(ids, view)).all()


def test_collecting_garbage(setting: tuple[Path, Corpus, Path], tmp_path: Path) -> None:
    shutil.copytree(setting[0], tmp_path / "s")
    extract(tmp_path / "s", setting[1], loaded(setting[2]), REQUEST, refresh=True)
    served = seen(tmp_path / "s")
    phases = ["before_link:1", "item_copied:1", "written:1", "switched:1", "deleted:4"]
    log = attempts("gc", tmp_path / "s", setting, phases)
    assert all(e["seen"] == served for e in log)
    store = Store.open(tmp_path / "s")
    assert verify(store) == [] and unreferenced_files(store.plan) == [] and collect_garbage(tmp_path / "s").files == 0
    assert extract(tmp_path / "s", setting[1], loaded(setting[2]), REQUEST).units_done_now == 0


@pytest.mark.slow
def test_removing(setting: tuple[Path, Corpus, Path], tmp_path: Path) -> None:
    shutil.copytree(setting[0], tmp_path / "s")
    before = seen(tmp_path / "s")
    left = {k: v for k, v in before.items() if k != "t/both:4/2"}
    log = attempts("remove", tmp_path / "s", setting, ["written:1"])
    assert log[0]["seen"] == before and log[1]["seen"] == left
    for phase in ("switched:1", "deleted:1"):
        shutil.rmtree(tmp_path / "s")
        shutil.copytree(setting[0], tmp_path / "s")
        words = ["remove", str(tmp_path / "s"), str(setting[2]), str(setting[1].path), "-", phase]
        done = subprocess.run(
            [sys.executable, str(DRIVER), *words], env=ENV, capture_output=True, text=True, timeout=240
        )
        assert [json.loads(line)["seen"] for line in done.stdout.splitlines()] == [left, left]  # the next finds no view
        assert "no view matches" in done.stderr
        collect_garbage(tmp_path / "s")
        store = Store.open(tmp_path / "s")
        assert verify(store) == [] and unreferenced_files(store.plan) == [] and seen(tmp_path / "s") == left
    extract(tmp_path / "s", make_corpus_of(setting), loaded(setting[2]), REQUEST)
    assert seen(tmp_path / "s") == before


def make_corpus_of(setting: tuple[Path, Corpus, Path]) -> Corpus:
    return make_corpus([t for t in sentences() if t.isascii()] * 3, per_session=5, path=str(setting[1].path))


def test_merging(setting: tuple[Path, Corpus, Path], tmp_path: Path) -> None:
    whole = make_corpus_of(setting)
    cut = (len(whole.utterances) // 10) * 5
    extract(tmp_path / "s", Corpus(whole.path, whole.utterances[:cut]), loaded(setting[2]), REQUEST)
    extract(tmp_path / "other", Corpus(whole.path, whole.utterances[cut:]), loaded(setting[2]), REQUEST)
    log = attempts("merge", tmp_path / "s", setting, ["after_link:1", "item_copied:2", "built:1"])
    assert [e["seen"] for e in log[:-1]] == [{}] * 3  # complete or missing
    both = seen(tmp_path / "s")
    for view, held in seen(tmp_path / "other").items():
        both[view] |= held
    assert log[-1]["seen"] == both and verify(Store.open(tmp_path / "out")) == []
    assert not list(tmp_path.glob(".out.*"))
    merge(tmp_path / "s", tmp_path / "other", tmp_path / "again")

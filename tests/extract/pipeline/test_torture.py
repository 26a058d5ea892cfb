"""Three writers on one store, which are killed thirty times and more."""

from __future__ import annotations

import json
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
from .test_crash import CONTEXTS, ENV, tree

DRIVER = Path(__file__).with_name("torture_child.py")


def torture(tmp_path: Path, bert: Path, times: int, kills: int, seed: int, dtype: str = "float16") -> dict:
    texts = [t for t in sentences() if t.isascii()] * times
    corpus = make_corpus(texts, per_session=5, path=str(tmp_path / "corpus.jsonl"))
    write_manifest(corpus.path, corpus.utterances)
    extract(tmp_path / "calm", corpus, loaded(bert), Request("t", [0, 2], CONTEXTS, dtype=dtype))
    arguments = [corpus.path, tmp_path / "s", bert, ",".join(CONTEXTS), kills, seed]
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    done = subprocess.run(
        command, env=ENV | {"STILLHOUSE_TEST_DTYPE": dtype}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    log = json.loads(done.stdout)
    assert log["failed"] == 0, done.stderr
    assert log["history"] == sorted(log["history"])  # what can be read once can be read later
    store = Store.open(tmp_path / "s", checksums=True)
    assert tree(tmp_path / "s") == tree(tmp_path / "calm")  # no half-written file, and the bytes of one writer
    records = [p.name for p in (tmp_path / "s" / "commits").rglob("*.json")]
    assert sorted(records) == sorted(p.name for p in (tmp_path / "calm" / "commits").rglob("*.json"))  # none twice
    assert log["history"][-1] <= log["rows"] and log["views"] == len(store.views) == 4  # none lost
    assert verify(store) == [] and not list((tmp_path / "s" / "tmp").iterdir())
    return log


def test_three_writers_killed_three_times(bert: Path, tmp_path: Path) -> None:
    log = torture(tmp_path, bert, times=4, kills=3, seed=0)
    assert sum(log["died"].values()) >= 3


@pytest.mark.slow
def test_three_writers_of_int8_agree_on_the_norms(bert: Path, tmp_path: Path) -> None:
    log = torture(tmp_path, bert, times=12, kills=12, seed=3, dtype="int8")
    assert sum(log["died"].values()) >= 12, log


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_three_writers_killed_thirty_times(bert: Path, tmp_path: Path, seed: int) -> None:
    log = torture(tmp_path, bert, times=24, kills=30, seed=seed)
    assert log["units"] >= 25 * 2 and sum(log["died"].values()) >= 30 and len(log["died"]) >= 5, log

"""`extract --status` while writers run and are killed: no error, no more than is committed, no less than before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import s3

from stillhouse.data.errors import StoreError
from stillhouse.data.manifest import write_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus, sentences
from .test_crash import ENV

DRIVER = Path(__file__).with_name("status_child.py")


def check(told: list[dict]) -> None:
    """Check the statuses of a store, in the order in which they were asked for."""
    before: dict[str, tuple[int, int]] = {}
    for entry in told:
        for c in entry["contexts"]:
            assert c["done"] + c["running"] + c["missing"] == c["units"] and min(c["running"], c["missing"]) >= 0
            assert 0 <= c["tokens_done"] <= c["tokens"] and (c["tokens_done"] == c["tokens"]) == (
                c["done"] == c["units"]
            )
            now = c["done"], c["tokens_done"]
            assert now >= before.get(c["context"], (0, 0))
            before[c["context"]] = now
        assert entry["complete"] == all(c["complete"] for c in entry["contexts"])


def test_while_writers_run_and_are_killed(bert: Path, tmp_path: Path) -> None:
    """The work item of a stopped writer is running. After a kill it is not, and another writer extracts it."""
    corpus = make_corpus([t for t in sentences() if t.isascii()] * 4, 5, str(tmp_path / "corpus.jsonl"))
    write_manifest(corpus.path, corpus.utterances)
    command = [sys.executable, str(DRIVER), corpus.path, tmp_path / "s", bert, "alone,past:4", "3", "4"]
    done = subprocess.run([str(c) for c in command], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    check(told)
    items = sum(c["units"] for c in told[0]["contexts"])
    happened = [entry["what"] for entry in told]
    assert items >= 4 and sorted(w for w in happened if w != "stopped") == ["ended 0", "ended 0", "killed"], done.stderr
    assert happened.count("stopped") >= items + 1  # the work item of the killed writer was begun twice
    for entry in told:
        if entry["what"] == "stopped":
            assert not entry["complete"] and sum(c["running"] for c in entry["contexts"]) >= 1
    last = told[-1]
    assert last["complete"] and sum(c["running"] + c["missing"] for c in last["contexts"]) == 0
    assert status(tmp_path / "s").as_json()["contexts"] == last["contexts"]
    assert {f.what for f in verify(Store.open(tmp_path / "s"))} <= {"left by a writer that died"}


def test_in_an_object_store(proxy: s3.Proxy, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status after every refused commit record. There are no locks, so nothing is running."""
    monkeypatch.setattr(layout, "MIN_SHARD_ROWS", 128)
    monkeypatch.setenv("STILLHOUSE_REMOTE_ATTEMPTS", "1")
    corpus, request = make_corpus(), Request("t", [0], ["alone"])
    told = []
    for most in (0, 1, 1):
        puts: list[str] = []

        def refuse(method: str, path: str, most: int = most, puts: list[str] = puts) -> str | None:
            if method != "PUT" or "/commits/" not in path or not path.endswith(".json"):
                return None
            puts.append(path)
            return "403" if len(puts) > most else None

        proxy.fault = refuse
        with pytest.raises(StoreError, match="refuses"):
            extract("s3://bucket/asked", corpus, loaded(bert), request)  # type: ignore[arg-type]
        told.append(status("s3://bucket/asked").as_json())  # type: ignore[arg-type]
    proxy.reset()
    extract("s3://bucket/asked", corpus, loaded(bert), request)  # type: ignore[arg-type]
    told.append(status("s3://bucket/asked").as_json())  # type: ignore[arg-type]
    check(told)
    assert [t["contexts"][0]["done"] for t in told][:3] == [0, 1, 2] and told[-1]["complete"]
    assert all(c["running"] == 0 for t in told for c in t["contexts"]) and told[0]["store"] == "s3://bucket/asked"

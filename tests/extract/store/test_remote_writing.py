"""Stores written into an object store: the same bytes by however many writers, whatever fails and whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import s3

from stillhouse.data.errors import StoreError
from stillhouse.data.manifest import write_manifest
from stillhouse.extract.maintain.repair import repair
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.pipeline.workers import start_workers
from stillhouse.extract.store import Store
from stillhouse.extract.store.remote.cache import cache_folder
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus
from ..pipeline.test_crash import DRIVER, ENV, tree
from ..pipeline.test_extract import long_corpus
from .test_remote import REQUEST, once, same


def test_extraction_into_a_bucket(proxy: s3.Proxy, server: int, bert: Path, small_store: Path) -> None:
    summary = extract("s3://bucket/made", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    assert summary.store == "s3://bucket/made" and len(summary.views) == 6 and summary.hidden_bytes > 0
    same("s3://bucket/made", small_store)
    want = tree(small_store)
    names = {k.removeprefix("made/data.zarr/") for k in s3.keys(server, "made/data.zarr/")}
    assert names == set(want)
    for name in names:  # the objects are the files, so that any Zarr library reads them
        assert s3.get(server, f"made/data.zarr/{name}") == want[name], name
    again = extract("s3://bucket/made", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    assert (again.units_done_now, again.units) == (0, summary.units)
    assert not list((cache_folder() / "writers").iterdir())


def test_failing_writes_are_tried_again(proxy: s3.Proxy, server: int, bert: Path, small_store: Path) -> None:
    """Where an answer is lost the object may be there already: it is compared, and found to be ours."""
    lost, broken = once("lost", "PUT"), once("500", "GET", "HEAD")
    proxy.fault = lambda method, path: lost(method, path) or broken(method, path)
    extract("s3://bucket/hard", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    assert proxy.harmed["lost"] >= 40 and proxy.harmed["500"] >= 10
    proxy.fault = lambda method, path: None
    same("s3://bucket/hard", small_store)


def test_two_writers_at_once(proxy: s3.Proxy, server: int, bert: Path, tmp_path: Path) -> None:
    """One plan, whoever makes it; every unit once in the bucket; both see all of it at the end."""
    corpus, request = long_corpus(), Request("t", [0, 2], ["alone", "both:4"])
    summaries: list = []

    def write() -> None:
        try:
            summaries.append(extract("s3://bucket/two", corpus, loaded(bert).clone_model(), request))  # type: ignore[arg-type]
        except BaseException as e:
            summaries.append(e)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for s in summaries:
        if isinstance(s, BaseException):
            raise s
    assert [len(s.views) for s in summaries] == [4, 4]
    extract(tmp_path / "one", corpus, loaded(bert), request)
    want = tree(tmp_path / "one")
    assert {k.removeprefix("two/data.zarr/") for k in s3.keys(server, "two/data.zarr/")} == set(want)
    for name in want:
        assert s3.get(server, f"two/data.zarr/{name}") == want[name], name
    records = Counter(k.rsplit("/", 2)[-2:][0] for k in s3.keys(server, "two/commits/") if k.endswith(".json"))
    assert set(records.values()) == {summaries[0].units // 2 + 1}


@pytest.mark.slow
def test_workers_of_one_command_have_each_its_share(proxy: s3.Proxy, server: int, bert: Path) -> None:
    load, request = {"source": str(bert), "device": "cpu"}, Request("t", [0, 2], ["alone", "both:4"])
    start = start_workers("t", load, 2, (0, 1))
    done = extract("s3://bucket/crew", long_corpus(), loaded(bert), request, part=(0, 2), start_workers=start)  # type: ignore[arg-type]
    records = [json.loads(s3.get(server, k)) for k in s3.keys(server, "crew/commits/") if k.endswith(".json")]
    by_writer = Counter(r["writer"]["pid"] for r in records if r["shard"] != "norms")
    assert len(by_writer) == 2 and max(by_writer.values()) - min(by_writer.values()) <= 1
    assert len(done.views) == 4 and proxy.counts["PUT"] < 12 * len(records)  # nobody did what another did
    assert verify(Store.open("s3://bucket/crew")) == []


def test_other_bytes_are_refused(proxy: s3.Proxy, server: int, bert: Path) -> None:
    s3.put(server, "other/data.zarr/bert/hidden/c/0/0/0/0", b"of another machine")
    with pytest.raises(
        StoreError, match=r"s3://bucket/other/.*: another writer has put other bytes.*delete this object"
    ):
        extract("s3://bucket/other", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    assert not [k for k in s3.keys(server, "other/commits/") if k.endswith("alone/0.0.json")]


@pytest.mark.slow
def test_more_layers(proxy: s3.Proxy, server: int, bert: Path, small_store: Path) -> None:
    first = Request("bert", [0, 1], ["alone"])
    extract("s3://bucket/grow", make_corpus(), loaded(bert), first)  # type: ignore[arg-type]
    assert len(Store.open("s3://bucket/grow").views) == 2
    extract("s3://bucket/grow", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    same("s3://bucket/grow", small_store)
    assert verify(Store.open("s3://bucket/grow")) == []
    key = "grow/data.zarr/bert/hidden/c/1/2/0/0"
    whole = s3.get(server, key)
    s3.put(server, key, whole[:70] + bytes([whole[70] ^ 1]) + whole[71:])
    assert len(verify(Store.open("s3://bucket/grow"))) == 1
    assert len(repair(Path("s3://bucket/grow"), loaded(bert), "bert")) == 1
    assert s3.get(server, key) == whole and verify(Store.open("s3://bucket/grow")) == []


@pytest.mark.slow
def test_killed_writers_lose_nothing(proxy: s3.Proxy, bert: Path, tmp_path: Path) -> None:
    corpus = long_corpus()
    write_manifest(tmp_path / "corpus.jsonl", corpus.utterances)
    phases = ["planned:1", "mid_write:3", "renamed:1", "before_link:1", "after_link:1", "mid_write:300", "after_link:2"]
    arguments = [str(tmp_path / "corpus.jsonl"), "s3://bucket/killed", str(bert), "alone,both:4", *phases]
    done = subprocess.run(
        [sys.executable, str(DRIVER), *arguments],
        env=ENV | {k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["killed"] for entry in log] == [signal.SIGKILL] * len(phases) + [0] and log[-1]["exit"] == 0
    rows = [entry["rows"] for entry in log]
    assert rows == sorted(rows) and rows[-1] > 0
    extract(tmp_path / "calm", corpus, loaded(bert), Request("t", [0, 2], ["alone", "both:4"]))
    there, here = Store.open("s3://bucket/killed", checksums=True), Store.open(tmp_path / "calm")
    for view in here.views:
        a, b = (s.gather(here.utterance_ids, [view]).states[view] for s in (there, here))
        assert np.array_equal(a, b)
    assert verify(there) == []

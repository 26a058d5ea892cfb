"""What commands ask of an object store and of a disk: it grows with bytes and shards, and not with utterances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.manifest import write_manifest
from stillhouse.data.units import train_units
from stillhouse.extract.maintain.combine import copy, merge, subset
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.format.arrays import RawArray
from stillhouse.extract.store.remote import client as objects_module

from ..conftest import loaded, make_corpus

REQUEST = Request("bert", [0, 2], ["alone", "both:4"])
# The most requests of each command, for one shard of two layers in two contexts.
MOST = {
    "inspect info": 32,
    "inspect ls": 30,
    "inspect ls --utterances": 30,
    "inspect show": 60,
    "inspect stats --full": 60,
    "inspect verify --data": 80,
    "inspect similarity": 60,
    "inspect tree": 30,
    "inspect export": 50,
    "extract --status": 30,
    "extract --dry-run": 40,
    "extract of nothing": 70,
    "views": 60,
    "store cp": 75,
    "store subset": 75,
    "store merge": 150,
    "store gc": 0,
    "store rm": 0,
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> dict[int, Path]:
    """Stores of 40 and of 160 utterances, each in one shard."""
    made = {}
    for count in (40, 160):
        made[count] = tmp_path_factory.mktemp("requests") / str(count)
        made[count].mkdir()
        (made[count] / "bert").symlink_to(bert)
        texts = [
            "she would not",
            "a knight rode",
            "it's done",
            "we",
            "their boat",
            "the old tea",
            "by the weir",
            "a seal",
        ]
        corpus = make_corpus(texts * (count // 8))
        write_manifest(made[count] / "corpus.jsonl", corpus.utterances)
        train_units([u.text for u in corpus.utterances], "characters").save(made[count] / "units")
        ids = [u.id for u in corpus.utterances]
        for name, part in (("ids", ids), ("first", ids[: count // 2]), ("second", ids[count // 2 :])):
            (made[count] / name).write_text("\n".join(part))
        extract(made[count] / "s", corpus, loaded(bert), REQUEST)
    return made


def commands(folder: Path, url: str, halves: list[str], new: Callable[[], Path]) -> dict[str, list[str]]:
    """The arguments of each command."""
    corpus = str(folder / "corpus.jsonl")
    run = ["extract", corpus, url, "--teacher", str(folder / "bert"), "--layers", "0,2", "--context", "alone"]
    run += ["--context", "both:4", "--device", "cpu"]
    return {
        "inspect info": ["inspect", "info", url],
        "inspect ls": ["inspect", "ls", url],
        "inspect ls --utterances": ["inspect", "ls", url, "--utterances"],
        "inspect show": ["inspect", "show", url, "u1"],
        "inspect stats --full": ["inspect", "stats", url, "--full"],
        "inspect verify --data": ["inspect", "verify", url, "--data"],
        "inspect similarity": ["inspect", "similarity", url],
        "inspect tree": ["inspect", "tree", url],
        "inspect export": ["inspect", "export", url, f"{new()}.npz"],
        "extract --status": ["extract", corpus, url, "--status"],
        "extract --dry-run": [*run, "--dry-run"],
        "extract of nothing": run,
        "views": ["views", url, "--corpus", corpus, "--units", str(folder / "units")],
        "store cp": ["store", "cp", url, str(new())],
        "store subset": ["store", "subset", url, str(new()), "--utterances", str(folder / "first")],
        "store merge": ["store", "merge", *halves, str(new())],
        "store gc": ["store", "gc", url],
        "store rm": ["store", "rm", url, "*/*/0"],
    }


def test_requests_do_not_grow_with_utterances(
    proxy: s3.Proxy, server: int, stores: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[int, dict[str, int]] = {}
    places = iter(tmp_path / f"new{n}" for n in range(1000))
    for count, folder in stores.items():
        url = s3.upload(server, folder / "s", f"requests/{count}")
        halves = []
        for name in ("first", "second"):
            subset(folder / "s", half := next(places), (folder / name).read_text().split())
            halves.append(s3.upload(server, half, f"requests/{count}{name}"))
        counted[count] = {}
        for name, arguments in commands(folder, url, halves, lambda: next(places)).items():
            objects_module.close_all()
            monkeypatch.setenv("STILLHOUSE_CACHE", str(next(places)))
            proxy.reset()
            done = CliRunner().invoke(cli, arguments)
            assert done.exit_code == 0 or name in ("store gc", "store rm"), done.output
            counted[count][name] = proxy.counts.total()
    few, many = counted.values()
    assert few == many
    assert {name: n for name, n in many.items() if n > MOST[name]} == {}


def test_look_ups_of_copies_do_not_grow_with_utterances(
    stores: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each array is read as often for 160 utterances as for 40."""
    reads = 0
    read = RawArray.read

    def counting(self: RawArray, *lead: int, **options: Any) -> object:
        nonlocal reads
        reads += 1
        return read(self, *lead, **options)

    monkeypatch.setattr(RawArray, "read", counting)
    counted: dict[int, list[int]] = {}
    for count, folder in stores.items():
        out, counted[count] = tmp_path / str(count), []
        ids = Store.open(folder / "s").utterance_ids
        first, second = ((folder / name).read_text().split() for name in ("first", "second"))
        steps: list[tuple[Callable, tuple]] = [
            (copy, (folder / "s", out / "copy")),
            (subset, (folder / "s", out / "a", first)),
            (subset, (folder / "s", out / "b", second)),
            (merge, (out / "a", out / "b", out / "ab")),
        ]
        for step, arguments in steps:
            reads = 0
            step(*arguments)
            counted[count].append(reads)
        assert sorted(Store.open(out / "ab").utterance_ids) == sorted(ids)
    assert counted[40] == counted[160] and max(counted[160]) < 300

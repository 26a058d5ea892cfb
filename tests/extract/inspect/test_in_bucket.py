"""Every command of `stillhouse inspect` prints the same for a store in a bucket and in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3

from stillhouse.extract.store import Store
from stillhouse.extract.store.remote import client as objects_module

VIEWS = "known/alone/4,known/both:8/4"
FACTS = {
    "info": [],
    "ls": [],
    "ls --utterances": [],
    "show": ["s00-0000", "--view", "known/both:8/2", "--values"],
    "stats": [],
    "similarity": [],
    "neighbours": ["s00-0000:BANK", "--view", "known/both:8/4"],
    "compare": ["s00-0000", "--views", VIEWS],
    "verify": [],
    "verify --data": [],
}
FILES = {"export": "out.npz", "plot": "out.svg", "report": "out.html"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Start a server and put its address into the environment."""
    with s3.moto() as port, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.settings(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, value)
        yield port
        objects_module.close_all()


@pytest.fixture(scope="module")
def url(bucket: int, store: Store) -> str:
    return s3.upload(bucket, Path(store.path), "whole/store.zarr")


def facts(found: SimpleNamespace, place: str) -> Any:
    """Return the JSON of a command without the path of the store."""
    assert found.code == 0, found.err
    return json.loads(found.out.replace(json.dumps(place)[1:-1], "STORE"))


@pytest.mark.parametrize("command", FACTS)
def test_facts(command: str, stillhouse: Callable[..., SimpleNamespace], store: Store, url: str) -> None:
    name, *options = command.split()
    here, there = (
        facts(stillhouse("inspect", name, place, *FACTS[command], *options, "--json"), place)
        for place in (str(store.path), url)
    )
    assert here and here == there


@pytest.mark.parametrize("command", FILES)
def test_files(command: str, stillhouse: Callable[..., SimpleNamespace], tmp_path: Path, url: str) -> None:
    out = tmp_path / FILES[command]
    found = stillhouse("inspect", command, url, out)
    assert found.code == 0, found.err
    assert out.stat().st_size > 1000


def test_tree(stillhouse: Callable[..., SimpleNamespace], store: Store, url: str) -> None:
    """Of the arrays: a folder also has locks, and the parts of which a writer put small arrays together."""
    here, there = (facts(stillhouse("inspect", "tree", place, "--json"), place) for place in (str(store.path), url))
    arrays = [[(n["path"], n["shape"]) for n in found["nodes"] if n["kind"] == "array"] for found in (here, there)]
    assert arrays[0] and arrays[0] == arrays[1]


def test_diff(stillhouse: Callable[..., SimpleNamespace], store: Store, url: str) -> None:
    found = stillhouse("inspect", "diff", store.path, url)
    assert found.code == 0, found.out + found.err


def test_a_partial_store(stillhouse: Callable[..., SimpleNamespace], bucket: int, partial: Store) -> None:
    place = s3.upload(bucket, Path(partial.path), "partial/store.zarr")
    for name in ("info", "stats"):
        options = ["--tokens", 500] if name == "stats" else []
        here, there = (facts(stillhouse("inspect", name, p, *options, "--json"), p) for p in (str(partial.path), place))
        assert here == there


def test_a_missing_store(stillhouse: Callable[..., SimpleNamespace], bucket: int) -> None:
    found = stillhouse("inspect", "info", "s3://bucket/nothing")
    assert found.code == 10 and "s3://bucket/nothing" in found.err and not found.out

"""Ids, pieces, names and metadata of a foreign store never reach a terminal as control characters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk.durable import write_json

EVIL = "a\x1b[2J\r\x07\x9b5m\u202eb"
UNSAFE = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u202e"} - {"\n"}


@pytest.fixture
def evil(known: SimpleNamespace, tmp_path: Path) -> Store:
    """As a store of another program may be: a manifest's ids have no control characters."""
    spoken = [f"w1 bank {EVIL} w{i}" for i in range(6)]
    utterances = [
        Utterance.model_construct(id=f"{EVIL}{i}", text=text, session=f"{EVIL}{i // 2}", speaker=EVIL)
        for i, text in enumerate(spoken)
    ]
    path = tmp_path / EVIL / "store.zarr"
    path.parent.mkdir()
    extract(path, Corpus(tmp_path / "c", utterances), known.Teacher(), Request("known", [0, 2], ["alone", "both:8"]))
    head = json.loads((path / "store.json").read_text())
    head.pop("checksum", None)
    head["teachers"]["known"] |= {
        "about": EVIL,
        "model": EVIL,
        "architecture": EVIL,
        "revision": EVIL,
        "transform": EVIL,
    }
    write_json(path / "store.json", head | {"created": EVIL, "versions": {EVIL: EVIL}})
    return Store.open(path)


def test_no_command_prints_them(evil: Store, stillhouse: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    name, path = evil.utterance_ids[0], evil.path
    commands: list[tuple[object, ...]] = [
        ("info", path),
        ("ls", path),
        ("ls", path, "--utterances"),
        ("ls", path, "--utterances", "--jsonl"),
        ("show", path, name),
        ("show", path, EVIL),
        ("verify", path, "--data"),
        ("tree", path),
        ("stats", path),
        ("compare", path, name, "--views", "known/alone/0,known/both:8/0"),
        ("neighbours", path, f"{name}:bank", "--view", "known/alone/2"),
        ("diff", path, path),
        ("export", path, tmp_path / f"{EVIL}.csv"),
        ("report", path, tmp_path / f"{EVIL}.html"),
    ]
    for words in commands:
        for more in [[]] if words[0] in ("report", "export") or "--jsonl" in words else [[], ["--json"]]:
            said = stillhouse("inspect", *words, *more)
            assert not UNSAFE & set(said.out + said.err), words
            code = 10 if EVIL in words else int(words[0] == "verify")  # The group in data.zarr has other settings.
            assert said.code == code, (words, said.err)
    (path / "commits" / "known" / "alone" / f"{0}.{0}.json").write_bytes(b"damaged")
    for words in (("inspect", "verify", path), ("inspect", "info", path), ("store", "rm", path, f"{EVIL}/*/*")):
        said = stillhouse(*words)
        assert said.code and not UNSAFE & set(said.out + said.err) and (said.out + said.err), words
    said = stillhouse("extract", path / "store.json", path, "--status", "--json")
    assert said.code and not UNSAFE & set(said.err)

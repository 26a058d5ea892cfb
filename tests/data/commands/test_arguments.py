"""Arguments in another order than a command takes them are named, in every command with two paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.cli import cli
from stillhouse.data.commands.arguments import hint, kind_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of each kind of thing: only names and places count."""
    for name in ("run/config.toml", "export/model.json", "store/store.json", "c.jsonl", "f.h5", "a.wav", "b.WAV"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / "r.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_kinds(here: Path) -> None:
    kinds = {name: kind_of(here / name) for name in ("run", "export", "store", "c.jsonl", "f.h5", "b.WAV", "r.toml")}
    assert list(kinds.values()) == [
        "a run", "a run", "a store", "a corpus", "a feature file", "audio", "a TOML file"
    ]  # fmt: skip
    assert kind_of(here) is kind_of(here / "none") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("decode c.jsonl run f.h5", "RUN and CORPUS seem swapped: c.jsonl is a corpus"),
        ("decode run f.h5 c.jsonl --beam 4", "CORPUS and FEATURES seem swapped: f.h5 is a feature file"),
        ("align f.h5 c.jsonl run", "RUN and FEATURES seem swapped: f.h5 is a feature file"),
        ("corpus features f.h5 c.jsonl", "MANIFEST and FEATURES_FILE seem swapped"),
        ("extract store c.jsonl --teacher x", "CORPUS and STORE seem swapped: store is a store"),
        ("decode run a.wav b.WAV", "b.WAV is a second audio file"),
        ("decode run a.wav b.WAV a.wav", "b.WAV is a second audio file"),
    ],
)
def test_a_hint(here: Path, words: str, said: str) -> None:
    assert (hint(cli, words.split()) or "").startswith(said)


@pytest.mark.parametrize(
    "words", ["decode run c.jsonl f.h5", "decode run a.wav", "decode none c.jsonl f.h5", "train r.toml", "nothing", ""]
)
def test_no_hint(here: Path, words: str) -> None:
    assert hint(cli, words.split()) is None

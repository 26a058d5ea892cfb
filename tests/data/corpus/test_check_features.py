"""`corpus check --features` names the utterances whose rows come from other audio or times."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.corpus.check import check_corpus
from stillhouse.data.features.compute import compute_features
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(size=32_000) * 0.1, 16_000)
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, [Utterance(id=name, text=name, audio=f"{name}.wav") for name in "abc"])
    compute_features(read_manifest(path), tmp_path / "f.h5", workers=0)
    return path


def test_same_rows_are_no_findings(corpus: Path) -> None:
    os.utime(corpus.parent / "a.wav")
    moved = corpus.parent.rename(corpus.parent.with_name("moved"))
    for full in (False, True):
        assert check_corpus(moved / "corpus.jsonl", full=full, features=moved / "f.h5").findings == []


def test_changed_rows_are_named(corpus: Path) -> None:
    audio = corpus.parent / "b.wav"
    times, data = os.stat(audio), bytearray(audio.read_bytes())
    data[40_000:40_100] = bytes(100)  # beside what is read without --full
    audio.write_bytes(data)
    os.utime(audio, ns=(times.st_atime_ns, times.st_mtime_ns))
    a, b, c = read_manifest(corpus).utterances
    write_manifest(
        corpus, [a.model_copy(update={"start_s": 0.5}), b, c, c.model_copy(update={"id": "d", "start_s": 1.0})]
    )
    features = corpus.parent / "f.h5"
    found = check_corpus(corpus, full=True, features=features).findings
    assert [(f.kind, f.line, f.id) for f in found] == [("features", 1, "a"), ("features", 2, "b"), ("features", 4, "d")]
    assert "start_s was 0 and is 0.5" in found[0].what
    assert "b.wav has another content" in found[1].what
    assert "has no row" in found[2].what
    result = CliRunner().invoke(cli, ["corpus", "check", str(corpus), "--full", "--features", str(features)])
    assert result.exit_code == 1
    assert result.stdout.count("--redo-changed") == 2

"""The rate of features follows the audio, and audio is upsampled only if that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import ConfigError, PartialError
from stillhouse.data.features.compute import FeatureFile, FeatureSettings, compute_features
from stillhouse.data.features.rates import default_rate
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest

Tone = Callable[..., Path]


@pytest.fixture
def at_rates(tmp_path: Path, tone: Tone) -> Callable[..., Corpus]:
    """A corpus of tones, one at each rate."""

    def make(*rates: int) -> Corpus:
        utterances = []
        for k, rate_hz in enumerate(rates):
            tone(tmp_path / f"{k}-{rate_hz}.wav", 1.0, rate_hz=rate_hz)
            utterances.append(Utterance(id=f"u{k}", text="x", audio=f"{k}-{rate_hz}.wav"))
        write_manifest(tmp_path / "corpus.jsonl", utterances)
        return read_manifest(tmp_path / "corpus.jsonl")

    return make


@pytest.mark.parametrize(
    ("rates", "expected"),
    [((8000, 8000), 8000), ((16000,), 16000), ((44100, 16000, 48000), 16000), ((11025,), 11000), ((12000,), 12000)],
)
def test_the_rate_of_the_audio_up_to_16_khz(at_rates: Callable, tmp_path: Path, rates: tuple, expected: int) -> None:
    corpus = at_rates(*rates)
    assert default_rate(corpus, tmp_path / "f.h5") == expected
    report = compute_features(corpus, tmp_path / "f.h5", workers=0)
    assert (report.rate_hz, report.upsampled) == (expected, 0)
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.settings["rate_hz"] == expected
        assert set(file.lengths.tolist()) == {100}  # A frame stays 10 ms.


def test_mixed_rates_need_a_word(at_rates: Callable, tmp_path: Path) -> None:
    corpus = at_rates(16000, 8000, 44100)
    counts = "8000 Hz in 1 files, 16000 Hz in 1 files, 44100 Hz in 1 files"
    with pytest.raises(ConfigError, match=rf"the audio has {counts} \(expected one rate\); give --rate 8000"):
        compute_features(corpus, tmp_path / "f.h5", workers=0)
    assert not (tmp_path / "f.h5").exists()
    low = compute_features(corpus, tmp_path / "f.h5", settings=FeatureSettings(rate_hz=8000), workers=0)
    assert (low.rows_computed, low.upsampled) == (3, 0)
    high = compute_features(corpus, tmp_path / "g.h5", settings=FeatureSettings(), workers=0)
    assert (high.rows_computed, high.upsampled) == (3, 1)


def test_an_existing_file_keeps_its_rate(at_rates: Callable, tmp_path: Path) -> None:
    wide = at_rates(16000)
    compute_features(wide, tmp_path / "f.h5", workers=0)
    both = at_rates(16000, 8000)
    with pytest.raises(PartialError, match=r"u1: .*the audio has 8000 Hz \(expected 16000 Hz or more\)"):
        compute_features(both, tmp_path / "f.h5", workers=0)
    report = compute_features(both, tmp_path / "f.h5", settings=FeatureSettings(), workers=0)
    assert (report.rows_computed, report.upsampled) == (1, 1)
    # A file of narrow features takes wide audio, which loses its upper half.
    compute_features(at_rates(8000), tmp_path / "g.h5", workers=0)
    added = compute_features(at_rates(8000, 16000), tmp_path / "g.h5", workers=0)
    assert (added.rate_hz, added.rows_computed, added.upsampled) == (8000, 1, 0)


def test_the_command(at_rates: Callable, tmp_path: Path) -> None:
    corpus = at_rates(8000, 8000)

    def features(*words: str) -> tuple[dict, str]:
        command = ["corpus", "features", str(corpus.path), *words, "--json", "--workers", "0"]
        done = CliRunner().invoke(cli, command, catch_exceptions=False)
        return json.loads(done.stdout), done.stderr

    facts, _ = features(str(tmp_path / "f.h5"))
    assert (facts["rate_hz"], facts["upsampled"]) == (8000, 0)
    facts, said = features(str(tmp_path / "g.h5"), "--rate", "16000")
    assert (facts["rate_hz"], facts["upsampled"]) == (16000, 2)
    assert "2 utterances have a lower sample rate than 16000 Hz and were upsampled" in said
    bad = CliRunner().invoke(cli, ["corpus", "features", str(at_rates(8000, 16000).path), str(tmp_path / "h.h5")])
    assert isinstance(bad.exception, ConfigError)

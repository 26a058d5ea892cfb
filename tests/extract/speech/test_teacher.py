"""Speech teachers in a store: states against the encoder, frames by the headers, resumed and refreshed runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from stillhouse.cli import cli
from stillhouse.data.audio.read import read_audio
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest
from stillhouse.extract.speech.encoder import load_encoder
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from .test_rows import saved

RNG = np.random.default_rng(0)


def noise(seconds: float, rate_hz: int = 16000, channels: int = 1) -> np.ndarray:
    return 0.1 * RNG.standard_normal((int(seconds * rate_hz), channels))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("whisper", tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files, segments of a file with two channels, other rates, long audio, and a text without audio."""
    folder = tmp_path_factory.mktemp("sounds")
    utterances = []
    for k, seconds in enumerate((0.5, 0.8, 1.3, 0.61, 9.2)):
        soundfile.write(folder / f"{k}.flac", noise(seconds), 16000)
        utterances.append(Utterance(id=f"u{k}", text=f"text {k}", audio=f"{k}.flac", session=f"s{k // 2}"))
    soundfile.write(folder / "both.wav", noise(2, 16000, 2), 16000, subtype="FLOAT")
    for channel in (0, 1):
        cut = {"start_s": 0.25 + channel, "duration_s": 0.7503, "channel": channel}
        utterances.append(Utterance(id=f"c{channel}", text="a", audio="both.wav", **cut))
    for rate_hz in (8000, 22050, 44100):
        soundfile.write(folder / f"r{rate_hz}.ogg", noise(1.234, rate_hz), rate_hz)
        utterances.append(Utterance(id=f"r{rate_hz}", text="a", audio=f"r{rate_hz}.ogg"))
    utterances.append(Utterance(id="silent", text="a text without audio"))
    write_manifest(folder / "corpus.jsonl", utterances)
    return folder / "corpus.jsonl"


def copy_of(sounds: Path, folder: Path) -> Path:
    shutil.copytree(sounds.parent, folder)
    return folder / "corpus.jsonl"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def extract(corpus: Path, store: Path, teacher: Path, *options: object, code: int = 0) -> Result:
    return run("extract", corpus, store, "--teacher", teacher, "--name", "w", *options, code=code)


def expected(corpus: Corpus, teacher: Path, utterance: str, layers: list[int]) -> np.ndarray:
    encoder, u = load_encoder(str(teacher)), corpus.by_id[utterance]
    samples = read_audio(corpus.audio_path(u), u.start_s, u.duration_s, encoder.sample_rate_hz, u.channel)
    return encoder.states(samples, layers)


def change(corpus: Path, utterance: str, **fields: object) -> None:
    utterances = read_manifest(corpus).utterances
    write_manifest(corpus, [u.model_copy(update=fields) if u.id == utterance else u for u in utterances])


def test_states_are_those_of_the_encoder(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    said = extract(sounds, tmp_path / "s", whisper, "--layers", "1,last", "--dtype", "float32")
    assert "1 utterances have no audio, and so no frames: silent" in said.stderr
    assert "less than 16000 Hz, and nothing in the upper band of the model: r8000" in said.stderr
    store, corpus = Store.open(tmp_path / "s", checksums=True), read_manifest(sounds)
    views = store.resolve("w/alone/*")
    assert [v.layer for v in views] == [1, 3]
    batch = store.gather(corpus.by_id, views)
    assert batch.token_id == batch.span == {}
    ends = np.cumsum(batch.lengths["w"])
    for u, end, length in zip(corpus.utterances, ends.tolist(), batch.lengths["w"].tolist(), strict=True):
        if u.audio is None:
            assert length == 0
            continue
        plain = expected(corpus, whisper, u.id, [1, 3])
        assert plain.shape[1] == length
        for view, states in zip(views, plain, strict=True):
            assert np.array_equal(batch.states[view][end - length : end], states)
    record = store.teacher("w")
    assert (record.kind, record.axis, record.rate_hz, record.offset_s) == ("speech", "frame", 50.0, 0.0)
    assert record.sample_rate_hz == 16000 and record.tokens == ends[-1]
    attributes = json.loads((tmp_path / "s/data.zarr/w/zarr.json").read_text())["attributes"]["stillhouse"]
    assert (attributes["rate_hz"], attributes["offset_s"], attributes["sample_rate_hz"]) == (50.0, 0.0, 16000)
    hidden = json.loads((tmp_path / "s/data.zarr/w/hidden/zarr.json").read_text())
    assert hidden["dimension_names"] == ["context", "layer", "frame", "dimension"]
    assert not (tmp_path / "s/data.zarr/w/token_id").exists()
    assert verify(store) == []
    assert json.loads((tmp_path / "s/store.json").read_text())["version"] == 2

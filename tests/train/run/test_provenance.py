"""A run remembers its features: others are refused when it resumes, decodes, aligns or is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import CheckpointError, StaleError
from stillhouse.data.features.compute import FeatureFile, FeatureSettings, compute_features
from stillhouse.data.manifest import Corpus, read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.train.config import load_config
from stillhouse.train.export.export import export_run
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import checkpoint, identity
from stillhouse.train.run.load import load_run, trained_on

SHORT = ("optim.steps=2", "run.checkpoint_every=1", "run.eval_every=9", "run.loggers=[]", "data.dev='dev'")


def trained(tones: Path, out: Path, *changes: str) -> Trainer:
    trainer = Trainer(load_config(tones / "run.toml", [*SHORT, *changes]), out)
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def run(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("provenance") / "run"
    trained(tones, out)
    return out


@pytest.fixture(scope="module")
def narrow(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the dev split at 8 kHz."""
    path = tmp_path_factory.mktemp("narrow") / "f8.h5"
    compute_features(read_manifest(tones / "corpus.jsonl").select("dev"), path,
                     settings=FeatureSettings(rate_hz=8000), workers=0)  # fmt: skip
    return path


@pytest.mark.parametrize("command", ["decode", "align"])
def test_features_of_another_rate_are_refused(tones: Path, run: Path, narrow: Path, command: str) -> None:
    words = [command, str(run), str(tones / "corpus.jsonl"), str(narrow), "--split", "dev"]
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, StaleError)
    assert "rate_hz is 8000 there and 16000" in str(result.exception)
    assert "--rate 16000" in str(result.exception)
    assert not result.stdout


def test_an_export_remembers_its_features(tones: Path, run: Path, narrow: Path, tmp_path: Path) -> None:
    """The rate is that of training, whatever lies at the path of the features now."""
    out = tmp_path / "st"
    assert export_run(run, out, "safetensors").rate_hz == 16000
    assert trained_on(out).settings == trained_on(run).settings == FeatureFile(tones / "features.h5").settings
    words = ["decode", str(out), str(tones / "corpus.jsonl"), str(narrow), "--split", "dev"]
    assert isinstance(CliRunner().invoke(cli, words).exception, StaleError)
    head = json.loads((out / "model.json").read_text())
    del head["features"]  # as earlier versions wrote it
    (out / "model.json").write_text(json.dumps(head))
    assert trained_on(out).settings == {"rate_hz": 16000, "bins": 80}
    assert isinstance(CliRunner().invoke(cli, words).exception, StaleError)


def test_a_model_without_a_record_says_so(tones: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "st"
    export_run(run, out, "safetensors")
    head = json.loads((out / "model.json").read_text()) | {"features": None, "rate_hz": None}
    (out / "model.json").write_text(json.dumps(head))
    words = ["decode", str(out), str(tones / "corpus.jsonl"), str(tones / "features.h5"), "--split", "dev"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.stderr.count("records nothing of the features") == 1


def test_changed_times_are_refused_by_decode_align_and_train(tones: Path, run: Path, tmp_path: Path) -> None:
    corpus = read_manifest(tones / "corpus.jsonl")
    moved = [u.model_copy(update={"start_s": 0.02}) if u.id in ("u3", "u62") else u for u in corpus.utterances]
    moved = [u.model_copy(update={"audio": str(tones / str(u.audio))}) for u in moved]
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, moved)
    for command in ("decode", "align"):
        words = [command, str(run), str(path), str(tones / "features.h5"), "--split", "dev"]
        error = CliRunner().invoke(cli, words).exception
        assert isinstance(error, StaleError)
        assert "u62: start_s was 0 and is 0.02" in str(error)
        assert "u3 " not in str(error)
    with pytest.raises(StaleError, match=r"u3, u62 .*--redo-changed"):
        trained(tones, tmp_path / "new", f"data.corpus='{path}'")
    assert not (tmp_path / "new").exists()


def test_audio_that_changed_and_was_computed_again_is_not_the_run_s(tones: Path, tmp_path: Path) -> None:
    """The settings and the number of frames are the same, but the sound is not."""
    out, copy = tmp_path / "run", tmp_path / "corpus"
    shutil.copytree(tones, copy)
    own = [f"data.corpus='{copy}/corpus.jsonl'", f"data.features='{copy}/features.h5'"]
    trained(tones, out, *own)
    trained(tones, out, *own)
    audio = copy / "5.wav"
    data = bytearray(audio.read_bytes())
    data[3000:5000] = bytes(2000)
    audio.write_bytes(data)
    with pytest.raises(StaleError, match=r"u5 .*5\.wav has another content.*--redo-changed"):
        trained(tones, out, *own)
    corpus = read_manifest(copy / "corpus.jsonl")
    some = Corpus(corpus.path, corpus.utterances[5:6])
    assert compute_features(some, copy / "features.h5", workers=0, redo_changed=True).rows_computed == 2
    with pytest.raises(StaleError, match="the run's data changed: sound"):
        trained(tones, out, *own)


def test_a_resumed_run_names_other_settings_of_features(tones: Path, run: Path, tmp_path: Path) -> None:
    """A checkpoint of an earlier version, which has neither settings nor sound, resumes as before."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    path = checkpoint.checkpoints(out / "checkpoints")[-1] / "state.json"
    state = json.loads(path.read_text())
    original = FeatureSettings(rate_hz=8000)
    for features, said in ((vars(original), r"rate_hz is 16000 there and 8000"), (None, None)):
        changed = {**state, "features": features}
        if features is None:
            del changed["features"], changed["data"]["sound"]
        changed.pop("digest")
        path.write_text(json.dumps(changed | {"digest": checkpoint._digest(changed)}))
        if said:
            with pytest.raises(StaleError, match=said):
                trained(tones, out)
        else:
            trained(tones, out)
            assert trained_on(out).settings == vars(FeatureSettings())  # by the fingerprint


def test_units_and_settings_that_are_not_the_model_s_are_refused(tones: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    train_units(["abcd efgh"], "characters").save(out / "units")
    with pytest.raises(CheckpointError, match="units have the fingerprint"):
        load_run(out)
    shutil.rmtree(out / "units")
    shutil.copytree(run / "units", out / "units")
    load_run(out)
    settings = (out / "config.toml").read_text()
    (out / "config.toml").write_text(settings.replace("heads = 2", "heads = 4"))  # the same shapes
    with pytest.raises(CheckpointError, match=r"config\.toml: .*model\.heads: 2"):
        load_run(out)


def test_the_width_comes_from_the_file_and_a_run_keeps_it(tones: Path, tmp_path: Path) -> None:
    few = read_manifest(tones / "corpus.jsonl")
    corpus = Corpus(few.path, [u for u in few.utterances if u.id in ("u1", "u2", "u60")])
    moved = [u.model_copy(update={"audio": str(tones / str(u.audio))}) for u in corpus.utterances]
    write_manifest(tmp_path / "corpus.jsonl", moved)
    for bins in (40, 80):
        compute_features(read_manifest(tmp_path / "corpus.jsonl"), tmp_path / f"{bins}.h5", (1.0, 1.1),
                         settings=FeatureSettings(bins=bins), workers=0)  # fmt: skip
    own = {
        bins: [f"data.corpus='{tmp_path}/corpus.jsonl'", f"data.features='{tmp_path}/{bins}.h5'"] for bins in (40, 80)
    }
    trained(tones, tmp_path / "run", *own[80])
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(StaleError, match=r"bins is 40 there and 80 in the model.*--bins 80"):
        trained(tones, tmp_path / "run", *own[40])
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files
    assert len(trained(tones, tmp_path / "narrow", *own[40]).model.encoder.feature_mean) == 40
    assert len(load_run(tmp_path / "narrow", "last")[0].encoder.feature_mean) == 40
    export_run(tmp_path / "narrow", tmp_path / "weights", "safetensors", which="last")
    assert len(load_run(tmp_path / "weights")[0].encoder.feature_mean) == 40


def test_identities_of_earlier_versions_can_be_compared() -> None:
    old = {"data": {"units": "a", "frames": 1}}
    new = {"data": {"units": "a", "frames": 1, "sound": "x"}}
    assert identity.differences(old, new) == []
    assert identity.differences(new, {"data": new["data"] | {"sound": "y"}}) == ["data.sound: x and y"]
    assert identity.differences(new, {"data": {"units": "a", "sound": "x"}}) == ["data.frames: 1 and None"]


def test_changed_transcripts_of_a_resumed_run_are_named(tones: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "run", tmp_path / "corpus.jsonl"
    corpus = read_manifest(tones / "corpus.jsonl")
    here = [u.model_copy(update={"audio": str(tones / str(u.audio))}) for u in corpus.utterances]
    own = [f"data.corpus='{path}'"]
    write_manifest(path, here)
    trained(tones, out, *own)
    write_manifest(path, [here[1], here[2].model_copy(update={"text": "abc"}), *here[3:]])
    with pytest.raises(StaleError, match=r"the run's data changed: .*; other text: u2; missing: u0; restore"):
        trained(tones, out, *own)
    (out / "transcripts.json").unlink()  # as in a run of an earlier version
    with pytest.raises(StaleError, match=r"the run's data changed: .*transcripts: \w+ when the run began, \w+ now; "):
        trained(tones, out, *own)

"""`corpus features --encoder`: rows against SpeechEncoder.states, resumed runs, other weights, limits of float16."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.audio.read import change_speed
from stillhouse.data.errors import PartialError, StaleError, StillhouseError
from stillhouse.data.features.file import FeatureFile
from stillhouse.data.features.provenance import refuse_changed_rows
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.extract.speech.encoder import load_encoder
from stillhouse.extract.speech.rows import encoder_method, recorded_method

from .test_encoder import MODELS

SECONDS = (0.5, 0.8, 1.3, 0.61)


def saved(name: str, folder: Path, seed: int = 1) -> Path:
    kind, config, extractor = MODELS[name]
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files, two segments of one file with two channels, and audio of 8 kHz in a split of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    utterances = []
    for k, seconds in enumerate(SECONDS):
        soundfile.write(folder / f"{k}.wav", 0.1 * rng.standard_normal(int(16000 * seconds)), 16000, subtype="FLOAT")
        utterances.append(Utterance(id=f"u{k}", text="a", audio=f"{k}.wav", split="whole"))
    soundfile.write(folder / "both.wav", 0.1 * rng.standard_normal((32000, 2)), 16000, subtype="FLOAT")
    for channel in (0, 1):
        cut = {"start_s": 0.25 + channel, "duration_s": 0.75, "channel": channel}
        utterances.append(Utterance(id=f"c{channel}", text="a", audio="both.wav", split="cut", **cut))
    soundfile.write(folder / "low.wav", 0.1 * rng.standard_normal(8000), 8000, subtype="FLOAT")
    utterances.append(Utterance(id="low", text="a", audio="low.wav", split="low"))
    write_manifest(folder / "corpus.jsonl", utterances)
    return folder / "corpus.jsonl"


def run(*args: object) -> Any:
    return CliRunner().invoke(cli, ["corpus", "features", *map(str, args)])


def done(*args: object) -> str:
    result = run(*args)
    assert result.exception is None, (result.exception, result.output)
    return result.stderr


def refused(*args: object) -> str:
    result = run(*args)
    assert isinstance(result.exception, StillhouseError), result.exception
    return str(result.exception)


def test_every_kind_of_encoder_gives_its_states(corpus: Path, tmp_path: Path) -> None:
    for name in MODELS:
        folder = saved(name, tmp_path / name.replace(" ", "-"))
        path = tmp_path / f"{folder.name}.h5"
        said = done(
            corpus,
            path,
            "--encoder",
            folder,
            "--layer",
            2,
            "--speeds",
            "0.9,1.0",
            "--split",
            "whole,cut",
            "--workers",
            0,
        )
        assert "12 rows of" in said and "real time" in said
        encoder, file = load_encoder(str(folder)), FeatureFile(path).open()
        assert len(file.row_ids) == 12 and file.width == 32
        parts = {u.id: u for u in read_manifest(corpus).utterances}
        for id in ("u0", "u2", "c1"):
            whole = soundfile.read(corpus.parent / str(parts[id].audio), dtype="float32", always_2d=True)[0]
            begin = int(16000 * parts[id].start_s)
            samples = np.ascontiguousarray(whole[begin : begin + 12000, 1] if id == "c1" else whole[:, 0])
            for speed in (0.9, 1.0):
                states = encoder.states(change_speed(samples, speed), [2])[0]
                np.testing.assert_allclose(file.gather([id], speed)[0], states.astype(np.float16), rtol=2e-3, atol=2e-4)
        settings = file.settings
        assert settings["method"] == "encoder 1" and settings["layer"] == 2 and settings["bins"] == 32
        assert settings["architecture"] == encoder.kind and settings["weights"] == encoder.weights_hash()
        assert (settings["frame_hz"], settings["offset_s"]) == (encoder.rate_hz, encoder.offset_s)
        assert settings["encoder"] == str(folder) and settings["rate_hz"] == 16000
        facts = json.loads(CliRunner().invoke(cli, ["corpus", "info", str(path), "--json"]).output)
        assert facts["frame_hz"] == encoder.rate_hz and facts["width"] == 32
        assert facts["hours"] == pytest.approx(file.offsets[-1] / encoder.rate_hz / 3600)


def test_workers_give_the_same_bytes_and_a_killed_run_resumes(corpus: Path, tmp_path: Path) -> None:
    """Audio for some seconds of work: each killed run leaves parts, which the next one keeps."""
    rng = np.random.default_rng(1)
    utterances = []
    for k in range(24):
        soundfile.write(tmp_path / f"{k}.wav", 0.1 * rng.standard_normal(16000 * 3), 16000, subtype="FLOAT")
        utterances.append(Utterance(id=f"u{k}", text="a", audio=f"{k}.wav"))
    write_manifest(tmp_path / "corpus.jsonl", utterances)
    folder = saved("wavlm", tmp_path / "model")
    options = ["--encoder", str(folder), "--layer", "3", "--workers", "1"]
    command = [sys.executable, "-m", "stillhouse.cli", "corpus", "features", str(tmp_path / "corpus.jsonl")]
    parts = tmp_path / "killed.h5.parts"
    process = subprocess.Popen([*command, str(tmp_path / "killed.h5"), *options], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(parts.glob("part-*.h5")):
        os.sched_yield()
        time.sleep(0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sum(len(FeatureFile(p).open().row_ids) for p in parts.glob("part-*.h5"))
    assert process.returncode == -signal.SIGKILL and kept
    said = done(tmp_path / "corpus.jsonl", tmp_path / "killed.h5", *options[:-1], 0)
    counts = re.search(r"(\d+) rows present, (\d+) to compute", said)
    # The worker may finish the part at which it was when its parent died.
    assert counts is not None and int(counts[1]) >= kept and int(counts[1]) + int(counts[2]) == 24
    assert not parts.exists()
    done(tmp_path / "corpus.jsonl", tmp_path / "whole.h5", *options[:-1], 0)
    killed, whole = FeatureFile(tmp_path / "killed.h5"), FeatureFile(tmp_path / "whole.h5")
    np.testing.assert_array_equal(killed.gather(whole.ids)[0], whole.gather(whole.ids)[0])
    assert killed.damaged_rows() == []


def test_other_weights_layers_and_methods_are_refused_and_another_place_is_not(corpus: Path, tmp_path: Path) -> None:
    one, path = saved("wav2vec2", tmp_path / "one"), tmp_path / "f.h5"
    options = ("--split", "whole", "--workers", 0)
    done(corpus, path, "--encoder", one, "--layer", 1, *options)
    (tmp_path / "other").mkdir()
    moved = saved("wav2vec2", tmp_path / "other" / "place")
    assert "4 rows present, 0 to compute" in done(corpus, path, "--encoder", moved, "--layer", 1, *options)
    assert "layer is 1 there and 2 here" in refused(corpus, path, "--encoder", one, "--layer", 2, *options)
    other = saved("wav2vec2", tmp_path / "seed", seed=2)
    assert "weights is" in refused(corpus, path, "--encoder", other, "--layer", 1, *options)
    assert "method is 'encoder 1' there" in refused(corpus, path, *options)

    settings = FeatureFile(path).settings
    samples = np.ones(16000, np.float32) * 0.1
    rows = recorded_method(settings, "cpu").rows(samples, "x")
    np.testing.assert_array_equal(recorded_method(settings, "cpu", str(moved)).rows(samples, "x"), rows)
    with pytest.raises(StaleError, match=r"other weights.*--encoder"):
        recorded_method(settings, "cpu", str(other))

    changed = read_manifest(corpus)
    changed.utterances[0] = changed.utterances[0].model_copy(update={"duration_s": 0.4})
    with pytest.raises(StaleError, match=rf"--redo-changed --encoder {one} --layer 1`"):
        refuse_changed_rows(changed, FeatureFile(path), changed.utterances[:4])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", 1], "--encoder MODEL"),
        (["--encoder", "MODEL"], "needs a layer"),
        (["--encoder", "MODEL", "--layer", 1, "--bins", 40], "--bins is for fbank"),
        (["--encoder", "MODEL", "--layer", 1, "--rate", 8000], "takes audio of 16000 Hz"),
        (["--encoder", "MODEL", "--layer", 4], "no layer 4 (expected 0 to 3"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path, options: list, words: str
) -> None:
    folder = saved("wav2vec2", tmp_path / "model")
    assert words in refused(corpus, tmp_path / "f.h5", *(folder if o == "MODEL" else o for o in options))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_audio_of_a_lower_rate_is_upsampled_only_if_asked(corpus: Path, tmp_path: Path) -> None:
    folder = saved("hubert", tmp_path / "model")
    options = (corpus, tmp_path / "f.h5", "--encoder", folder, "--layer", 1, "--split", "low", "--workers", 0)
    said = refused(*options)
    assert "the audio has 8000 Hz" in said and "give --rate 16000 to upsample it" in said and "--rate 8000" not in said
    assert "were upsampled" in done(*options, "--rate", 16000)


def test_numbers_beyond_float16_and_nan_name_the_utterance(corpus: Path, tmp_path: Path) -> None:
    folder = saved("wav2vec2", tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(folder)
    for value, words in ((1e6, "float16 cannot hold"), (float("nan"), "not finite")):
        with torch.no_grad():
            model.encoder.layers[1].final_layer_norm.bias.fill_(value)
        model.save_pretrained(folder)
        path = tmp_path / "f.h5"
        result = run(corpus, path, "--encoder", folder, "--layer", 2, "--split", "whole", "--workers", 0)
        assert isinstance(result.exception, PartialError) and not path.exists()
        assert all(f"u{k}: " in str(result.exception) for k in range(4)) and words in str(result.exception)


def test_a_pickled_method_gives_the_same_rows(tmp_path: Path) -> None:
    method = encoder_method(str(saved("wavlm", tmp_path / "model")), 2, "cpu")
    make, arguments = method.__reduce__()
    samples = np.random.default_rng(0).standard_normal(9000).astype(np.float32) * 0.1
    np.testing.assert_array_equal(make(*arguments).rows(samples, "x"), method.rows(samples, "x"))
    saved("wavlm", tmp_path / "model", seed=3)
    with pytest.raises(StaleError, match="other weights"):
        make(*arguments).rows(samples, "x")
    assert asdict(method.settings)["bins"] == 32

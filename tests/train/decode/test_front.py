"""A transducer over a speech encoder's states: audio, a corpus and its features decode alike; times, masks, export."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.batches.loader import BatchLoader, plans_from
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.errors import PartialError, StaleError, StillhouseError
from stillhouse.data.features.file import FeatureFile
from stillhouse.data.manifest import read_manifest
from stillhouse.data.units import load_units
from stillhouse.extract.speech.rows import recorded_method
from stillhouse.train.config import load_config
from stillhouse.train.run.load import load_run

STEPS = 15
SETTINGS = (
    "model.subsampling=1",
    f"optim.steps={STEPS}",
    f"run.log_every={STEPS}",
    "run.checkpoint_every=1",
    "run.keep=99",
)
WORDY = ("--checkpoint", 1)  # A model that has learnt next to nothing emits many units.


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """A wav2vec 2.0 with random weights."""
    torch.manual_seed(seed)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder


def stillhouse(*args: object, stdin: bytes = b"") -> Any:
    result = CliRunner().invoke(cli, list(map(str, args)), input=stdin)
    assert result.exception is None, (result.exception, result.output)
    return result


def refused(*args: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, args)))
    assert isinstance(result.exception, StillhouseError), result.exception
    return str(result.exception)


def hypotheses(text: str) -> dict[str, dict]:
    return {line["id"]: line for line in map(json.loads, text.splitlines())}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def features(tones: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "states.h5"
    stillhouse("corpus", "features", tones / "corpus.jsonl", path, "--encoder", encoder, "--layer", 1,
               "--speeds", "1.0,1.1", "--workers", 0)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(tones: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in a process of its own, which does not load the encoder."""
    out = tmp_path_factory.mktemp("front") / "run"
    settings = [word for s in (*SETTINGS, "run.eval_every=99", f"data.features='{features}'") for word in ("--set", s)]
    program = (
        "import sys; from stillhouse.cli import main\n"
        f"try: main(['train', {str(tones / 'run.toml')!r}, '--out', {str(out)!r}, *{settings!r}])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return out


def test_hours_and_speed_count_the_frames_of_the_file(run: Path, features: Path, tones: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (record,) = (r for r in records if r["kind"] == "train")
    states, fbank = FeatureFile(features), FeatureFile(tones / "features.h5")
    assert (states.frame_times.hz, fbank.frame_times.hz) == (50, 100)
    train = read_manifest(tones / "corpus.jsonl").select("train")
    loader = BatchLoader(train, states, load_units(tones / "units"), speeds=[1.0, 1.1])
    plans = plans_from(BatchSampler(loader.frames, max_frames=1200), 0, 0)
    frames = sum(loader.frames[plan.indices, plan.speeds].sum() for _, _, plan in islice(plans, STEPS))
    assert record["realtime"] * record["seconds"] == pytest.approx(frames / 50)


def test_audio_a_corpus_and_its_features_decode_alike(run: Path, features: Path, tones: Path) -> None:
    corpus = tones / "corpus.jsonl"
    from_file = hypotheses(stillhouse("decode", run, corpus, features, "--split", "dev", *WORDY).stdout)
    result = stillhouse("decode", run, corpus, "--split", "dev", *WORDY)
    assert hypotheses(result.stdout) == from_file and len(from_file) == 12
    assert "layer 1" in result.stderr and "12 utterances" in result.stderr
    assert any(h["hyp"] for h in from_file.values())
    assert f"{FeatureFile(features).frames([*from_file]).sum() / 50:.0f} s of audio" in result.stderr
    for name in (60, 65):
        audio = tones / f"{name}.wav"
        for stdin, source in ((b"", audio), (audio.read_bytes(), "-")):
            result = stillhouse("decode", run, source, *WORDY, stdin=stdin)
            (heard,) = map(json.loads, result.stdout.splitlines())
            known = from_file[f"u{name}"]
            assert (heard["hyp"], heard["words"]) == (known["hyp"], known["words"]) and heard["final"]
            assert "Results come when the audio ends" in result.stderr


def test_an_encoder_of_other_weights_is_refused_and_a_moved_one_is_found(
    run: Path, tones: Path, encoder: Path, tmp_path: Path
) -> None:
    audio = (tones / "60.wav", *WORDY)
    plain = stillhouse("decode", run, *audio).stdout
    assert stillhouse("decode", run, *audio, "--encoder", save_encoder(tmp_path / "moved")).stdout == plain
    result = CliRunner().invoke(
        cli, ["decode", str(run), str(tones / "60.wav"), "--encoder", str(save_encoder(tmp_path / "other", 1))]
    )
    assert isinstance(result.exception, StaleError) and "other weights" in str(result.exception)


def test_an_encoder_that_is_gone_is_asked_for(tones: Path, run: Path, tmp_path: Path) -> None:
    said = refused("decode", run, tones / "60.wav", "--encoder", tmp_path / "gone")
    assert "gone" in said and "--encoder MODEL" in said


def test_live_options_are_refused_in_words(run: Path, tones: Path) -> None:
    for option in ("--chunk", "--endpoint"):
        assert f"so {option} is not possible" in refused("decode", run, tones / "60.wav", option, 4)


def test_word_times_count_the_encoder_s_frames(run: Path, features: Path, tones: Path, tmp_path: Path) -> None:
    """A unit of frame t is at offset + t / rate, and no word is outside its audio."""
    corpus = tones / "corpus.jsonl"
    ctm = stillhouse("align", run, corpus, features, "--split", "dev").stdout
    assert stillhouse("align", run, corpus, "--split", "dev", "--textgrid", tmp_path / "grids").stdout == ctm
    utterances = {u.id: u for u in read_manifest(corpus).utterances}
    ends: dict[str, float] = {}
    for line in ctm.splitlines():
        id, _, start, length, *_ = line.split()
        ends[id] = float(start) + float(length)
    assert len(ends) == 12
    for id, end in ends.items():
        seconds = FeatureFile(features).frames([id])[0] / 50
        assert end <= seconds + 0.01
        assert len(utterances[id].text.split()) == sum(line.split()[0] == id for line in ctm.splitlines())
    # The last words end near the end of the audio, not at half of it as with frames of 10 ms.
    late = [end / (FeatureFile(features).frames([id])[0] / 50) for id, end in ends.items()]
    assert max(late) > 0.75
    assert "xmax" in next((tmp_path / "grids").iterdir()).read_text()


def test_what_cannot_be_decoded_fails_alone(run: Path, tones: Path, tmp_path: Path) -> None:
    lines = (tones / "corpus.jsonl").read_text().splitlines()[60:63]
    moved = [json.loads(line) for line in lines]
    for line in moved:
        line["audio"] = str(tones / line["audio"])
    moved[1]["audio"] = str(tmp_path / "gone.wav")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in moved))
    result = CliRunner().invoke(cli, ["decode", str(run), str(tmp_path / "corpus.jsonl")])
    assert isinstance(result.exception, PartialError) and "u61: " in str(result.exception)
    assert hypotheses(result.stdout).keys() == {"u60", "u62"}


def test_export_says_what_must_feed_it(run: Path, encoder: Path, tmp_path: Path) -> None:
    assert "cannot stream" in refused("export", run, "--format", "onnx", "--out", tmp_path / "s", "--streaming")
    result = stillhouse("export", run, "--format", "safetensors", "--out", tmp_path / "weights")
    said = (tmp_path / "weights" / "README.md").read_text()
    head = json.loads((tmp_path / "weights" / "model.json").read_text())
    for fact in (str(encoder), head["features"]["weights"], "layer | 1", "50"):
        assert fact in said
    assert head["bins"] == 32 and "README.md" in result.stderr
    assert len(load_run(tmp_path / "weights")[0].encoder.feature_mean) == 32


def test_the_encoder_is_exported_beside_the_model_and_feeds_it(
    run: Path, encoder: Path, tones: Path, tmp_path: Path
) -> None:
    """Audio through the feature extractor and the two graphs gives the encoder states of the model itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx"
    onnx = pytest.importorskip("onnx")
    result = stillhouse("export", run, "--format", "onnx", "--frontend", "--out", out)
    assert "frontend.onnx" in result.stderr
    assert "sherpa-onnx cannot run this model: its features are states of" in result.stderr
    metadata = {p.key: p.value for p in onnx.load(out / "encoder.onnx").metadata_props}
    assert metadata["features_layer"] == "1" and metadata["features_encoder"] == str(encoder)
    assert metadata["feature_dim"] == "32" and "model_type" not in metadata
    said = (out / "README.md").read_text()
    assert "which is the graph `frontend`" in said and "`input_values`" in said and "All states belong" in said
    samples, rate_hz = soundfile.read(tones / "60.wav", dtype="float32")
    method = recorded_method(FeatureFile(features_of(run)).settings, "cpu")
    inputs = method.encoder.inputs(samples)
    front, transducer = (
        onnxruntime.InferenceSession(str(out / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("frontend", "encoder")
    )
    (states,) = front.run(None, {"input_values": inputs["input_values"].numpy()})
    np.testing.assert_allclose(states[0], method.rows(samples, "x"), atol=1e-4)
    lengths = np.array([states.shape[1]])
    found, _ = transducer.run(None, {"x": states.astype(np.float16).astype(np.float32), "x_lens": lengths})
    model = load_run(run)[0].eval()
    rows = FeatureFile(features_of(run)).gather(["u60"])[0].astype(np.float32)
    with torch.no_grad():
        plain = model.joint.encoder(model.encode(torch.from_numpy(rows)[None], torch.from_numpy(lengths))[0])
    np.testing.assert_allclose(found, plain.numpy(), atol=2e-3)
    metadata = front.get_modelmeta().custom_metadata_map
    assert metadata["features_layer"] == "1" and "speech encoder" in metadata["comment"] and rate_hz == 16000


def features_of(run: Path) -> Path:
    return Path(load_run(run)[2].data.features)


def test_a_frontend_is_refused_where_there_is_none(run: Path, tones: Path, tmp_path: Path) -> None:
    assert "--frontend is for graphs" in refused(
        "export", run, "--format", "safetensors", "--frontend", "--out", tmp_path / "w"
    )
    assert "--encoder MODEL" in refused(
        "export", run, "--format", "torch", "--encoder", tmp_path / "gone", "--out", tmp_path / "w"
    )
    assert not (tmp_path / "w").exists()


def test_masks_over_time_are_as_long_in_seconds_at_every_rate(tones: Path) -> None:
    section = load_config(tones / "run.toml", ["specaugment.time_width=30"]).specaugment
    assert section.masks(100.0, True) == section.model_dump(exclude={"time_width_s"})
    assert section.masks(50.0, False)["time_width"] == 15
    section = load_config(tones / "run.toml", ["specaugment.time_width_s=0.4"]).specaugment
    assert [section.masks(hz, hz == 100)["time_width"] for hz in (100.0, 50.0, 12.5)] == [40, 20, 5]
    assert section.masks(100.0, True)["frequency_masks"] == 2 and section.masks(50.0, False)["frequency_masks"] == 0

"""A recogniser of real speech, trained until it says words, says the same ones in sherpa-onnx."""

from __future__ import annotations

import csv
from pathlib import Path

import jiwer
import pytest

from stillhouse.cli import main
from stillhouse.data.audio.read import read_audio
from stillhouse.data.features.compute import compute_features
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.train.config import Config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.load import load_run

from .exported import our_text, sherpa_streamed, sherpa_texts

SMALL = {
    "dim": 64,
    "layers": 2,
    "heads": 2,
    "inner": 128,
    "kernel": 7,
    "predictor_dim": 32,
    "joint_dim": 64,
    "dropout": 0,
}
STREAMING = {"chunk_frames": 32, "left_chunks": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "streaming"), [("characters", False), ("sentencepiece", True)])
def test_words_of_a_trained_recogniser(
    tmp_path: Path, corpora: Path, kind: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sherpa_onnx")
    folder = corpora / "kathleen-arctic"
    with (folder / "manifest.tsv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))[:8]
    audio = [str(folder / row["path"]) for row in rows]
    write_manifest(
        tmp_path / "corpus.jsonl",
        [Utterance(id=str(i), text=row["text"], audio=path) for i, (row, path) in enumerate(zip(rows, audio))],
    )
    corpus = read_manifest(tmp_path / "corpus.jsonl")
    compute_features(corpus, tmp_path / "features.h5", workers=0)
    train_units([u.text for u in corpus.utterances], kind, size=60).save(tmp_path / "units")
    data = {name: tmp_path / file for name, file in (("corpus", "corpus.jsonl"), ("features", "features.h5"))}
    config = Config.model_validate(
        {
            "data": {**data, "units": tmp_path / "units", "batch_frames": 1600},
            "model": {**SMALL, "dropout": 0.0, **(STREAMING if streaming else {})},
            "optim": {"steps": 240, "lr": 4e-3, "warmup_steps": 20},
            "specaugment": {"frequency_masks": 0, "time_masks": 0},
            "run": {"device": "cpu", "precision": "float32", "threads": 1, "checkpoint_every": 240, "eval_every": 240},
        }
    )
    Trainer(config, tmp_path / "run", lambda line: None).run()

    command = ["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "onnx")]
    with pytest.raises(SystemExit) as ended:
        main([*command, *(["--streaming"] if streaming else ["--quantise", "int8"])])
    assert not ended.value.code
    model, units, *_ = load_run(tmp_path / "run")
    sounds = [read_audio(path) for path in audio]
    if streaming:
        heard = [(round(len(s) / 160) - 1) // 32 * 32 for s in sounds]
        ours = [our_text(model, units, s, n).split() for s, n in zip(sounds, heard)]
        theirs = [sherpa_streamed(tmp_path / "onnx", s, 1_600).split() for s in sounds]
    else:
        ours = [our_text(model, units, s).split() for s in sounds]
        theirs = [text.split() for text in sherpa_texts(tmp_path / "onnx", sounds)]
        rough = [" ".join(text.split()) for text in sherpa_texts(tmp_path / "onnx", sounds, ".int8")]
        assert jiwer.wer([" ".join(words) for words in ours], rough) < 0.3  # another model, of the same words
    assert theirs == ours
    said = [units.normalise(u.text).text for u in corpus.utterances]
    assert all(ours)
    if not streaming:  # in so few steps the one that hears chunks learns some of the words only
        assert jiwer.wer(said, [" ".join(words) for words in ours]) < 0.5

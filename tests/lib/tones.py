"""A small corpus that a recogniser can really learn: letters spoken as tones, through the real feature pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.features.compute import compute_features
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.data.units import train_units

TONES = {"a": 400, "b": 900, "c": 1600, "d": 2600, " ": 5000}


def speak(text: str, rng: np.random.Generator) -> np.ndarray:
    """float32 samples at 16 kHz: 0.12 s of a tone a letter, with silence and noise between."""
    pieces = []
    for letter in text:
        t = np.arange(int(16_000 * rng.uniform(0.10, 0.14))) / 16_000
        pieces += [0.3 * np.sin(2 * np.pi * TONES[letter] * t), np.zeros(int(16_000 * rng.uniform(0.02, 0.05)))]
    samples = np.concatenate(pieces)
    return (samples + 0.003 * rng.standard_normal(len(samples))).astype(np.float32)


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.jsonl, features.h5, units/ and run.toml."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(72):
        words = ["".join(rng.choice(list("abcd"), size=rng.integers(1, 4))) for _ in range(rng.integers(1, 4))]
        text = " ".join(words)
        soundfile.write(folder / f"{i}.wav", speak(text, rng), 16_000)
        split = "train" if i < 60 else "dev"
        utterances.append(Utterance(id=f"u{i}", text=text, audio=f"{i}.wav", split=split, session=f"s{i // 6}"))
    write_manifest(folder / "corpus.jsonl", utterances)
    corpus = read_manifest(folder / "corpus.jsonl")
    compute_features(corpus, folder / "features.h5", speeds=(1.0, 1.1), workers=0)
    train_units([u.text for u in utterances], "characters").save(folder / "units")
    (folder / "run.toml").write_text(f"""
[data]
corpus = "{folder}/corpus.jsonl"
features = "{folder}/features.h5"
units = "{folder}/units"
train = "train"
dev = "dev"
speeds = [1.0, 1.1]
batch_frames = 1200
[model]
dim = 48
layers = 2
heads = 2
inner = 96
kernel = 7
predictor_dim = 32
joint_dim = 48
[optim]
steps = 24
lr = 3e-3
warmup_steps = 5
[specaugment]
frequency_width = 6
time_width = 3
[run]
device = "cpu"
precision = "float32"
threads = 1
log_every = 1
eval_every = 12
checkpoint_every = 4
""")
    return folder

"""The corpus of tones, a store of its transcripts, and one of its audio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tones import tones

from stillhouse.cli import cli
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.teacher.model import load_teacher

__all__ = ["ears", "states", "store", "texts", "tones"]


@pytest.fixture(scope="session")
def store(tones: Path, minilm: Path) -> Path:
    """Of the tones' texts, by a real teacher: layers 0, 3 and 6 in two contexts."""
    path = tones / "teacher.zarr"
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(tones / "corpus.jsonl"), str(path)]
    command += ["--teacher", str(minilm), "--name", "minilm", "--layers", "0,3,6", "--context", "alone"]
    subprocess.run([*command, "--context", "both:8", "--device", "cpu"], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def ears(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tones' audio, by a small random HuBERT: `ear` as codes, and `raw` as plain states."""
    import transformers

    config = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model, path = tmp_path_factory.mktemp("hubert"), tones / "ears.zarr"
    torch.manual_seed(1)
    transformers.HubertModel(config).save_pretrained(model)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(model)
    for name, dtype in (("ear", "pq:4"), ("raw", "float16")):
        own = ["--teacher", str(model), "--name", name, "--layers", "1,3", "--dtype", dtype, "--device", "cpu"]
        cli(["extract", str(tones / "corpus.jsonl"), str(path), *own], standalone_mode=False)
    return path


@pytest.fixture(scope="session")
def texts(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of the tones, and of 150 texts without audio in the split "text": after a comes b, after b a space."""
    corpus = read_manifest(tones / "corpus.jsonl")
    spoken = [u.model_copy(update={"audio": str(corpus.audio_path(u))}) for u in corpus.utterances]
    words = [" ".join("ab" if (i >> k) % 2 else "cd" for k in range(1 + i % 5)) for i in range(150)]
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    write_manifest(path, [*spoken, *(Utterance(id=f"t{i}", text=w, split="text") for i, w in enumerate(words))])
    return path


@pytest.fixture(scope="session")
def states(texts: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `store`, of the tones and of the texts without audio."""
    path = tmp_path_factory.mktemp("states") / "teacher.zarr"
    request = Request("minilm", [0, 3, 6], ["alone", "both:8"])
    extract(path, read_manifest(texts), load_teacher(str(minilm), device="cpu"), request)
    return path

"""Small synthetic corpora: tones in files that soundfile writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest


@pytest.fixture
def tone() -> Callable[..., Path]:
    """Write a tone with some noise: tone(path, seconds, hz, rate_hz, channels)."""

    def write(path: Path, seconds: float = 1.0, hz: float = 440.0, rate_hz: int = 16000, channels: int = 1) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        n = round(seconds * rate_hz)
        rng = np.random.default_rng(int(hz * 7 + n))
        wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(n) / rate_hz) + 0.01 * rng.standard_normal(n)
        soundfile.write(path, np.stack([wave] * channels, axis=1), rate_hz)
        return path

    return write


@pytest.fixture
def make_corpus(tmp_path: Path, tone: Callable[..., Path]) -> Callable[[int], Corpus]:
    """A corpus of n tones from 0.3 to 1.3 s in a folder with a space and an umlaut in its name."""

    def make(n: int, folder: str = "ein Körpus") -> Corpus:
        root = tmp_path / folder
        utterances = []
        for k in range(n):
            seconds = 0.3 + (k * 37 % 100) / 100
            tone(root / "audio" / f"ton {k}.wav", seconds, 200 + 10 * k)
            utterances.append(
                Utterance(id=f"u{k:03d}", text=f"tone {k}", audio=f"audio/ton {k}.wav", duration_s=seconds)
            )
        write_manifest(root / "corpus.jsonl", utterances)
        return read_manifest(root / "corpus.jsonl")

    return make

"""What `decode RUN FILE` says of audio that is not what the model was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.read import read_audio
from stillhouse.train.commands.live import read_samples


def heard(path: Path, rate_hz: int, capsys: pytest.CaptureFixture) -> tuple[np.ndarray, str]:
    samples = np.concatenate(list(read_samples(path, rate_hz, raw=False)))
    return samples, capsys.readouterr().err


def test_a_file_below_the_rate_of_the_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(8000)
    soundfile.write(tmp_path / "a.wav", noise, 8000)
    samples, said = heard(tmp_path / "a.wav", 16000, capsys)
    np.testing.assert_array_equal(samples, read_audio(tmp_path / "a.wav"))
    assert "has 8000 Hz and the model 16000 Hz" in said and "--rate 8000" in said
    assert heard(tmp_path / "a.wav", 8000, capsys)[1] == ""
    soundfile.write(tmp_path / "b.wav", noise, 16000)
    assert heard(tmp_path / "b.wav", 8000, capsys)[1] == ""  # A higher rate is brought down.


def test_channels_and_half_a_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal((16000, 2))
    soundfile.write(tmp_path / "a.wav", noise, 16000)
    assert "has 2 channels, and their mean is decoded" in heard(tmp_path / "a.wav", 16000, capsys)[1]
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[: 44 + 32000])
    samples, said = heard(tmp_path / "a.wav", 16000, capsys)
    assert len(samples) == 8000
    assert "it promises 1.000 s, and 0.500 s can be read" in said

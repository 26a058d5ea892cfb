from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.read import change_speed, open_audio, read_audio, read_segment, resample
from stillhouse.data.errors import AudioError


def peak_hz(samples: np.ndarray, rate_hz: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * rate_hz / len(samples)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100])
def test_formats_and_rates(tmp_path: Path, tone: Callable[..., Path], suffix: str, rate_hz: int) -> None:
    path = tone(tmp_path / f"ein ton äöü.{suffix}", 1.0, 440, rate_hz)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (16000,)
    assert abs(peak_hz(samples[2000:-2000], 16000) - 440) < 2
    assert 0.25 < np.abs(samples[2000:-2000]).max() < 0.4
    with open_audio(path) as file:  # by its header
        assert file.frames / file.samplerate == pytest.approx(1.0)


def test_channels_are_averaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stereo = rng.uniform(-0.5, 0.5, (1000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "s.wav", stereo, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "s.wav"), stereo.mean(axis=1, dtype=np.float32))


def test_segments_are_cut_where_they_are_said_to_be(tmp_path: Path) -> None:
    ramp = (np.arange(16000) / 16000).astype(np.float32)
    soundfile.write(tmp_path / "r.wav", ramp, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "r.wav", 0.25, 0.5), ramp[4000:12000])
    np.testing.assert_array_equal(read_audio(tmp_path / "r.wav", 0.9), ramp[14400:])
    # Rounded times may pass the end by a little.
    np.testing.assert_array_equal(read_audio(tmp_path / "r.wav", 0.9, 0.11), ramp[14400:])
    for start, duration in [(0.9, 0.2), (1.0, None), (2.0, 0.1)]:
        with pytest.raises(AudioError, match=r"leaves the audio \(expected at most 1\.000 s\)"):
            read_audio(tmp_path / "r.wav", start, duration)


def test_missing_and_damaged_files(tmp_path: Path, tone: Callable[..., Path]) -> None:
    with pytest.raises(AudioError, match="no such audio file"):
        read_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(AudioError, match="not readable as audio"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(AudioError, match="not readable as audio"):
        read_audio(tmp_path)
    whole = tone(tmp_path / "whole.flac", 4.0).read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=r"damaged|ends early"):
        read_audio(tmp_path / "cut.flac")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(AudioError, match="empty"):
        read_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="not numbers"):
        read_segment(tmp_path / "nan.wav")


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1, 0.95, 1.25])
@pytest.mark.parametrize("from_hz", [8000, 16000, 22050])
def test_speed_changes_duration_and_pitch_by_exactly_the_factor(speed: float, from_hz: int) -> None:
    n = from_hz * 2
    wave = np.sin(2 * np.pi * 500 * np.arange(n) / from_hz).astype(np.float32)
    out = change_speed(resample(wave, from_hz, 16000), speed)
    assert len(out) == -(-Fraction(32000) // Fraction(str(speed)))
    # The very sine at the new pitch, away from the filter's edges.
    expected = np.sin(2 * np.pi * 500 * speed * np.arange(len(out)) / 16000)
    assert np.abs(out - expected)[200:-200].max() < 5e-3


def test_nothing_to_do_copies_nothing() -> None:
    wave = np.zeros(10, np.float32)
    assert resample(wave, 16000, 16000) is wave
    assert change_speed(wave, 1.0) is wave
    with pytest.raises(ValueError, match="ratio"):
        change_speed(wave, 0.0)


def test_real_files_have_the_length_that_their_manifest_says(corpora: Path) -> None:
    folder = corpora / "kathleen-arctic"
    rows = [line.split("\t") for line in (folder / "manifest.tsv").read_text().splitlines()[1:6]]
    for row in rows:
        assert len(read_audio(folder / row[4])) == pytest.approx(float(row[3]) * 16000, abs=16)

"""Noise and rooms, each against the same written out slowly."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.noise import find_noise, reverberated, with_noise
from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import AudioError, ConfigError

HZ = 16000


def sound(seed: int, count: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def power(x: np.ndarray) -> float:
    return float((x.astype(np.float64) ** 2).mean())


def write(path: Path, samples: np.ndarray, hz: int = HZ) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, hz, subtype="FLOAT")
    return path


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5, 40.0])
def test_the_ratio_is_what_was_asked_for(snr: float) -> None:
    speech, noise = sound(1, 8000), 7 * sound(2, 8000)
    added = with_noise(speech, noise, snr).astype(np.float64) - speech
    assert 10 * np.log10(power(speech) / power(added)) == pytest.approx(snr, abs=1e-3)
    assert np.corrcoef(added, noise)[0, 1] == pytest.approx(1, abs=1e-5)
    assert not with_noise(np.zeros(100, np.float32), noise[:100], snr).any()


def test_a_room_is_the_sum_of_delayed_copies_and_leaves_speech_in_its_place() -> None:
    speech = sound(3, 500)
    room = np.zeros(120, np.float32)
    room[[10, 17, 60, 119]] = 0.9, -0.4, 0.3, 0.2  # the direct path arrives after ten samples
    expected = np.zeros(500)
    for at, gain in ((0, 0.9), (7, -0.4), (50, 0.3), (109, 0.2)):
        expected[at:] += gain * speech[: 500 - at].astype(np.float64)
    expected *= np.sqrt(power(speech) / power(expected))
    np.testing.assert_allclose(reverberated(speech, room), expected, atol=1e-6)
    assert not reverberated(np.zeros(50, np.float32), room).any()
    np.testing.assert_allclose(reverberated(speech, np.array([0, 3.0], np.float32)), speech, atol=1e-6)


def test_a_copy_is_drawn_by_its_name_from_all_files(tmp_path: Path) -> None:
    """One short file repeats, of a long one the segment is inside, and an 8 kHz one is resampled."""
    write(tmp_path / "n/a/short.wav", sound(4, 1000))
    write(tmp_path / "n/b/long.flac".replace("flac", "wav"), sound(5, 80000))
    write(tmp_path / "n/b/low.wav", sound(6, 4000), 8000)
    (tmp_path / "n/README.txt").write_text("no audio")
    recipe = find_noise(tmp_path / "n", None, (10, 10), 1)
    assert recipe.noise == ("a/short.wav", "b/long.wav", "b/low.wav")
    speech = sound(7, 9000)
    copies = {k: recipe.applied(speech, HZ, f"u{k}") for k in range(40)}
    again = pickle.loads(pickle.dumps(recipe))
    assert all(np.array_equal(again.applied(speech, HZ, f"u{k}"), copy) for k, copy in copies.items())
    assert len({copy.tobytes() for copy in copies.values()}) > 5  # two of the files are shorter than the speech
    short = np.resize(read_audio(tmp_path / "n/a/short.wav"), 9000)
    repeated = with_noise(speech, short, 10)
    assert sum(np.allclose(copy, repeated, atol=1e-6) for copy in copies.values()) in range(3, 30)
    assert all(copy.shape == speech.shape and copy.dtype == np.float32 for copy in copies.values())
    other = find_noise(tmp_path / "n", None, (0, 20), 1)
    ratios = [10 * np.log10(power(speech) / power(other.applied(speech, HZ, f"u{k}") - speech)) for k in range(60)]
    assert min(ratios) < 4 and max(ratios) > 16 and min(ratios) > -0.01 and max(ratios) < 20.01


def test_room_and_noise_together(tmp_path: Path) -> None:
    room = np.array([0.5, 0, 0.2], np.float32)
    write(tmp_path / "r/room.wav", room)
    write(tmp_path / "n/noise.wav", sound(8, 500))
    speech = sound(9, 500)
    wet = find_noise(None, tmp_path / "r", (5, 5), 1).applied(speech, HZ, "u")
    np.testing.assert_allclose(wet, reverberated(speech, room), atol=1e-7)
    both = find_noise(tmp_path / "n", tmp_path / "r", (5, 5), 1).applied(speech, HZ, "u")
    assert 10 * np.log10(power(wet) / power(both.astype(np.float64) - wet)) == pytest.approx(5, abs=1e-2)


def test_folders_that_have_no_sound_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no audio below this folder"):
        find_noise(tmp_path / "empty", None, (5, 20), 1)
    write(tmp_path / "silent/a.wav", np.zeros(4000, np.float32))
    with pytest.raises(AudioError, match=r"segments of noise were silent.*a\.wav"):
        find_noise(tmp_path / "silent", None, (5, 20), 1).applied(sound(1, 400), HZ, "u")
    with pytest.raises(AudioError, match="impulse response is silent"):
        find_noise(None, tmp_path / "silent", (5, 20), 1).applied(sound(1, 400), HZ, "u")
    with pytest.raises(ConfigError, match="20 to 5 dB"):
        find_noise(tmp_path / "silent", None, (20, 5), 1)

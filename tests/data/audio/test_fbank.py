from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.audio.fbank import OnlineFbank, fbank
from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import AudioError


def kaldi_by_hand(samples: np.ndarray, rate_hz: int = 16000, bins: int = 80) -> np.ndarray:
    """Kaldi's fbank from its definition, in float64 and frame by frame: the oracle."""
    width, shift = rate_hz * 25 // 1000, rate_hz // 100
    size = 1 << (width - 1).bit_length()
    x = samples.astype(np.float64)
    n = np.arange(width)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * n / (width - 1))) ** 0.85

    def mel(hz: np.ndarray | float) -> np.ndarray:
        return 1127 * np.log(1 + np.asarray(hz) / 700)

    low, high = mel(20), mel(rate_hz / 2 - 400)
    edges = low + (high - low) * np.arange(bins + 2) / (bins + 1)
    at = mel(np.arange(size // 2 + 1) * rate_hz / size)
    filters = np.zeros((bins, size // 2 + 1))
    for k in range(bins):
        left, centre, right = edges[k : k + 3]
        filters[k] = np.clip(np.minimum((at - left) / (centre - left), (right - at) / (right - centre)), 0, None)
    filters[:, -1] = 0  # the Nyquist bin is left out

    out = []
    for t in range((len(x) + shift // 2) // shift):
        k = t * shift + shift // 2 - width // 2 + n
        k = np.where(k < 0, -k - 1, k)
        k = np.where(k >= len(x), 2 * len(x) - 1 - k, k)  # both edges are mirrored
        frame = x[k] - x[k].mean()
        frame = np.concatenate([frame[:1] * 0.03, frame[1:] - 0.97 * frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, size)) ** 2
        out.append(np.log(np.maximum(filters @ power, np.finfo(np.float32).eps)))
    return np.array(out)


@pytest.mark.parametrize("n", [400, 479, 480, 639, 640, 16000, 23457])
@pytest.mark.parametrize(("rate_hz", "bins"), [(16000, 80), (8000, 40)])
def test_fbank_is_kaldis(n: int, rate_hz: int, bins: int) -> None:
    samples = (0.1 * np.random.default_rng(n).standard_normal(n)).astype(np.float32)
    found = fbank(samples, rate_hz, bins)
    expected = kaldi_by_hand(samples, rate_hz, bins)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-3


def test_fbank_of_speech_is_kaldis(corpora: Path) -> None:
    for path in sorted((corpora / "kathleen-arctic" / "wav16k").iterdir())[:5]:
        samples = read_audio(path)
        assert np.abs(fbank(samples) - kaldi_by_hand(samples)).max() < 5e-3


def test_fbank_is_kaldi_native_fbanks() -> None:
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges = 0, False
    options.mel_opts.num_bins, options.mel_opts.high_freq = 80, -400
    samples = (0.1 * np.random.default_rng(0).standard_normal(16123)).astype(np.float32)
    computer = knf.OnlineFbank(options)
    computer.accept_waveform(16000, samples.tolist())
    computer.input_finished()
    expected = np.stack([computer.get_frame(k) for k in range(computer.num_frames_ready)])
    assert np.abs(fbank(samples) - expected).max() < 2e-3


def test_silence_is_the_floor_and_scale_adds_a_constant() -> None:
    assert np.allclose(fbank(np.zeros(1600, np.float32)), np.log(np.finfo(np.float32).eps))
    samples = (0.01 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)
    np.testing.assert_allclose(fbank(samples * 10) - fbank(samples), 2 * np.log(10), atol=1e-3)


def test_what_cannot_be_a_frame_is_refused() -> None:
    with pytest.raises(AudioError, match="shorter than one frame"):
        fbank(np.zeros(399, np.float32))
    with pytest.raises(ValueError, match="shape"):
        fbank(np.zeros((1, 16000), np.float32))


def sound(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("rate_hz", [16_000, 8_000, 22_050])
@pytest.mark.parametrize("arrivals", [1, 37, 160, 163, 400, 5_000, 1_000_000])
def test_arrivals_of_any_size_give_the_same_frames(arrivals: int, rate_hz: int) -> None:
    window = int(rate_hz * 0.025)
    online = OnlineFbank(rate_hz)
    for samples in (window, window + 1, window + 79, window + 80, 1_300, 4_321):  # one after the other
        whole = sound(samples, samples)
        found, heard = [], 0
        for at in range(0, samples, arrivals):
            found.append(online.push(whole[at : at + arrivals]))
            heard += len(found[-1])
            came = min(samples, at + arrivals)
            # all whose window is full, and no more
            assert heard == (0 if came < window else (came - (window - window // 2 + int(rate_hz * 0.01) // 2))
                             // int(rate_hz * 0.01) + 1)  # fmt: skip
        found.append(online.finish())
        expected = fbank(whole, rate_hz)
        assert np.concatenate(found).shape == expected.shape
        # To the rounding of a float32 product, which depends on how many rows are computed together
        assert np.abs(np.concatenate(found) - expected).max() < 2e-6


def test_too_short_a_sound_has_no_frames() -> None:
    online = OnlineFbank()
    assert len(online.push(sound(399))) == len(online.finish()) == 0
    assert len(online.push(sound(400))) == 1
    assert len(online.finish()) == 2  # (400 + 80) // 160 = 3 frames in all

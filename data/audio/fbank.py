"""The one function from sound to acoustic features; training and decoding both call it.

Invariant: the same samples give the same frames as sherpa-onnx computes, so an exported model takes plain fbank.
Exercised by `stillhouse corpus features` and, against a float64 version, by tests/data/audio/test_fbank.py.
"""

from __future__ import annotations

import numpy as np

from ..errors import AudioError

FRAME_S, SHIFT_S = 0.025, 0.010


def fbank(samples: np.ndarray, rate_hz: int = 16000, bins: int = 80) -> np.ndarray:
    """Log mel energies of samples in [-1, 1]: float32 [S] -> float32 [T, bins], T = round(S / shift), halves up.

    Computed by `torchaudio.compliance.kaldi.fbank`. The settings are those of sherpa-onnx's features.h and
    features.cc over kaldi-native-fbank, read in their sources, so that an exported model finds at run time what it
    was trained on: samples as they are (`normalize_samples = true`), 25 ms frames every 10 ms, `snip_edges = false`
    (the edges are mirrored), dither 0, DC removed in each frame, pre-emphasis 0.97, povey window, FFT of the next
    power of two, power spectrum, triangular mel filters from 20 Hz to 400 Hz below Nyquist (`high_freq = -400`),
    natural log of the energy floored at float32's epsilon (1.19e-7, that is -15.94), no energy column, no mean
    subtraction. Measured against kaldi-native-fbank 1.23 on read speech: at most 1.1e-3 apart.
    Raises AudioError for fewer samples than one frame.
    """
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"samples of shape {samples.shape}, expected [S]")
    if len(samples) < int(rate_hz * FRAME_S):
        raise AudioError(
            f"{len(samples) / rate_hz:.4f} s is shorter than one frame",
            expected=f"at least {FRAME_S} s of audio",
        )
    return log_mel(samples, rate_hz, bins)


def log_mel(samples: np.ndarray, rate_hz: int, bins: int, *, edges: bool = True) -> np.ndarray:
    """`fbank` of samples float32 [S] that hold a window at least; without `edges`, of the whole windows alone."""
    import torch
    from torchaudio.compliance import kaldi

    with torch.inference_mode():
        mel = kaldi.fbank(
            torch.from_numpy(samples)[None],
            sample_frequency=float(rate_hz),
            num_mel_bins=bins,
            frame_length=FRAME_S * 1000,
            frame_shift=SHIFT_S * 1000,
            snip_edges=not edges,
            dither=0.0,
            low_freq=20.0,
            high_freq=-400.0,
            window_type="povey",
            preemphasis_coefficient=0.97,
            remove_dc_offset=True,
            use_energy=False,
        )
    return mel.numpy()


class OnlineFbank:
    """One sound; `finish` ends it and makes ready for another."""

    def __init__(self, rate_hz: int = 16000, bins: int = 80) -> None:
        self.rate_hz, self.bins = rate_hz, bins
        self.window, self.shift = int(rate_hz * FRAME_S), int(rate_hz * SHIFT_S)
        self.edge = self.window // 2 - self.shift // 2  # what the first window mirrors of the beginning
        self._begin()

    def _begin(self) -> None:
        self.samples = 0
        self.frames = 0
        self._waiting = np.empty(0, np.float32)  # from the next frame's window on

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Samples [n] in [-1, 1] -> float32 [m, bins] of the windows that are now full."""
        samples = np.asarray(samples, dtype=np.float32)
        before, self.samples = self.samples, self.samples + len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        if self.samples < self.window:  # less than `fbank` takes
            return self._none()
        if before < self.window:
            self._waiting = np.concatenate([self._waiting[: self.edge][::-1], self._waiting])
        full = max(0, (len(self._waiting) - self.window) // self.shift + 1)
        return self._computed(full)

    def finish(self) -> np.ndarray:
        """The sound has ended: float32 [m, bins] of its last windows. None of a sound shorter than one frame."""
        left = (self.samples + self.shift // 2) // self.shift - self.frames
        if self.samples >= self.window and left:
            self._waiting = np.concatenate([self._waiting, self._waiting[: -self.window : -1]])
            found = self._computed(left)
        else:
            found = self._none()
        self._begin()
        return found

    def _computed(self, count: int) -> np.ndarray:
        if not count:
            return self._none()
        found = log_mel(self._waiting[: (count - 1) * self.shift + self.window], self.rate_hz, self.bins, edges=False)
        self._waiting = self._waiting[count * self.shift :]
        self.frames += count
        return found

    def _none(self) -> np.ndarray:
        return np.empty((0, self.bins), np.float32)

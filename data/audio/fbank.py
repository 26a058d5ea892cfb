"""Kaldi fbank of whole audio and of audio that is still arriving.

Guarantees: the frames are those that sherpa-onnx computes, so an exported model takes plain fbank.
Try: `pytest tests/data/audio/test_fbank.py`.
"""

from __future__ import annotations

import numpy as np

from ..errors import AudioError

FRAME_S, SHIFT_S = 0.025, 0.010


def fbank(samples: np.ndarray, rate_hz: int = 16000, bins: int = 80) -> np.ndarray:
    """Return log mel energies, float32 [T, bins], of samples float32 [S] in [-1, 1]. T = round(S / shift), halves up.

    `torchaudio.compliance.kaldi.fbank` computes them. The settings are those of sherpa-onnx (features.h and features.cc
    over kaldi-native-fbank), so an exported model gets at run time what it was trained on. On read speech,
    kaldi-native-fbank 1.23 differs by at most 1.1e-3. The settings are:

    - samples as they are (`normalize_samples = true`), in frames of 25 ms that begin every 10 ms
    - mirrored edges (`snip_edges = false`), no dither, the mean of each frame removed, pre-emphasis 0.97, povey window
    - an FFT of the next power of two, its power, and triangular mel filters from 20 Hz to 400 Hz below Nyquist
      (`high_freq = -400`)
    - natural log, floored at float32's epsilon (1.19e-7, that is -15.94), no energy column, no mean subtraction

    Raises AudioError if there are fewer samples than one frame.
    """
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"samples of shape {samples.shape}, expected [S]")
    if len(samples) < int(rate_hz * FRAME_S):
        what = f"{len(samples) / rate_hz:.4f} s is shorter than one frame"
        raise AudioError(what, expected=f"at least {FRAME_S} s of audio")
    return log_mel(samples, rate_hz, bins)


def log_mel(samples: np.ndarray, rate_hz: int, bins: int, *, edges: bool = True) -> np.ndarray:
    """Return `fbank` of at least one window of samples, float32 [S]. Without `edges`, only whole windows count."""
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
    """`fbank` of audio that is still arriving. `finish` ends one recording, and the next one can begin.

    The frames are those of `fbank`, however the samples are cut. A frame comes with the last sample of its window.
    """

    def __init__(self, rate_hz: int = 16000, bins: int = 80) -> None:
        self.rate_hz, self.bins = rate_hz, bins
        self.window, self.shift = int(rate_hz * FRAME_S), int(rate_hz * SHIFT_S)
        self.edge = self.window // 2 - self.shift // 2  # samples of the beginning that the first window mirrors
        self._begin()

    def _begin(self) -> None:
        self.samples = 0
        self.frames = 0
        self._waiting = np.empty(0, np.float32)  # samples from the next frame's window on

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take samples [n] in [-1, 1], and return the frames, float32 [m, bins], of the windows that are now full."""
        samples = np.asarray(samples, dtype=np.float32)
        before, self.samples = self.samples, self.samples + len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        if self.samples < self.window:
            return self._computed(0)
        if before < self.window:
            self._waiting = np.concatenate([self._waiting[: self.edge][::-1], self._waiting])
        full = max(0, (len(self._waiting) - self.window) // self.shift + 1)
        return self._computed(full)

    def finish(self) -> np.ndarray:
        """End the recording and return the frames of its last windows, float32 [m, bins]. There may be none."""
        left = (self.samples + self.shift // 2) // self.shift - self.frames
        if self.samples < self.window:
            left = 0
        elif left:
            self._waiting = np.concatenate([self._waiting, self._waiting[: -self.window : -1]])
        frames = self._computed(left)
        self._begin()
        return frames

    def _computed(self, count: int) -> np.ndarray:
        if not count:
            return np.empty((0, self.bins), np.float32)
        samples = self._waiting[: (count - 1) * self.shift + self.window]
        self._waiting = self._waiting[count * self.shift :]
        self.frames += count
        return log_mel(samples, self.rate_hz, self.bins, edges=False)

"""`fbank` of sound that is still arriving.

Invariant: the frames are those that `fbank` computes of the whole, however the samples were cut on their way, and a
frame comes as soon as the last sample of its window is there. Exercised by `stillhouse decode RUN -`.
"""

from __future__ import annotations

import numpy as np

from .fbank import FRAME_S, SHIFT_S, log_mel


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

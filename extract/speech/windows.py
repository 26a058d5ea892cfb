"""Windows over audio that is longer than an encoder takes: where they begin, and which of their frames are kept.

Guarantees: the kept frames of all windows are each frame of the audio once, in order. A frame comes from the window in
which the nearer of its two ends, if it is not an end of the audio, is farthest away.
Try: `pytest tests/extract/speech/test_windows.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AudioWindow:
    """Samples `start` to `stop` of the audio, of whose frames `first` to `last` are kept. `last` None: to the end."""

    start: int
    stop: int
    first: int
    last: int | None


def audio_windows(samples: int, most: int, overlap: int, stride: int) -> list[AudioWindow]:
    """Return the windows over `samples` samples.

    Arguments:
        most: the samples of the longest window.
        overlap: the samples that neighbours share, at least. Less than half of `most`.
        stride: samples between two frames. Windows begin at multiples of it, so that their frames fall on one grid.
    """
    if samples <= most:
        return [AudioWindow(0, samples, 0, None)]
    step = (most - overlap) // stride  # frames from one window to the next
    count = 1 + -(-(samples - most) // (step * stride))
    cut = step + (most // stride - step) // 2  # the middle of the overlap, in frames of a window
    windows = []
    for k in range(count):
        start = k * step * stride
        stop = min(samples, start + most)
        windows.append(AudioWindow(start, stop, 0 if k == 0 else cut - step, None if k == count - 1 else cut))
    return windows

"""How rows are computed from audio: Kaldi fbank here, and the states of a speech encoder in extract/speech/rows.py.

Guarantees: a row depends on its samples and on the settings alone.
Try: `stillhouse corpus features corpus.jsonl features.h5`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..audio.fbank import fbank
from ..errors import AudioError
from .settings import FeatureSettings


class FeatureMethod(Protocol):
    """What computes rows. Workers get a pickled copy.

    settings    what decides the numbers
    worker_s    seconds of audio that take as long as to start a worker process
    on_gpu      whether a GPU computes them
    """

    @property
    def settings(self) -> FeatureSettings: ...

    @property
    def worker_s(self) -> float: ...

    @property
    def on_gpu(self) -> bool: ...

    def rows(self, samples: np.ndarray, id: str) -> np.ndarray:
        """Return [T, bins] of samples float32 [S] in [-1, 1]. Raises AudioError if these samples have no rows."""
        ...

    def loudness(self, samples: np.ndarray) -> np.ndarray | None:
        """Return the `mean_energy` [F] of samples, or None if the rows are its log mel energies themselves."""
        ...


def mean_energy(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Return the mean log mel energy of each 10 ms, float32 [F], of samples [S]. Too few for fbank give F = 0."""
    try:
        return fbank(samples, rate_hz).mean(axis=1)
    except AudioError:
        return np.zeros(0, np.float32)


class FbankMethod:
    """Kaldi fbank."""

    worker_s, on_gpu = 900.0, False

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings

    def rows(self, samples: np.ndarray, id: str) -> np.ndarray:
        return fbank(samples, self.settings.rate_hz, self.settings.bins)

    def loudness(self, samples: np.ndarray) -> None:
        """The rows tell it."""
        return None

"""How rows are computed from audio: Kaldi fbank here, and the states of a speech encoder in extract/speech/rows.py.

Guarantees: a row depends on its samples and on the settings alone.
Try: `stillhouse corpus features corpus.jsonl features.h5`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..audio.fbank import fbank
from .file import FeatureSettings


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


class FbankMethod:
    """Kaldi fbank."""

    worker_s, on_gpu = 900.0, False

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings

    def rows(self, samples: np.ndarray, id: str) -> np.ndarray:
        return fbank(samples, self.settings.rate_hz, self.settings.bins)

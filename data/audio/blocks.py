"""Audio files of any length as blocks of mono samples at another rate.

Guarantees: the blocks joined are the samples of `read_audio`, to float rounding. Memory does not grow with the file.
Try: `stillhouse decode RUN talk.flac`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from pathlib import Path

import numpy as np
import soundfile

from ..errors import AudioError
from .read import mix, open_audio, resample

BLOCK_S = 10
BESIDE = 2000  # samples on both sides of a block that its resampling needs, at the lower rate


def read_blocks(path: Path, rate_hz: int) -> Iterator[np.ndarray]:
    """Yield the mean of all channels, float32 [n] in [-1, 1], at `rate_hz`.

    Raises AudioError if the file is missing or damaged, holds what is no number, or its channels cancel each other out.
    """
    with open_audio(path) as file:
        own_hz = file.samplerate
        step = own_hz // gcd(own_hz, rate_hz)  # Blocks of a multiple of it begin at a sample of the new rate.
        beside = -(-BESIDE * max(1, own_hz // rate_hz) // step) * step
        size = -(-int(BLOCK_S * own_hz) // step) * step
        before = np.empty(0, np.float32)
        now = _mono(file, path, size)
        while len(now):
            after = _mono(file, path, size) if len(now) == size else np.empty(0, np.float32)
            joined = np.concatenate([before, now, after[:beside]])
            begin = len(before) * rate_hz // own_hz
            end = -(-(len(before) + len(now)) * rate_hz // own_hz)
            yield resample(joined, own_hz, rate_hz)[begin:end]
            before, now = now[len(now) - beside :] if len(now) > beside else now, after


def _mono(file: soundfile.SoundFile, path: Path, count: int) -> np.ndarray:
    try:
        samples = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as e:
        raise AudioError(f"the audio is damaged: {getattr(e, 'error_string', e)}", where=path) from e
    if not np.isfinite(samples).all():
        raise AudioError("the audio holds samples that are not numbers", where=path)
    return samples[:, 0] if samples.shape[1] == 1 or not len(samples) else mix(samples, path)

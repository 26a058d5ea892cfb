"""Noise and reverberation for copies of utterances that a recogniser trains on.

Guarantees: a copy depends on the samples, its name and the recipe of the noise alone, so that any number of workers
makes the same copies. The speech stays where it is in time, and keeps its power under reverberation.
Try: `stillhouse corpus features corpus.jsonl features.h5 --noise musan/noise --rir rirs --snr 5-20 --copies 2`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..errors import AudioError, ConfigError
from .read import open_audio, read_segment, resample

TRIES = 10  # segments of noise to draw until one is not silent
SILENT = 1e-10  # power of a segment that has no sound: -100 dB of full scale


@dataclass(frozen=True)
class NoiseRecipe:
    """What noisy copies are made with.

    noise    files of noise, relative to the folder `noise_root`, in order
    rir      files of room impulse responses, relative to `rir_root`, in order
    snr_db   the lowest and the highest ratio of speech to noise, in dB
    copies   how many noisy copies an utterance has at each speed
    digest   a hash of the names and sizes of all files
    """

    noise_root: Path | None
    noise: tuple[str, ...]
    rir_root: Path | None
    rir: tuple[str, ...]
    snr_db: tuple[float, float]
    copies: int
    digest: str

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the numbers. More copies do not change those that are there."""
        return {"noises": len(self.noise), "rirs": len(self.rir), "snr_db": list(self.snr_db), "files": self.digest}

    def applied(self, samples: np.ndarray, rate_hz: int, name: str) -> np.ndarray:
        """Return a noisy copy of samples float32 [S]. `name` decides what is drawn.

        Raises AudioError if a file of noise cannot be read.
        """
        seed = int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        rng = np.random.default_rng(seed)
        if self.rir_root is not None:
            path = self.rir_root / self.rir[rng.integers(len(self.rir))]
            samples = reverberated(samples, _response(path, rate_hz))
        if self.noise_root is not None:
            noise = self._segment(rng, len(samples), rate_hz)
            samples = with_noise(samples, noise, rng.uniform(*self.snr_db))
        return samples

    def _segment(self, rng: np.random.Generator, count: int, rate_hz: int) -> np.ndarray:
        """Draw [count] samples of noise that are not silent. Noise that is too short repeats."""
        assert self.noise_root is not None
        for _ in range(TRIES):
            path = self.noise_root / self.noise[rng.integers(len(self.noise))]
            with open_audio(path) as file:
                length_s = file.frames / file.samplerate
            wanted_s = count / rate_hz
            start_s = rng.uniform(0, length_s - wanted_s) if length_s > wanted_s else 0.0
            noise, own_hz = read_segment(path, start_s, min(wanted_s, length_s), channel=0)
            noise = np.resize(resample(noise, own_hz, rate_hz), count)
            if np.square(noise, dtype=np.float64).mean() > SILENT:
                return noise
        what = f"{TRIES} segments of noise were silent, the last one in {path.name}"
        raise AudioError(what, where=self.noise_root, remedy="delete the silent files")


def find_noise(noise: Path | None, rir: Path | None, snr_db: tuple[float, float], copies: int) -> NoiseRecipe:
    """Return the recipe of all audio files below two folders, in the order of their paths.

    Raises ConfigError if a folder has none.
    """
    low, high = snr_db
    if not -50 <= low <= high <= 100:
        raise ConfigError(f"a ratio of speech to noise of {low:g} to {high:g} dB", expected="such as 5-20")
    files = [() if root is None else _audio_files(root) for root in (noise, rir)]
    sizes = [[os.path.getsize(root / name) for name in names] for root, names in zip((noise, rir), files) if root]
    digest = blake2b(json.dumps([files, sizes]).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return NoiseRecipe(noise, files[0], rir, files[1], (float(low), float(high)), copies, digest)


def with_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise [S] to samples [S], scaled so that their power is `snr_db` above that of the noise.

    Samples without any sound stay as they are, because no noise is so quiet.
    """
    power, own = (float(np.square(x, dtype=np.float64).mean()) for x in (samples, noise))
    return (samples + noise * np.sqrt(power / own / 10 ** (snr_db / 10))).astype(np.float32)


def reverberated(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve samples [S] with a room impulse response, keeping their number, times and power.

    The strongest sample of the response is the direct path, which arrives at once.
    """
    import torch
    from torchaudio.functional import fftconvolve

    direct = int(np.abs(response).argmax())
    wide = [torch.from_numpy(x.astype(np.float64)) for x in (samples, response)]
    wet = fftconvolve(*wide).numpy()[direct : direct + len(samples)]
    power, own = (float(np.square(x, dtype=np.float64).mean()) for x in (samples, wet))
    return (wet * np.sqrt(power / own) if own > 0 else wet).astype(np.float32)


@lru_cache(maxsize=64)
def _response(path: Path, rate_hz: int) -> np.ndarray:
    response, own_hz = read_segment(path, channel=0)
    if not np.square(response, dtype=np.float64).sum() > 0:
        raise AudioError("the room impulse response is silent", where=path, remedy="delete the file")
    return resample(response, own_hz, rate_hz)


def _audio_files(folder: Path) -> tuple[str, ...]:
    kinds = {f".{kind.lower()}" for kind in soundfile.available_formats()} | {".opus"}
    found: Sequence[Path] = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file())
    if not found:
        raise ConfigError("there is no audio below this folder", where=folder, expected="files such as wav or flac")
    return tuple(p.relative_to(folder).as_posix() for p in found)

"""Audio files in: any format that libsndfile reads, any rate, any number of channels, out as mono float32.

Invariant: a segment has round(duration · rate) samples at its own rate and ceil of that times the ratio after
resampling, or it is an AudioError that says what the file holds. Exercised by `stillhouse corpus features`.
"""

from __future__ import annotations

import os
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from ..errors import AudioError

# A manifest's times are often rounded to hundredths; half a frame past the end of the file is no reason to fail.
SLACK_S = 0.02


def open_audio(path: Path) -> soundfile.SoundFile:
    """Open an audio file; AudioError says whether it is missing, no file (a pipe would be waited for) or damaged."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise OSError("not a regular file")
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError) as e:
        if not os.path.exists(path):
            raise AudioError(
                "no such audio file", where=path, remedy="restore it, or run `stillhouse corpus check`"
            ) from e
        raise AudioError(
            f"not readable as audio: {getattr(e, 'error_string', e)}",
            where=path,
            expected="wav, flac, ogg, mp3, …",
        ) from e


def audio_length(path: Path | str) -> float:
    """Seconds of audio in a file, by its header."""
    with open_audio(Path(path)) as file:
        return file.frames / file.samplerate


def read_audio(
    path: Path | str,
    start_s: float = 0.0,
    duration_s: float | None = None,
    rate_hz: int = 16000,
    channel: int | None = None,
) -> np.ndarray:
    """A segment of a file as float32 [S] in [-1, 1], resampled to rate_hz: one channel, from 0, or the mean of all.

    Raises AudioError for a missing or damaged file and for a segment that the file does not have.
    """
    samples, own_hz = read_segment(path, start_s, duration_s, channel)
    return resample(samples, own_hz, rate_hz)


def read_segment(
    path: Path | str, start_s: float = 0.0, duration_s: float | None = None, channel: int | None = None
) -> tuple[np.ndarray, int]:
    """As read_audio, at the rate of the file: (float32 [S], its rate in Hz)."""
    path = Path(path)
    with open_audio(path) as file:
        own_hz, total = file.samplerate, file.frames
        if channel is not None and channel >= file.channels:
            raise no_such_channel(channel, file.channels, path)
        begin = round(start_s * own_hz)
        count = total - begin if duration_s is None else round(duration_s * own_hz)
        if begin + count > total or begin >= total > 0:
            if begin + count - total > SLACK_S * own_hz or begin >= total:
                end = "end" if duration_s is None else f"{start_s + duration_s:.3f} s"
                raise AudioError(
                    f"the segment from {start_s:.3f} s to {end} leaves the audio",
                    where=path,
                    expected=f"at most {total / own_hz:.3f} s",
                    remedy="mend start_s and duration_s in the manifest",
                )
            count = total - begin
        if count <= 0:
            raise AudioError("the audio is empty", where=path, remedy="take the utterance out of the manifest")
        try:
            file.seek(begin)
            samples = file.read(count, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as e:
            raise AudioError(f"the audio is damaged: {getattr(e, 'error_string', e)}", where=path) from e
        except MemoryError as e:
            raise AudioError(f"its header claims {total} samples, too many to hold", where=path) from e
    if len(samples) != count:
        raise AudioError(
            f"the audio ends early: {len(samples)} of {count} samples",
            where=path,
            remedy="fetch the file again",
        )
    if channel is None and samples.shape[1] > 1:
        mono = samples.mean(axis=1, dtype=np.float32)
    else:
        mono = samples[:, channel or 0]
    if not np.isfinite(mono).all():
        raise AudioError("the audio holds samples that are not numbers", where=path)
    return np.ascontiguousarray(mono), own_hz


def no_such_channel(channel: int, channels: int, where: object) -> AudioError:
    return AudioError(
        f"no channel {channel}: the audio has {channels}",
        where=where,
        expected="a channel counted from 0",
        remedy="mend the channel in the manifest",
    )


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """float32 [S] -> float32 [ceil(S · to_hz / from_hz)], by torchaudio's windowed sinc.

    Width 6 and a cut-off at 0.99 of the lower Nyquist frequency: torchaudio's defaults, and what sherpa-onnx uses.
    """
    return _filtered(samples, Fraction(from_hz, to_hz))


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """float32 [S] -> float32 [ceil(S / speed)]: played `speed` times as fast, pitch and all, at the same rate.

    The same filter, with speed as the exact fraction that its decimals say: 0.9 has ten phases. Apart from `resample`,
    which is then done once for all speeds: in one step, 22,050 Hz at 0.95 would need 6,400 phases of 8,391 taps.
    """
    return _filtered(samples, Fraction(str(speed)))


def _filtered(samples: np.ndarray, ratio: Fraction) -> np.ndarray:
    if ratio <= 0:
        raise ValueError(f"a ratio of {ratio}")
    if ratio == 1:
        return samples
    import torch

    with torch.inference_mode():
        return _resampler(ratio.numerator, ratio.denominator)(torch.from_numpy(samples)).numpy()


@lru_cache(maxsize=32)
def _resampler(orig: int, new: int):
    import torchaudio.transforms

    return torchaudio.transforms.Resample(orig, new)

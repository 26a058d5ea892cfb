"""Audio files as mono float32: any format that libsndfile reads, any rate, any number of channels.

Guarantees: a segment has round(duration · rate) samples at its own rate, and ceil of that times the ratio after
resampling. Otherwise it is an AudioError.
Try: `stillhouse corpus features corpus.jsonl features.h5`.
"""

from __future__ import annotations

import os
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from ..errors import AudioError
from .whole import REMEDY, SLACK_S, flaw_of

# Channels whose mean has less of their power cancel each other out: 40 dB, far below what microphones apart lose.
CANCELLED = 1e-4
# A frame of MP3 borrows bits from those before it, so the first frames after a jump are not decoded correctly.
MP3_EARLIER = 12 * 1152


def open_audio(path: Path) -> soundfile.SoundFile:
    """Open an audio file. Raises AudioError if it is missing, damaged or not a regular file, such as a pipe."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise OSError("not a regular file")
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError) as e:
        if not os.path.exists(path):
            remedy = "restore it, or run `stillhouse corpus check`"
            raise AudioError("no such audio file", where=path, remedy=remedy) from e
        what = f"not readable as audio: {getattr(e, 'error_string', e)}"
        raise AudioError(what, where=path, expected="wav, flac, ogg, mp3, …") from e
    if file.frames > 1 << 48:  # libsndfile's word for a FLAC that a program wrote to a pipe
        file.close()
        what = "its header does not state its length"
        raise AudioError(what, where=path, remedy=REMEDY)
    return file


def read_audio(
    path: Path | str,
    start_s: float = 0.0,
    duration_s: float | None = None,
    rate_hz: int = 16000,
    channel: int | None = None,
) -> np.ndarray:
    """Return a segment of a file as float32 [S] in [-1, 1], resampled to `rate_hz`.

    A duration of None reaches to the end, and a channel of None is the mean of all channels, which count from 0. Raises
    AudioError if the file is missing or damaged, or does not hold the segment, or if the segment ends where the file is
    cut off.
    """
    samples, own_hz = read_segment(path, start_s, duration_s, channel)
    return resample(samples, own_hz, rate_hz)


def read_segment(
    path: Path | str,
    start_s: float = 0.0,
    duration_s: float | None = None,
    channel: int | None = None,
    *,
    whole: bool = True,
) -> tuple[np.ndarray, int]:
    """Return (float32 [S], rate in Hz) of a segment at the rate of the file. See `read_audio` and `read_channels`."""
    samples, own_hz = read_channels(path, start_s, duration_s, channel, whole=whole)
    mono = samples[:, 0] if channel is not None or samples.shape[1] == 1 else mix(samples, path)
    if not np.isfinite(mono).all():
        raise AudioError("the audio holds samples that are not numbers", where=path)
    return np.ascontiguousarray(mono), own_hz


def mix(samples: np.ndarray, where: object) -> np.ndarray:
    """Return the mean of all channels: float32 [S, C] -> [S]. Raises AudioError if they cancel each other out."""
    mono = samples.mean(axis=1, dtype=np.float32)
    if np.square(mono).mean() < CANCELLED * np.square(samples).mean():
        what = "the mean of its channels is silence, because they cancel each other out"
        raise AudioError(what, where=where, remedy="set `channel` in the manifest")
    return mono


def read_channels(
    path: Path | str,
    start_s: float = 0.0,
    duration_s: float | None = None,
    channel: int | None = None,
    *,
    whole: bool = True,
) -> tuple[np.ndarray, int]:
    """Return (float32 [S, channels], rate in Hz) of a segment: of one `channel`, or of all.

    Without `whole`, a segment may end where the file is cut off. See `read_audio`.
    """
    path = Path(path)
    with open_audio(path) as file:
        own_hz = file.samplerate
        begin, count = segment_of(file, path, start_s, duration_s, channel, whole=whole)
        try:
            early = min(begin, MP3_EARLIER) if file.format == "MP3" else 0
            file.seek(begin - early)
            samples = file.read(early + count, dtype="float32", always_2d=True)[early:]
        except (soundfile.SoundFileError, RuntimeError) as e:
            raise AudioError(f"the audio is damaged: {getattr(e, 'error_string', e)}", where=path) from e
        except MemoryError as e:
            raise AudioError(f"its header claims {file.frames} samples, too many to hold", where=path) from e
    if len(samples) != count:
        what = f"the audio ends early: {len(samples)} of {count} samples"
        raise AudioError(what, where=path, remedy="restore the file")
    return samples if channel is None else samples[:, channel, None], own_hz


def segment_of(
    file: soundfile.SoundFile,
    path: Path,
    start_s: float,
    duration_s: float | None,
    channel: int | None,
    *,
    whole: bool = True,
    scan: bool = True,
) -> tuple[int, int]:
    """Return (first sample, number of samples) of a segment of an open file, which is as long as its header says.

    Raises AudioError as `read_channels`. `scan` is that of `flaw_of`.
    """
    own_hz, total = file.samplerate, file.frames
    if channel is not None and channel >= file.channels:
        raise no_such_channel(channel, file.channels, path)
    begin = round(start_s * own_hz)
    count = total - begin if duration_s is None else round(duration_s * own_hz)
    if begin + count > total or begin >= total > 0:
        if begin + count - total > SLACK_S * own_hz or begin >= total:
            end = "end" if duration_s is None else f"{start_s + duration_s:.3f} s"
            what = f"the segment from {start_s:.3f} s to {end} leaves the audio"
            remedy = "correct start_s and duration_s in the manifest"
            if flaw := flaw_of(path, file, scan=scan):
                what, remedy = f"{what}: {flaw}", REMEDY
            raise AudioError(what, where=path, expected=f"at most {total / own_hz:.3f} s", remedy=remedy)
        count = total - begin
    if whole and begin + count > total - SLACK_S * own_hz and (flaw := flaw_of(path, file, scan=scan)):
        raise AudioError(flaw, where=path, remedy=REMEDY)
    if count <= 0:
        raise AudioError("the audio is empty", where=path, remedy="delete the utterance from the manifest")
    return begin, count


def no_such_channel(channel: int, channels: int, where: object) -> AudioError:
    """Return the error of a channel that a file does not have."""
    what, expected = f"no channel {channel}: the audio has {channels}", "a channel counted from 0"
    return AudioError(what, where=where, expected=expected, remedy="correct the channel in the manifest")


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Return samples at another rate: float32 [S] -> float32 [ceil(S · to_hz / from_hz)].

    The filter is torchaudio's windowed sinc with its defaults, which sherpa-onnx uses too: width 6, and a cut-off at
    0.99 of the lower Nyquist frequency.
    """
    return _filtered(samples, Fraction(from_hz, to_hz))


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Return samples played `speed` times as fast, with another pitch: float32 [S] -> float32 [ceil(S / speed)].

    The filter is that of `resample`, with the speed as an exact fraction of its decimals: 0.9 has ten phases. Both are
    separate steps, because one step for 22,050 Hz at 0.95 would need 6,400 phases of 8,391 taps. `resample` is also
    done once for all speeds.
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

"""Findings about the sound of a corpus: files, segments, rates, channels and silence.

Guarantees: each file is opened once for an utterance, and what it lacks of its promise is one finding.
Try: `stillhouse corpus check corpus.jsonl --full`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from ..audio.read import no_such_channel, open_audio, read_channels
from ..audio.whole import REMEDY, SLACK_S, flaw_of
from ..errors import AudioError
from ..manifest import Utterance

RESTORE = "restore the file or delete the line"
SET_CHANNEL = "set `channel` in the manifest, or import the corpus again with the sides of its calls"
QUIET = 0.01  # the power of the mean of all channels, below which they cancel each other out, in those of the channels
BLOCK_S = 0.05
ALIKE = 0.3  # the correlation of the loudness of two channels, below which they are not one recording
# The share of the power in the upper three tenths of the band, below which they are empty. Read speech at 16 kHz has at
# least 2e-4 there. The same speech, brought from 8 to 16 kHz by `resample`, has at most 3e-7.
EMPTY = 1e-5
LOUDEST = 16.0  # samples of float files, whose full scale is 1. No gain of a recording is so far above it.
LONGEST = 1 << 20  # samples of which a spectrum is computed
# (kind, what, remedy)
Problem = tuple[str, str, str]


class SoundCheck:
    """The checks of audio. With `full`, all samples are decoded."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.files: dict[str, tuple[int, str, str]] = {}  # {file: (rate in Hz, place, id) of its first utterance}
        self.rates: Counter[int] = Counter()
        self._mixed: Counter[str] = Counter()
        self._sides: list[str] = []
        self._narrow: list[str] = []

    def utterance(self, path: Path, where: str, u: Utterance) -> Iterator[Problem]:
        """Yield what is wrong with the audio of an utterance. What is wrong with a file is yielded once."""
        flaw: str | None = None
        try:
            with open_audio(path) as file:
                own_hz, total = file.samplerate, file.frames
                first = str(path) not in self.files
                if first:
                    self.files[str(path)] = own_hz, where, u.id
                    self.rates[own_hz] += 1
                flaw = flaw_of(path, file, scan=self.full) if first else None
                if flaw is not None:
                    yield "audio", f"{path}: {flaw}", REMEDY
                if total == 0:
                    raise AudioError("it holds no audio", remedy=RESTORE)
                if u.channel is not None and u.channel >= file.channels:
                    raise no_such_channel(u.channel, file.channels, path)
                if u.channel is None and file.channels > 1:
                    self._mixed[str(path)] += 1
                begin = round(u.start_s * own_hz)
                end = total if u.duration_s is None else begin + round(u.duration_s * own_hz)
                if begin >= total or end > total + SLACK_S * own_hz:
                    segment = f"{begin / own_hz:.3f}–{end / own_hz:.3f} s"
                    what = f"the segment {segment} is not inside {path}, which has {total / own_hz:.3f} s"
                    yield "segment", what, "correct start_s and duration_s"
                    return
                if not self.full:
                    end = min(total, end)
                    tail = max(end - int(0.1 * own_hz), begin)
                    file.seek(tail)
                    if len(file.read(end - tail, dtype="float32")) != end - tail:
                        raise AudioError("the audio ends early", where=path)
            if self.full:
                samples, _ = read_channels(path, u.start_s, u.duration_s, u.channel, whole=False)
                yield from _sound(samples, path)
                if samples.shape[1] == 2 and (alike := _alikeness(samples, own_hz)) is not None and alike < ALIKE:
                    self._sides.append(u.id)
                if _has_empty_band(samples):
                    self._narrow.append(u.id)
        except AudioError as e:
            if flaw is not None:
                return  # That the file is cut off says why it cannot be read.
            yield "audio" if os.path.exists(path) else "missing", f"{path}: {e.what}", e.remedy or RESTORE
        except (soundfile.SoundFileError, RuntimeError) as e:
            if flaw is not None:
                return
            yield "audio", f"{path}: the audio is damaged: {getattr(e, 'error_string', e)}", RESTORE

    def other_rates(self, expected: int | None) -> Iterator[tuple[str, str, str, str]]:
        """Yield (place, id, what, remedy) of every file whose rate is not the expected one, or that of most files."""
        if expected is None and self.rates:
            expected = self.rates.most_common(1)[0][0]
        for file, (hz, where, id) in self.files.items():
            if expected is not None and hz != expected:
                others = f"{self.rates[expected]} others have" if expected in self.rates else "expected"
                lower = min(hz, expected)
                remedy = f"delete it if it does not belong here, or use `corpus features --rate {lower}` for all files"
                yield where, id, f"{file} has {hz} Hz, {others} {expected}", remedy

    def notes(self) -> list[str]:
        """Return what is no error but decides what is trained on: mixed rates, and channels that are mixed."""
        notes = []
        if len(self.rates) > 1:
            counts = ", ".join(f"{hz} Hz in {n} files" for hz, n in sorted(self.rates.items()))
            notes.append(f"rates: {counts}. `corpus features --rate {min(self.rates)}` makes all of them alike")
        if self._mixed:
            files, uses = len(self._mixed), sum(self._mixed.values())
            notes.append(
                f"{uses} utterances of {files} files with several channels, for example {next(iter(self._mixed))}, "
                f"are the mean of all channels. If the channels are speakers, {SET_CHANNEL}"
            )
        if self._narrow:
            notes.append(
                f"{len(self._narrow)} utterances, for example {self._narrow[0]}, have next to nothing in the "
                "upper band, like audio that was upsampled. Compute features at its first rate (--rate)"
            )
        if self._sides:
            notes.append(
                f"{len(self._sides)} utterances, for example {self._sides[0]}, are the mean of two channels that are "
                f"not one recording, as in a call with a speaker on each side: {SET_CHANNEL}"
            )
        return notes


def _sound(samples: np.ndarray, path: Path) -> Iterator[Problem]:
    """Yield what is wrong with the samples of a segment, float32 [S, channels]. Several channels will be mixed."""
    if not np.isfinite(samples).all():
        yield "audio", f"{path}: the audio holds samples that are not numbers", RESTORE
    elif (peak := float(np.abs(samples).max())) > LOUDEST:
        what = (
            f"{path}: its samples reach {peak:g}, where full scale is 1, as if they were written without being scaled"
        )
        yield "audio", what, "write the file again with samples from -1 to 1"
    elif (samples == samples[0]).all():
        value = "0" if not samples.any() else f"{samples[0, 0]:g}"
        yield "silence", f"{path}: all samples of the segment are {value}", "restore the recording or delete the line"
    elif samples.shape[1] > 1:
        power = float(np.square(samples, dtype=np.float64).mean())
        mixed = float(np.square(samples.mean(axis=1), dtype=np.float64).mean())
        if mixed < QUIET * power:
            level = "silence" if not mixed else f"{10 * np.log10(mixed / power):.0f} dB below them"
            yield "antiphase", f"{path}: the mean of its channels is {level}: they cancel each other out", SET_CHANNEL


def _has_empty_band(samples: np.ndarray) -> bool:
    """Return whether the upper part of the spectrum has next to no power, as after a doubling of the rate."""
    if not np.isfinite(samples).all():
        return False  # A finding says so.
    spectrum = np.square(np.abs(np.fft.rfft(samples[:LONGEST].mean(axis=1))))
    power = float(spectrum[1:].sum())
    return len(spectrum) > 1000 and float(spectrum[len(spectrum) * 7 // 10 :].sum()) < EMPTY * power


def _alikeness(samples: np.ndarray, rate_hz: int) -> float | None:
    """Return the correlation of the loudness of two channels over time. None: it does not change in both.

    Microphones apart hear one speaker with a delay, which is short beside a block.
    """
    block = round(BLOCK_S * rate_hz)
    count = len(samples) // block
    if count < 1 / BLOCK_S:
        return None
    blocks = samples[: count * block].reshape(count, block, 2)
    loudness = 10 * np.log10(np.square(blocks, dtype=np.float64).mean(axis=1) + 1e-9)
    return None if (loudness.std(axis=0) < 3).any() else float(np.corrcoef(loudness.T)[0, 1])

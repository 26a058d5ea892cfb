"""Times of words, from the frames of their units and from where the audio is quiet.

A transducer names a unit in one frame, which says neither when its sound begins nor when it ends. Between two words,
the boundary therefore lies between the last unit of the one and the first unit of the other: at the ends of a silence
if there is one there, and otherwise at a point that divides the distance as the two units share their characters.

Guarantees: words are in order, inside the audio, without overlaps, and none of them lasts 0 s.
Try: `stillhouse align RUN CORPUS FEATURES --split test`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FRAME_S = 0.01  # duration of one feature frame
QUIET = 0.35  # A frame is quiet below this part of the way from the utterance's quietest to its loud frames.
SILENCE = 6  # Shorter quiet stretches are closures of stops, in frames.
NEAR = 6  # A silence this many frames beside the two units of a boundary still belongs to it.
REACH = 10  # A word goes at most this many frames beyond its outer units if no silence bounds it.
LEAST = 3.0  # frames of a word, unless there are too many words
MEASURED = 5  # utterances that a delay needs to be measured, at least


@dataclass(frozen=True)
class Spoken:
    """When the units at both ends of a word are emitted, in feature frames, and their numbers of characters."""

    first: float
    last: float
    first_size: int = 1
    last_size: int = 1


def loudness(features: np.ndarray) -> np.ndarray:
    """Return the mean log mel energy of each frame, float32 [F], of fbank [F, bins]."""
    return np.asarray(features, np.float32).mean(axis=1)


def silences(loud: np.ndarray) -> np.ndarray:
    """Return the first frame of each silence and the frame after it, int64 [S, 2], of the loudness [F] of an utterance.

    At both ends of the audio, a quiet stretch of any length is a silence.
    """
    smooth = np.convolve(np.pad(loud, 1, mode="edge"), np.full(3, 1 / 3), mode="valid")
    low, high = np.percentile(smooth, [1, 90])
    edges = np.diff(np.r_[0, (smooth < low + QUIET * (high - low)).astype(np.int64), 0])
    begin, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    keep = (end - begin >= SILENCE) | (begin == 0) | (end == len(loud))
    return np.stack([begin[keep], end[keep]], axis=1)


def word_times(words: Sequence[Spoken], loud: np.ndarray, delay: float = 0.0) -> np.ndarray:
    """Return the start and the end of each word in feature frames, float64 [W, 2].

    The model emits units `delay` frames after their sound, in an utterance of loudness [F], F >= 1. Times are whole
    frames unless there are more words than frames for them.
    """
    count, frames = len(words), len(loud)
    if not count:
        return np.zeros((0, 2))
    quiet = silences(loud)
    first, last = (np.array([getattr(w, name) for w in words]) - delay for name in ("first", "last"))
    times = np.zeros((count, 2))
    begins = quiet[(quiet[:, 0] < first[0] + NEAR) & (quiet[:, 1] < last[0] + NEAR), 1]
    times[0, 0] = begins[-1] if len(begins) else first[0] - REACH
    ends = quiet[(quiet[:, 1] > last[-1] - NEAR) & (quiet[:, 0] > first[-1] - NEAR), 0]
    times[-1, 1] = ends[0] if len(ends) else last[-1] + REACH
    for k in range(1, count):
        near = quiet[(quiet[:, 0] < first[k] + NEAR) & (quiet[:, 1] > last[k - 1] - NEAR)]
        near = near[(near[:, 0] > first[k - 1] - NEAR) & (near[:, 1] < last[k] + NEAR)]
        if len(near):
            times[k - 1, 1], times[k, 0] = near[(near[:, 1] - near[:, 0]).argmax()]
        else:
            share = words[k - 1].last_size / (words[k - 1].last_size + words[k].first_size)
            times[k - 1, 1] = times[k, 0] = last[k - 1] + share * (first[k] - last[k - 1])
    # Each word gets so much at least: without the frames of the words before them, bounds must not fall.
    least = min(LEAST, frames / count)
    before = least * (np.arange(count)[:, None] + np.array([0, 1]))
    free = np.maximum.accumulate((np.round(times) - before).ravel())
    return np.clip(free, 0, frames - least * count).reshape(count, 2) + before


def measured_delay(utterances: Sequence[tuple[float, int, int, np.ndarray]]) -> float | None:
    """Return how many frames after its sound a model emits a unit, or None if there are too few utterances.

    It is the median over utterances: the frame of the first unit, minus the end of the silence before it, minus half
    of what the unit's characters last. An utterance has the first unit's frame, its number of characters, the number
    of all characters, and the loudness.
    """
    delays = []
    for frame, size, characters, loud in utterances:
        quiet = silences(loud)
        onset = quiet[0, 1] if len(quiet) and quiet[0, 0] == 0 else 0
        spoken = len(loud) - (quiet[:, 1] - quiet[:, 0]).sum()
        delays.append(frame - onset - spoken * size / characters / 2)
    return max(0.0, float(np.median(delays))) if len(delays) >= MEASURED else None

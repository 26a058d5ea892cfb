"""Times of words, from the frames of their units and from where the audio is quiet.

A transducer names a unit in one frame, which says neither when its sound begins nor when it ends. Two words are
therefore divided by the silence between the last unit of the one and the first unit of the other. If there is none,
they are divided shortly before the first unit of the second word.

Guarantees: words are in order, inside the audio, without overlaps, and none of them lasts 0 s.
Try: `stillhouse align RUN CORPUS FEATURES --split test`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FRAME_S = 0.01  # duration of a frame of fbank. All numbers of frames in this file are of this duration.
QUIET = 0.35  # A frame is quiet below this part of the way from the utterance's quietest to its loud frames.
SILENCE = 6  # Shorter quiet stretches are closures of stops, in frames.
NEAR = 6  # A silence this many frames beside the two units of a boundary still belongs to it.
REACH = 10  # A word goes at most this many frames beyond its outer units if no silence bounds it.
LEAD = 2.5  # In running speech, a word begins this many frames earlier before its first unit than after a silence.
LEAST = 3.0  # frames of a word, unless there are too many words
PAUSE = 10  # frames of a silence that the delay is measured at
PAUSES = 20  # pauses that a delay needs to be measured, at least
LATEST = 60  # the largest delay in frames
WIDTH = 8  # Words this many frames beside a delay do not speak for it.


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


def word_times(first: np.ndarray, last: np.ndarray, loud: np.ndarray, delay: float = 0.0) -> np.ndarray:
    """Return the start and the end of each word in feature frames, float64 [W, 2].

    The first and the last unit of each word are emitted in feature frames first [W] and last [W], `delay` frames after
    their sound, in an utterance of loudness [F], F >= 1. Times are whole frames unless there are more words than frames
    for them.
    """
    count, frames = len(first), len(loud)
    if not count:
        return np.zeros((0, 2))
    quiet = silences(loud)
    first, last = first - delay, last - delay
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
            times[k - 1, 1] = times[k, 0] = max(last[k - 1], first[k] - LEAD)
    # Each word gets so much at least: without the frames of the words before them, bounds must not fall.
    least = min(LEAST, frames / count)
    before = least * (np.arange(count)[:, None] + np.array([0, 1]))
    free = np.maximum.accumulate((np.round(times) - before).ravel())
    return np.clip(free, 0, frames - least * count).reshape(count, 2) + before


def measured_delay(utterances: Sequence[tuple[np.ndarray, np.ndarray]]) -> int | None:
    """Return how many frames after its sound a model emits a unit, or None if there are fewer than PAUSES pauses.

    An utterance has the frame of each word's first unit [W] and the loudness [F]. The result is the delay, from 0 to
    LATEST, that most often leads from the end of a pause to a word.
    """
    delays = np.arange(LATEST + 1)
    score, pauses = np.zeros(len(delays)), 0
    for first, loud in utterances:
        for begin, end in silences(loud):
            if end - begin >= PAUSE and end < len(loud) and len(first):
                pauses += 1
                score += (1 - np.abs(first[:, None] - end - delays) / WIDTH).max(axis=0).clip(0)
    return int(score.argmax()) if pauses >= PAUSES else None

"""Times: from the frames of a speech teacher to the encoder states of a student.

A state and a frame each cover a stretch of the original audio, of the length of their own period, around their middle.
Stretches in microseconds overlap like the spans of characters, so `spans.overlaps` serves both. A student that hears
audio at speed s hears at its time t what lies at t * s in the original, where the teacher's frames are.
Guarantees: whole microseconds, so neighbours share a border and nothing is counted twice. What is drawn for an
utterance depends on its id, the seed and the step alone, and not on its batch or on the number of ranks.
Try: `pytest tests/distill/test_frames.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..extract.store import hash_text
from .controls import scatter
from .spans import places

NEIGHBOURS = 2  # frames on each side that are no contrast of a frame, because they hear much of the same audio
SLACK = 3  # frames of the teacher and of the features by which their durations may differ
_US = 1e6
_FRAME_BITS = 24  # of a key: more frames than the longest audio has


@dataclass(frozen=True)
class StudentTimes:
    """When the encoder states of a student are, in seconds of the audio that it hears.

    A state is made of `rows` rows of features, of which there are `row_hz` in a second. The first row begins at
    `start_s`, and the middle of what the subsampling sees for state 0 is `shift` rows after the middle of row 0.
    """

    rows: int
    row_hz: float = 100.0
    start_s: float = 0.0
    shift: int = 0

    @property
    def hz(self) -> float:
        """The states in a second."""
        return self.row_hz / self.rows

    @property
    def middle_s(self) -> float:
        """The time of the middle of state 0."""
        return self.start_s + (self.shift + 0.5) / self.row_hz

    def states(self, lengths: np.ndarray) -> np.ndarray:
        """Return the numbers of states int64 [B] of utterances of `lengths` rows."""
        return -(-np.asarray(lengths, np.int64) // self.rows)

    def durations(self, lengths: np.ndarray, speeds: np.ndarray) -> np.ndarray:
        """Return the seconds of original audio that the rows of features reach to, float64 [B]."""
        return (self.start_s + lengths / self.row_hz) * speeds


def stretches(index: np.ndarray, middle_s: float, hz: float, speed: np.ndarray | float = 1.0) -> np.ndarray:
    """Return where items lie in the original audio, in microseconds: int64 [N, 2].

    Arguments:
        index: int [N], the numbers of states or frames, of which item 0 has its middle at `middle_s`.
        hz: items in a second of the audio at `speed`, a number or [N].
    """
    border = middle_s + (index[:, None] + np.array([-0.5, 0.5])) / hz
    return np.rint(border * np.broadcast_to(speed, index.shape)[:, None] * _US).astype(np.int64)


def drawn(counts: np.ndarray, share: float, ids: Sequence[str], seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a share of each utterance's items, evenly spaced from a random one on.

    Returns:
        The numbers of the items, packed and ascending in each utterance, int64 [Σn], and how many each has, int64 [B].
    """
    counts = np.asarray(counts, np.int64)
    if share >= 1:
        return places(counts)[1], counts
    with np.errstate(over="ignore"):
        of_step = scatter(np.array([seed], np.uint64) + scatter(np.array([step], np.uint64)))
        draw = scatter(np.array([hash_text(i) for i in ids], np.uint64) ^ of_step)
    first = draw / 2.0**64
    most = np.ceil(counts * share).astype(np.int64)
    of, number = places(most)
    index = np.floor((number + first[of]) / share).astype(np.int64)
    inside = index < counts[of]
    return index[inside], np.bincount(of[inside], minlength=len(counts)).astype(np.int64)


def frame_keys(ids: Sequence[str], lengths: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return a key of each item, int64 [Σn]: keys of one utterance differ as the `index` does, of others by far more.

    Arguments:
        ids, lengths: the utterances and how many of the packed items [Σn] each has.
    """
    own = np.array([hash_text(i) >> (_FRAME_BITS + 1) << _FRAME_BITS for i in ids], np.int64)
    return np.repeat(own, lengths) + index


def reach(student_hz: float, teacher_hz: float) -> int:
    """Return how far apart the keys of states may be whose targets are NEIGHBOURS frames or fewer apart."""
    states = math.ceil(round(max(1.0, student_hz / teacher_hz), 6))  # states within one frame
    return (NEIGHBOURS + 1) * states - 1


def on_one_axis(spans: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both, moved by one number so that none begins before 0, as `overlaps` needs it."""
    least = min(spans[:, 0].min(initial=0), others[:, 0].min(initial=0))
    return spans - least, others - least

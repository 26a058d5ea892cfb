"""Frames of speech teachers: when they are, which one is at a time, and what was said in their utterance.

Guarantees: a frame covers one period of its teacher's rate around its middle, clipped at the beginning of the audio.
Try: `stillhouse inspect show STORE UTT`, `stillhouse inspect neighbours STORE UTT@1.25`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import NoStoreError, UsageError
from ..store import Store, View
from ..store.format.plan import TeacherRecord


@dataclass(frozen=True)
class FrameFacts:
    begin_s: float  # in the utterance's own audio
    end_s: float


def is_speech(store: Store, teacher: str) -> bool:
    """Return whether a teacher has frames of audio and no tokens."""
    return store.plan.teachers[teacher].is_speech


def middles(record: TeacherRecord, frames: np.ndarray | int) -> np.ndarray:
    """Return the times of the middles of frames, given by number, in seconds."""
    return record.offset_s + np.asarray(frames) / record.rate_hz


def spans(record: TeacherRecord, frames: np.ndarray | int) -> np.ndarray:
    """Return when frames begin and end, in seconds: float64 [..., 2]."""
    borders = middles(record, frames)[..., None] + np.array([-0.5, 0.5]) / record.rate_hz
    return np.maximum(borders, 0.0).round(6)


def frames_at(record: TeacherRecord, seconds: np.ndarray | float) -> np.ndarray:
    """Return the numbers of the frames over some times, int64. Before the first frame's beginning they are negative."""
    return np.floor((np.asarray(seconds) - record.offset_s) * record.rate_hz + 0.5).astype(np.int64)


def count_frames(store: Store, utterance: str, teacher: str) -> int:
    """Return how many frames an utterance has."""
    return int(store.row_lengths(teacher, store.rows([utterance], teacher))[0])


def frames_of(store: Store, utterance: str, teacher: str) -> list[FrameFacts]:
    """Return when each frame of an utterance is."""
    times = spans(store.plan.teachers[teacher], np.arange(count_frames(store, utterance, teacher)))
    return [FrameFacts(begin, end) for begin, end in times.tolist()]


def find_frame(store: Store, utterance: str, teacher: str, seconds: float) -> int:
    """Return the number of the frame at a time. Raises NoStoreError if the audio's frames end before it."""
    count, record = count_frames(store, utterance, teacher), store.plan.teachers[teacher]
    if not count:
        raise NoStoreError("it has no frames, because it has no audio or too little", where=utterance)
    frame, last = max(0, int(frames_at(record, seconds))), float(spans(record, count - 1)[1])
    if frame >= count:
        raise NoStoreError(f"no frame at {seconds:g} s", where=utterance, expected=f"a time before {last:.3f} s")
    return frame


def one_axis(store: Store, views: Sequence[View]) -> bool:
    """Return whether views are of speech teachers. Raises UsageError if only some are."""
    kinds = {is_speech(store, v.teacher) for v in views}
    if len(kinds) > 1:
        what = "text teachers have tokens and speech teachers have frames, and no store says which belong together"
        names = ", ".join(dict.fromkeys(v.teacher for v in views))
        raise UsageError(what, where=names, remedy="name views of one kind of teacher")
    return kinds == {True}

"""Forced alignment: the best frames against all there are, words by hand, the files' forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stillhouse.train.decode.align import Alignment, best_frames, emission_frames
from stillhouse.train.decode.emissions import Word, words_of
from stillhouse.train.decode.times import measured_delay
from stillhouse.train.decode.write import ctm_lines, textgrid


@pytest.mark.parametrize("U, T", [(1, 1), (1, 5), (3, 4), (4, 3), (4, 6)])
def test_best_frames_are_the_best_of_all(U, T):
    occupancy = np.random.default_rng(U * 10 + T).random((U, T))
    frames = best_frames(occupancy)
    assert (np.diff(frames) >= 0).all()
    best = max(
        sum(occupancy[u, t] for u, t in enumerate(path))
        for path in itertools.combinations_with_replacement(range(T), U)
    )
    assert occupancy[np.arange(U), frames].sum() == pytest.approx(best)


def sound(*parts: tuple[int, int]) -> np.ndarray:
    """Loudness of parts (frames, level)."""
    return np.concatenate([np.full(frames, level, np.float32) for frames, level in parts])


def bounds(words: list[Word]) -> list[tuple[str, float, float]]:
    return [(w.text, round(w.start_s, 4), round(w.end_s, 4)) for w in words]


def test_words_by_hand():
    # "Oh,  a cat": units _o h | _ (alone) | _a | _c at ; the comma has no unit
    text = "Oh,  a cat"
    spans = np.array([[0, 1], [1, 2], [3, 4], [4, 6], [6, 8], [8, 10]])
    frames, confidence = np.array([14, 22, 40, 45, 52, 70]), np.array([0.5, 0.7, 0.9, 0.4, 1.0, 0.8])
    loud = sound((10, -10), (20, 0), (12, -10), (43, 0), (5, -10))
    words = words_of(text, spans, frames, confidence, loud)
    # The silence from 0.30 to 0.42 s divides "Oh," from "a". Nothing divides "a" from "cat", so its first unit does.
    assert bounds(words) == [("Oh,", 0.1, 0.3), ("a", 0.42, 0.5), ("cat", 0.5, 0.85)]
    assert [round(w.confidence, 3) for w in words] == [0.6, 0.4, 0.9]
    later = words_of(text, spans, frames + 25, confidence, loud, 0.25)
    assert bounds(later) == bounds(words)


def test_a_closure_is_no_silence():
    # The closure of a stop, 4 frames, is inside the second word.
    loud = sound((20, 0), (42, -10), (10, 0), (4, -10), (14, 0))
    words = words_of("a at", np.array([[0, 1], [1, 3], [3, 4]]), np.array([12, 66, 80]), np.ones(3), loud)
    assert bounds(words) == [("a", 0.02, 0.2), ("at", 0.62, 0.9)]


def test_a_word_without_units_has_no_time_and_the_end_is_the_audios():
    words = words_of("hm — yes", np.array([[0, 2], [4, 8]]), np.array([0, 36]), np.ones(2), sound((37, 0)))
    assert bounds(words) == [("hm", 0.0, 0.34), ("yes", 0.34, 0.37)]


@pytest.mark.parametrize("frames", [2, 7, 40, 1000])
@pytest.mark.parametrize("delay_s", [0.0, 0.4])
def test_words_always_last_and_never_overlap(frames: int, delay_s: float):
    rng = np.random.default_rng(frames)
    for count in (1, 2, 13):
        emitted = np.sort(rng.integers(0, frames, count)).astype(float)
        loud = np.repeat(rng.normal(-8, 4, frames // 9 + 1), 9)[:frames].astype(np.float32)
        text = " ".join("ab" for _ in range(count))
        spans = np.array([[3 * k, 3 * k + 2] for k in range(count)])
        words = words_of(text, spans, emitted, np.ones(count), loud, delay_s)
        assert len(words) == count
        assert all(w.end_s > w.start_s for w in words)
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(words))
        assert words[0].start_s >= 0 and words[-1].end_s <= frames / 100 + 1e-9
        if frames >= 3 * count:
            assert all(w.end_s - w.start_s >= 0.0299 for w in words)
        assert not any(line.split()[3].strip("0.") == "" for line in ctm_lines("u", words))


def test_the_expected_frame_is_that_of_the_best_place():
    occupancy = np.array([[0.0, 0.5, 0.5, 0, 0, 0, 0, 0], [0, 0, 0, 0.6, 0, 0, 0, 0.4]])
    frames, confidence = emission_frames(occupancy)
    assert frames.tolist() == [1.5, 3.0]  # 7 is too far from 3 to count
    assert confidence.tolist() == [0.5, 0.6]


@pytest.mark.parametrize("delay", [0, 4, 28, 55])
def test_the_delay_is_measured_at_the_pauses(delay: int):
    # Words follow each other faster than the largest delay, and pauses are shorter than it.
    rng = np.random.default_rng(delay)
    utterances = []
    for _ in range(14):
        parts, first, at = [], [], 0
        for _ in range(6):
            length, pause = int(rng.integers(12, 40)), int(rng.integers(10, 25)) * int(rng.random() < 0.5)
            parts += [(pause, -10), (length, 0)]
            first.append(at + pause + delay + rng.normal(0, 2))
            at += pause + length
        utterances.append((np.array(first), sound(*parts)))
    assert measured_delay(utterances) == pytest.approx(delay, abs=2)
    assert measured_delay(utterances[:1]) is None  # too few pauses


ALIGNMENT = Alignment("utt-1", 0.5, [Word("Oh,", 0.04, 0.12, 0.61), Word('"a', 0.12, 0.16, 0.4)])


def test_ctm():
    assert list(ctm_lines(ALIGNMENT.id, ALIGNMENT.words)) == [
        "utt-1 1 0.04 0.08 Oh, 0.610",
        'utt-1 1 0.12 0.04 "a 0.400',
    ]


def test_textgrid_covers_the_audio_without_gaps():
    lines = [line.strip() for line in textgrid(ALIGNMENT).splitlines()]
    assert lines[:2] == ['File type = "ooTextFile"', 'Object class = "TextGrid"']
    assert "intervals: size = 4" in lines
    starts = lines[lines.index("intervals [1]:") :]
    bounds = [float(x.split("=")[1]) for x in starts if x.startswith("xm")]
    assert bounds == [0, 0.04, 0.04, 0.12, 0.12, 0.16, 0.16, 0.5]
    assert [x for x in starts if x.startswith("text")] == ['text = ""', 'text = "Oh,"', 'text = """a"', 'text = ""']

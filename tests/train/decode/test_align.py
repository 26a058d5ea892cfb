"""Forced alignment: the best frames against all there are, words by hand, the files' forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stillhouse.train.decode.align import Alignment, best_frames
from stillhouse.train.decode.emissions import Word, words_of
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


def test_words_by_hand():
    # "Oh,  a cat": units _o h | _ (alone) | _a | _c at ; the comma has no unit
    text = "Oh,  a cat"
    spans = np.array([[0, 1], [1, 2], [3, 4], [4, 6], [6, 8], [8, 10]])
    frames, confidence = np.array([1, 3, 3, 3, 6, 8]), np.array([0.5, 0.7, 0.9, 0.4, 1.0, 0.8])
    words = words_of(text, spans, frames, confidence, 0.04, 0.5)
    assert [w.text for w in words] == ["Oh,", "a", "cat"]
    assert [round(w.start_s, 3) for w in words] == [0.04, 0.12, 0.24]
    assert [round(w.end_s, 3) for w in words] == [0.12, 0.16, 0.36]  # "a" takes the frame that both were in
    assert [round(w.confidence, 3) for w in words] == [0.6, 0.4, 0.9]


def test_a_word_without_units_has_no_time_and_the_end_is_the_audios():
    words = words_of("hm — yes", np.array([[0, 2], [4, 8]]), np.array([0, 9]), np.ones(2), 0.04, 0.37)
    assert [(w.text, round(w.start_s, 2), round(w.end_s, 2)) for w in words] == [("hm", 0.0, 0.04), ("yes", 0.36, 0.37)]


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

"""Windows over long audio: every frame once, each from the window where its context is longest."""

from __future__ import annotations

import pytest

from stillhouse.extract.speech.windows import audio_windows


@pytest.mark.parametrize(
    ("samples", "most", "overlap", "stride"), [(1000, 100, 20, 5), (101, 100, 40, 10), (997, 90, 30, 7)]
)
def test_every_frame_comes_once_from_the_window_that_has_most_context(
    samples: int, most: int, overlap: int, stride: int
) -> None:
    windows = audio_windows(samples, most, overlap, stride)
    assert len(windows) > 1
    kept: list[tuple[int, int]] = []  # (frame of the audio, context in samples)
    for w in windows:
        assert w.start % stride == 0 and w.stop - w.start <= most
        frames = range(w.start // stride, w.stop // stride)
        for frame in frames[w.first : w.last]:
            kept.append((frame, context(frame, w.start, w.stop, samples, stride)))
    assert [frame for frame, _ in kept] == list(range(samples // stride))
    best = {
        f: max(context(f, w.start, w.stop, samples, stride) for w in windows if w.start <= f * stride < w.stop)
        for f, _ in kept
    }
    assert all(own >= best[frame] - stride for frame, own in kept)
    assert min(own for _, own in kept) >= (overlap - stride) // 2 - stride


def context(frame: int, start: int, stop: int, samples: int, stride: int) -> int:
    """Samples from a frame to the nearer end of its window that is no end of the audio."""
    before = frame * stride - start if start else 10**9
    behind = stop - (frame + 1) * stride if stop < samples else 10**9
    return min(before, behind)


def test_audio_that_fits_is_one_window() -> None:
    (window,) = audio_windows(100, 100, 20, 5)
    assert (window.start, window.stop, window.first, window.last) == (0, 100, 0, None)

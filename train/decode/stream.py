"""Decoding of sound that is still arriving: partial results as they come, final ones where a segment ends.

A model trained with chunked attention is fed chunk by chunk; one that hears whole utterances waits for the segment's
end. Invariant: without segments, the final result is the one that decoding the whole sound gives, and the size of the
arrivals changes nothing. Exercised by `sox … | stillhouse decode RUN -`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...data.audio.fbank import OnlineFbank
from ...data.errors import UsageError
from ...data.units import Units
from ..model.streaming import EncoderStream
from ..model.transducer import Transducer
from .align import FRAME_S, Word
from .decode import Hypothesis, ScoredText, ranked
from .greedy import Search

SMOOTHED_FRAMES = 21  # over which loudness is averaged, the middle most, to find a pause


@dataclass(frozen=True)
class StreamResult:
    """What is known of a segment that began at start_s and was heard up to end_s; word times count from the start of
    the sound. A segment's last one is `final`."""

    segment: int
    start_s: float
    end_s: float
    final: bool
    ranked: list[ScoredText]

    @property
    def hyp(self) -> str:
        return self.ranked[0].hyp

    def as_hypothesis(self, id: str) -> Hypothesis:
        return Hypothesis(id, self.hyp, "", self.ranked)


def chunk_of(model: Transducer, asked: int | None = None) -> int:
    """Frames of 10 ms in which the model is fed; 0: it hears whole utterances."""
    encoder = model.encoder
    if not encoder.causal:
        if asked:
            raise UsageError("this model hears whole utterances: it was not trained to stream", expected="no --chunk")
        return 0
    return asked or encoder.chunk_frames or max(encoder.chunk_choices, default=0)


class StreamDecoder:
    """One sound through a model in eval mode.

    search       makes the search of a batch of one
    chunk        see chunk_of
    segment_s    longest segment; a model that hears whole utterances cuts at the quietest place of its last third
    endpoint_s   a segment ends when no unit was emitted for so long after one; for models that stream
    """

    def __init__(
        self,
        model: Transducer,
        units: Units,
        *,
        search: Callable[[Transducer, int], Search],
        rate_hz: int = 16000,
        chunk: int = 0,
        segment_s: float | None = None,
        endpoint_s: float | None = None,
        nbest: int = 1,
    ) -> None:
        self.model, self.units, self.search, self.nbest = model, units, search, nbest
        self.segment_s, self.endpoint_s = segment_s, endpoint_s
        self.frame_s = FRAME_S * model.encoder.subsampling
        self.device = model.encoder.feature_mean.device
        self.fbank = OnlineFbank(rate_hz, len(model.encoder.feature_mean))
        self.encoder = EncoderStream(model.encoder, chunk_frames=chunk) if chunk else None
        self.waiting = np.empty((0, self.fbank.bins), np.float32)  # frames of a model that does not stream
        self.segment = 0
        self.start = 0  # of the segment, in encoder states, or in frames where the model does not stream
        self.states = 0  # of the segment, fed so far
        self.told: list[int] = []  # units of the last partial result
        self.decoder = search(model, 1)

    def push(self, samples: np.ndarray) -> Iterator[StreamResult]:
        """Samples [n] in [-1, 1] -> what is new."""
        yield from self._frames(self.fbank.push(samples))

    def finish(self) -> Iterator[StreamResult]:
        """The sound has ended. Nothing may follow."""
        yield from self._frames(self.fbank.finish())
        if self.encoder is not None:
            yield from self._states(self.encoder.finish(), partial=False)
            if self.states or not self.segment:
                yield self._final()
        elif len(self.waiting) or not self.segment:
            yield self._whole(len(self.waiting))

    def _frames(self, features: np.ndarray) -> Iterator[StreamResult]:
        # As features.h5 holds them, from which the model learnt
        features = features.astype(np.float16).astype(np.float32)
        if self.encoder is not None:
            yield from self._states(self.encoder.push(torch.from_numpy(features)))
            return
        self.waiting = np.concatenate([self.waiting, features])
        while self.segment_s is not None and len(self.waiting) > self.segment_s / FRAME_S:
            yield self._whole(quietest(self.waiting[: max(1, round(self.segment_s / FRAME_S))]))

    @torch.no_grad()
    def _whole(self, count: int) -> StreamResult:
        """The segment of the first `count` frames that wait."""
        features, self.waiting = self.waiting[:count], self.waiting[count:]
        if count:
            batch = torch.from_numpy(features)[None].to(self.device)
            states, lengths = self.model.encode(batch, torch.tensor([count], device=self.device))
            self.decoder.feed(states, lengths)
        begin, self.start = self.start * FRAME_S, self.start + count
        return self._ended(begin, begin + count * FRAME_S)

    def _states(self, states: Tensor, *, partial: bool = True) -> Iterator[StreamResult]:
        """Feed them, as far as segments reach."""
        longest = max(1, round(self.segment_s / self.frame_s)) if self.segment_s is not None else None
        # An endpoint must not depend on how many states came at once
        step = len(states) if self.endpoint_s is None else 1
        while len(states):
            count = min(step, len(states), longest - self.states if longest is not None else len(states))
            self.decoder.feed(states[None, :count], torch.tensor([count]))
            states = states[count:]
            self.states += count
            if self.states == longest or self._paused():
                yield self._final()
        best = self.decoder.best()[0] if partial and self.states else []
        if best and best[0].units != self.told:
            self.told = best[0].units
            yield self._heard(best, self._seconds(), final=False)

    def _paused(self) -> bool:
        if self.endpoint_s is None:
            return False
        frames = self.decoder.best()[0][0].frames
        return bool(frames) and (self.states - 1 - frames[-1]) * self.frame_s >= self.endpoint_s

    def _seconds(self) -> tuple[float, float]:
        return self.start * self.frame_s, (self.start + self.states) * self.frame_s

    def _final(self) -> StreamResult:
        begin, end = self._seconds()
        self.start += self.states
        return self._ended(begin, end)

    def _ended(self, begin: float, end: float) -> StreamResult:
        found = self._heard(self.decoder.finish()[0], (begin, end), final=True)
        self.segment, self.states, self.told = self.segment + 1, 0, []
        self.decoder = self.search(self.model, 1)
        return found

    def _heard(self, found: list, span: tuple[float, float], *, final: bool) -> StreamResult:
        texts = ranked(self.units, found, self.frame_s, span[1] - span[0], self.nbest)
        moved = [replace(r, words=[_moved(w, span[0]) for w in r.words]) for r in texts]
        return StreamResult(self.segment, *span, final, moved)


def quietest(features: np.ndarray) -> int:
    """The quietest place of the last third of log mel energies [T, bins]: how many frames are before it."""
    loudness = features.mean(axis=1)
    smooth = np.convolve(loudness, np.bartlett(SMOOTHED_FRAMES + 2)[1:-1], mode="same")
    first = len(features) * 2 // 3
    last = max(first + 1, len(features) - SMOOTHED_FRAMES // 2)  # behind it the mean runs over the edge
    return max(1, first + int(smooth[first:last].argmin()))


def _moved(word: Word, by_s: float) -> Word:
    return replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s)

"""Decode audio that is still arriving: partial results while it comes, a final one where a segment ends.

A model trained with chunked attention is fed chunk by chunk. Any other model gets a segment as a whole, at its end.

Guarantees: without segments, the final result is that of decoding the whole audio. The size of the arrivals changes
nothing.
Try: `sox … | stillhouse decode RUN -`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...data.audio.fbank import OnlineFbank
from ...data.errors import UsageError
from ...data.units import Units
from ..model.streaming import EncoderStream
from ..model.transducer import Transducer
from .decode import Hypothesis, ScoredText, rank_texts
from .emissions import Emissions
from .greedy import Search
from .times import FRAME_S, loudness

SMOOTHED_FRAMES = 21  # width of the triangle that loudness is averaged with, to find a pause


@dataclass(frozen=True)
class StreamResult:
    """The result for the audio from start_s to end_s of a segment. The last result of a segment is `final`.

    All times, those of words too, count from the start of the audio.
    """

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


def chunk_size(model: Transducer, requested: int | None = None) -> int:
    """Return how many feature frames to feed at a time, or 0 for a model that needs whole utterances.

    Raises UsageError if a chunk is requested of such a model.
    """
    encoder = model.encoder
    if encoder.causal:
        return requested or encoder.chunk_frames or max(encoder.chunk_choices, default=0)
    if requested:
        raise UsageError("this model needs whole utterances: it was not trained to stream", expected="no --chunk")
    return 0


@dataclass(eq=False)
class StreamDecoder:
    """Decodes one stream of audio with a model in eval mode.

    search: makes the search of a batch of one.
    chunk: feature frames to feed at a time, from `chunk_size`.
    segment_s: longest segment. A model that needs whole utterances cuts at the quietest place of the last third.
    endpoint_s: a segment ends if no unit is emitted for this long after one. For models that stream.
    nbest: texts to keep.
    delay_s: seconds between a sound and the model's unit for it.
    """

    model: Transducer
    units: Units
    _: KW_ONLY
    search: Callable[[Transducer, int], Search]
    rate_hz: int = 16000
    chunk: int = 0
    segment_s: float | None = None
    endpoint_s: float | None = None
    nbest: int = 1
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        model, chunk = self.model, self.chunk
        self.frame_s = FRAME_S * model.encoder.subsampling
        self.device = model.encoder.feature_mean.device
        self.fbank = OnlineFbank(self.rate_hz, len(model.encoder.feature_mean))
        self.encoder = EncoderStream(model.encoder, chunk_frames=chunk) if chunk else None
        self.loud = np.empty(0, np.float32)  # of the frames from the segment's start on
        self.waiting = np.empty((0, self.fbank.bins), np.float32)  # features, for a model that does not stream
        # Start and length of the segment are in encoder states, or in feature frames if the model does not stream.
        self.segment = self.start = self.length = 0
        self.step_s = self.frame_s if chunk else FRAME_S
        self.last_units: list[int] = []  # of the last partial result
        self.decoder = self.search(model, 1)

    def push(self, samples: np.ndarray) -> Iterator[StreamResult]:
        """Yield the new results after more samples [n] in [-1, 1]."""
        yield from self._push_features(self.fbank.push(samples))

    def finish(self) -> Iterator[StreamResult]:
        """Yield the last results. The audio has ended."""
        yield from self._push_features(self.fbank.finish())
        if self.encoder is not None:
            yield from self._push_states(self.encoder.finish(), partial=False)
            if self.length or not self.segment:
                yield self._end_segment()
        elif len(self.waiting) or not self.segment:
            yield self._decode_waiting(len(self.waiting))

    def _push_features(self, features: np.ndarray) -> Iterator[StreamResult]:
        # The model was trained on features.h5, which holds float16.
        features = features.astype(np.float16).astype(np.float32)
        self.loud = np.concatenate([self.loud, loudness(features)])
        if self.encoder is not None:
            yield from self._push_states(self.encoder.push(torch.from_numpy(features)))
            return
        self.waiting = np.concatenate([self.waiting, features])
        while self.segment_s is not None and len(self.waiting) > self.segment_s / FRAME_S:
            yield self._decode_waiting(quietest(self.waiting[: max(1, round(self.segment_s / FRAME_S))]))

    @torch.no_grad()
    def _decode_waiting(self, count: int) -> StreamResult:
        """Decode the first `count` waiting frames as a segment."""
        features, self.waiting, self.length = self.waiting[:count], self.waiting[count:], count
        if count:
            batch = torch.from_numpy(features)[None].to(self.device)
            self.decoder.feed(*self.model.encode(batch, torch.tensor([count], device=self.device)))
        return self._end_segment()

    def _push_states(self, states: Tensor, *, partial: bool = True) -> Iterator[StreamResult]:
        longest = max(1, round(self.segment_s / self.frame_s)) if self.segment_s is not None else None
        # One state at a time, because an endpoint must not depend on how many states come at once.
        step = len(states) if self.endpoint_s is None else 1
        while len(states):
            count = min(step, len(states), longest - self.length if longest is not None else len(states))
            self.decoder.feed(states[None, :count], torch.tensor([count]))
            states = states[count:]
            self.length += count
            if self.length == longest or self._at_endpoint():
                yield self._end_segment()
        best = self.decoder.best()[0] if partial and self.length else []
        if best and best[0].units != self.last_units:
            self.last_units = best[0].units
            yield self._result(best, final=False)

    def _at_endpoint(self) -> bool:
        if self.endpoint_s is None:
            return False
        frames = self.decoder.best()[0][0].frames
        return bool(frames) and (self.length - 1 - frames[-1]) * self.frame_s >= self.endpoint_s

    def _end_segment(self) -> StreamResult:
        result = self._result(self.decoder.finish()[0], final=True)
        self.loud = self.loud[round(self.length * self.step_s / FRAME_S) :]
        self.segment, self.start, self.length, self.last_units = self.segment + 1, self.start + self.length, 0, []
        self.decoder = self.search(self.model, 1)
        return result

    def _result(self, results: list[Emissions], *, final: bool) -> StreamResult:
        start_s, end_s = self.start * self.step_s, (self.start + self.length) * self.step_s
        subsampling = self.model.encoder.subsampling
        loud = self.loud[: round((end_s - start_s) / FRAME_S)]
        texts = [
            replace(t, words=[replace(w, start_s=w.start_s + start_s, end_s=w.end_s + start_s) for w in t.words])
            for t in rank_texts(self.units, results, subsampling, loud, self.nbest, self.delay_s)
        ]
        return StreamResult(self.segment, start_s, end_s, final, texts)


def quietest(features: np.ndarray) -> int:
    """Return how many frames come before the quietest place in the last third of log mel energies [T, bins]."""
    loudness = features.mean(axis=1)
    smooth = np.convolve(loudness, np.bartlett(SMOOTHED_FRAMES + 2)[1:-1], mode="same")
    first = len(features) * 2 // 3
    last = max(first + 1, len(features) - SMOOTHED_FRAMES // 2)  # Later, the mean would reach beyond the end.
    return max(1, first + int(smooth[first:last].argmin()))

"""Decode audio that is still arriving: partial results while it comes, a final one where a segment ends.

A model trained with chunked attention is fed chunk by chunk. Any other model gets a segment as a whole, at its end.

A segment that is longer than the model's training utterances is cut at pauses, and the texts of its parts are joined.
If a speech encoder computes the features, it gets each part alone.

Guarantees: without segments, the final result of audio that is not cut is that of decoding it whole. The size of the
arrivals changes nothing. Memory grows with the text alone.
Try: `sox … | stillhouse decode RUN -`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from ...data.audio.fbank import OnlineFbank
from ...data.errors import UsageError
from ...data.features.settings import FBANK_TIMES, FrameTimes
from ...data.units import Units
from ..model.streaming import EncoderStream
from ..model.transducer import Transducer
from .decode import LONGEST, Hypothesis, ScoredText, join_texts, moved, quietest, rank_texts, state_frames
from .emissions import Emissions
from .greedy import Search
from .times import FRAME_S, loudness

BINS = 80  # of the fbank that tells the loudness
LEAST_S = 0.1  # Less audio behind a cut gives no text, because an encoder may need a few frames.
PAUSE_S = 0.3  # without a unit, where a long segment may be cut


@dataclass(frozen=True)
class AudioFront:
    """A speech encoder that computes features of a stretch of audio, which it needs as a whole.

    rows            computes [T, D] of samples
    times           when the rows are
    """

    rows: Callable[[np.ndarray], np.ndarray]
    times: FrameTimes


@dataclass(frozen=True)
class StreamResult:
    """The result for the audio from start_s to end_s of a segment. The last result of a segment is `final`.

    A result that is not final has the part of the segment since its last cut. All times, those of words too, count from
    the start of the audio.
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


def chunk_size(model: Transducer, requested: int | None = None, longest: int = LONGEST) -> int:
    """Return how many feature frames to feed at a time, or 0 for a model that needs whole utterances.

    Raises UsageError if a chunk is requested of such a model, or one of more than `longest` frames.
    """
    encoder = model.encoder
    if requested and requested > longest:
        raise UsageError(
            f"--chunk {requested} is longer than the utterances of training", expected=f"at most {longest} frames"
        )
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
    longest: feature frames that are decoded at once. Longer segments are cut, and `cuts` counts how often.
    front: what computes features instead of fbank. The model does not stream then.
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
    longest: int = LONGEST
    front: AudioFront | None = None

    def __post_init__(self) -> None:
        model, chunk = self.model, self.chunk
        self.times = FBANK_TIMES if self.front is None else self.front.times
        self.longest_s = self.longest / self.times.hz
        self.frame_s = model.encoder.subsampling / self.times.hz
        self.device = model.encoder.feature_mean.device
        # With a front it tells the loudness.
        self.features = OnlineFbank(self.rate_hz, len(model.encoder.feature_mean) if self.front is None else BINS)
        self.encoder = EncoderStream(model.encoder, chunk_frames=chunk) if chunk else None
        self.loud = np.empty(0, np.float32)  # of the frames from the part's start on
        # What a model that does not stream will get: fbank, or the samples that the front will get.
        self.waiting = np.empty((0, self.features.bins) if self.front is None else 0, np.float32)
        # Starts and lengths are in encoder states, or in frames of FRAME_S if the model does not stream: of the
        # segment, and of its part since the last cut.
        self.segment = self.start = self.part = self.length = 0
        self.parts: list[list[ScoredText]] = []  # the texts of the segment's earlier parts
        self.cuts = 0
        self.step_s = self.frame_s if chunk else FRAME_S
        self.last_units: list[int] = []  # of the last partial result
        self.decoder = self.search(model, 1)

    def push(self, samples: np.ndarray) -> Iterator[StreamResult]:
        """Yield the new results after more samples [n] in [-1, 1]."""
        if self.front is not None:
            self.waiting = np.concatenate([self.waiting, np.asarray(samples, np.float32)])
        yield from self._push_features(self.features.push(samples))

    def finish(self) -> Iterator[StreamResult]:
        """Yield the last results. The audio has ended."""
        yield from self._push_features(self.features.finish())
        if self.encoder is not None:
            yield from self._push_states(self.encoder.finish(), partial=False)
            if self.length or self.parts or not self.segment:
                yield self._end_segment()
        elif len(self.loud) or self.parts or not self.segment:
            self._decode_waiting(len(self.loud), last=True)
            yield self._end_segment()

    def _push_features(self, features: np.ndarray) -> Iterator[StreamResult]:
        if self.front is None:
            # The model was trained on features.h5, which holds float16.
            features = features.astype(np.float16).astype(np.float32)
        own = loudness(features) if self.front is None else loudness(features).astype(np.float16)  # as in the file
        self.loud = np.concatenate([self.loud, own])
        if self.encoder is not None:
            # A few chunks at a time, because the states of a long arrival would all be in memory.
            for piece in torch.from_numpy(features).split(max(self.longest, self.chunk)):
                yield from self._push_states(self.encoder.push(piece))
            return
        if self.front is None:
            self.waiting = np.concatenate([self.waiting, features])
        while len(self.loud) > (most := min(max(1, int(self.longest_s / FRAME_S + 1e-6)), self._left())):
            ends = most == self._left()
            self._decode_waiting(quietest(self.loud[:most]))
            if ends:
                yield self._end_segment()
            else:
                self._cut()

    def _left(self) -> float:
        """Return how much longer the segment may become, in steps of `step_s`."""
        whole = math.inf if self.segment_s is None else max(1, round(self.segment_s / self.step_s))
        return whole - (self.part - self.start) - self.length

    @torch.no_grad()
    def _decode_waiting(self, count: int, last: bool = False) -> None:
        """Decode the first `count` waiting frames as a part."""
        self.length = count
        late = last and bool(self.parts or self.segment)
        if not count or (self.front is not None and late and count * FRAME_S < LEAST_S):
            return
        cut = len(self.waiting) if last else count if self.front is None else count * self.features.shift
        features, self.waiting = self.waiting[:cut], self.waiting[cut:]
        if self.front is not None:
            features = self.front.rows(features).astype(np.float16).astype(np.float32)
        batch = torch.from_numpy(features)[None].to(self.device)
        self.decoder.feed(*self.model.encode(batch, torch.tensor([len(features)], device=self.device)))

    def _push_states(self, states: Tensor, *, partial: bool = True) -> Iterator[StreamResult]:
        longest = max(3, self.longest // self.model.encoder.subsampling)
        while len(states):
            # One state at a time where a pause ends a segment or a part, because this must not depend on how many
            # states come at once.
            free = longest * 2 // 3 - self.length if self.endpoint_s is None else 1
            count = int(min(max(1, free), len(states), self._left()))
            self.decoder.feed(states[None, :count], torch.tensor([count]))
            states = states[count:]
            self.length += count
            if self._left() <= 0 or self._paused(self.endpoint_s):
                yield self._end_segment()
            elif self.length >= longest or (self.length >= longest * 2 // 3 and self._paused(PAUSE_S)):
                self._cut()
        best = self.decoder.best()[0] if partial and self.length else []
        if best and best[0].units != self.last_units:
            self.last_units = best[0].units
            yield self._result(self._texts(best), self.part, final=False)

    def _paused(self, seconds: float | None) -> bool:
        """Return whether no unit has come for so long, after one."""
        if seconds is None:
            return False
        frames = self.decoder.best()[0][0].frames
        return bool(frames) and (self.length - 1 - frames[-1]) * self.frame_s >= seconds

    def _end_segment(self) -> StreamResult:
        self._end_part()
        result = self._result(join_texts(self.units, self.parts, self.nbest), self.start, final=True)
        self.segment, self.start, self.parts = self.segment + 1, self.part, []
        return result

    def _cut(self) -> None:
        self._end_part()
        self.cuts += 1

    def _end_part(self) -> None:
        self.parts.append(self._texts(self.decoder.finish()[0]))
        self.loud = self.loud[round(self.length * self.step_s / FRAME_S) :]
        self.part, self.length, self.last_units = self.part + self.length, 0, []
        self.decoder = self.search(self.model, 1)

    def _texts(self, results: list[Emissions]) -> list[ScoredText]:
        loud = self.loud[: round(self.length * self.step_s / FRAME_S)]
        state, late_s = state_frames(self.model, self.times), self.delay_s - self.times.start_s
        texts = rank_texts(self.units, results, state, loud, self.nbest, late_s)
        return moved(texts, self.part * self.step_s)

    def _result(self, texts: list[ScoredText], start: int, *, final: bool) -> StreamResult:
        end_s = (self.part + self.length) * self.step_s
        return StreamResult(self.segment, start * self.step_s, end_s, final, texts)

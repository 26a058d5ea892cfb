"""Forced alignment for nothing: when a trained transducer emits the units of a transcript, from the loss's occupancies.

An utterance's units get the frames, in order, that together hold most occupancy (the most expected right ones, not the
single best path); words get the frames of their units. A transducer may emit a unit later than it is heard: times are
the model's, in steps of a frame. Invariant: words are in order, inside the audio, and don't overlap.
Exercised by `stillhouse align`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...data.batches.loader import BatchLoader
from ...data.batches.sampler import BatchSampler
from ..model.losses import transducer_costs
from ..model.transducer import Transducer

FRAME_S = 0.01  # of the features


@dataclass(frozen=True)
class Word:
    """A word of a transcript or hypothesis. confidence, in an alignment: its units' mean occupancy on the frames that
    were chosen; in a hypothesis: the product of P(unit | the frame emits a unit) over its units."""

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True)
class Alignment:
    id: str
    duration_s: float
    words: list[Word]


def best_frames(occupancy: np.ndarray) -> np.ndarray:
    """Frames int64 [U], not decreasing, with the greatest sum of occupancy [U, T]."""
    U, T = occupancy.shape
    best = np.zeros(T)
    came = np.zeros((U, T), np.int64)
    for u in range(U):
        best = occupancy[u] + best
        # best[t] becomes the best of all frames up to t, came[u, t] where that was
        rises = np.r_[True, best[1:] > np.maximum.accumulate(best)[:-1]]
        came[u] = np.maximum.accumulate(np.where(rises, np.arange(T), 0))
        best = np.maximum.accumulate(best)
    frames = np.zeros(U, np.int64)
    t = T - 1
    for u in reversed(range(U)):
        t = frames[u] = came[u, t]
    return frames


def words_of(
    text: str,
    spans: np.ndarray,
    frames: np.ndarray,
    confidence: np.ndarray,
    frame_s: float,
    duration_s: float,
    together: Callable[[np.ndarray], Any] = np.mean,
) -> list[Word]:
    """Words of the transcript with times: from its first unit's frame to the end of its last unit's.

    spans int [U, 2] are the units' characters in `text`; units of white space alone belong to no word. A word without
    units (all its characters left out by the units' transform) has no time and is left out.
    """
    words: list[Word] = []
    places = [(m.start(), m.end(), m.group()) for m in re.finditer(r"\S+", text)]
    shown = [begin + len(text[begin:end]) - len(text[begin:end].lstrip()) for begin, end in spans.tolist()]
    solid = [bool(text[begin:end].strip()) for begin, end in spans.tolist()]
    heard = [k for k in range(len(spans)) if solid[k]]
    at = [shown[k] for k in heard]
    for begin, end, word in places:
        own = heard[bisect_left(at, begin) : bisect_left(at, end)]
        if not own:
            continue
        start_s = frames[own[0]] * frame_s
        end_s = (frames[own[-1]] + 1) * frame_s
        if words and start_s < words[-1].end_s:  # two words in one frame share it
            last = words[-1]
            middle = max(last.start_s, start_s)
            words[-1] = Word(last.text, last.start_s, middle, last.confidence)
        words.append(Word(word, min(start_s, duration_s), min(end_s, duration_s), float(together(confidence[own]))))
    return words


def align(
    model: Transducer, loader: BatchLoader, *, device: torch.device, batch_frames: int = 16_000
) -> Iterator[Alignment]:
    """Alignments of every utterance of `loader`, longest first; one that has no alignment has no words."""
    model.eval()
    frame_s = FRAME_S * model.encoder.subsampling
    for plan in BatchSampler(loader.frames, max_frames=batch_frames, shuffle=False).epoch(0):
        batch = loader.load(plan).to(device)
        with torch.no_grad():
            states, lengths = model.encode(batch.features, batch.feature_lengths.to(device))
            predicted = model.joint.predictor(model.predictor(batch.targets.to(device)))
            _, occupancy = transducer_costs(
                model,
                model.joint.encoder(states),
                predicted,
                batch.targets,
                lengths.to("cpu", torch.int32),
                batch.target_lengths,
                want_occupancy=True,
            )
            assert occupancy is not None
        shares = occupancy.cpu().numpy().astype(np.float64)
        for b, id in enumerate(batch.ids):
            own = shares[b, : int(batch.target_lengths[b]), : int(lengths[b])]
            duration_s = int(batch.feature_lengths[b]) * FRAME_S
            words: list[Word] = []
            if own.sum() > 0:
                frames = best_frames(own)
                confidence = own[np.arange(len(frames)), frames]
                number = plan.indices[b]
                text, spans = loader.utterances[number].text, loader.encoded[number].spans
                words = words_of(text, spans, frames, confidence, frame_s, duration_s)
            yield Alignment(id, duration_s, words)


def ctm_lines(alignment: Alignment) -> Iterator[str]:
    """NIST CTM: utterance, channel, start, duration, word, confidence; times count from the utterance's start."""
    for word in alignment.words:
        duration_s = word.end_s - word.start_s
        yield f"{alignment.id} 1 {word.start_s:.2f} {duration_s:.2f} {word.text} {word.confidence:.3f}"


def textgrid(alignment: Alignment) -> str:
    """A Praat TextGrid with one tier, words; stretches between words are empty intervals."""
    intervals: list[tuple[float, float, str]] = []
    now = 0.0
    for word in alignment.words:
        if word.end_s <= word.start_s:
            continue
        if word.start_s > now:
            intervals.append((now, word.start_s, ""))
        intervals.append((word.start_s, word.end_s, word.text.replace('"', '""')))
        now = word.end_s
    if now < alignment.duration_s or not intervals:
        intervals.append((now, alignment.duration_s, ""))
    return "\n".join(_textgrid_lines(alignment.duration_s, intervals)) + "\n"


def _textgrid_lines(end_s: float, intervals: Sequence[tuple[float, float, str]]) -> Iterator[str]:
    yield from ('File type = "ooTextFile"', 'Object class = "TextGrid"', "")
    yield from ("xmin = 0", f"xmax = {end_s:.4f}", "tiers? <exists>", "size = 1", "item []:", "    item [1]:")
    yield from ('        class = "IntervalTier"', '        name = "words"', "        xmin = 0")
    yield from (f"        xmax = {end_s:.4f}", f"        intervals: size = {len(intervals)}")
    for number, (begin, end, text) in enumerate(intervals, 1):
        yield f"        intervals [{number}]:"
        yield from (f"            xmin = {begin:.4f}", f"            xmax = {end:.4f}", f'            text = "{text}"')

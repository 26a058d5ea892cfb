"""Forced alignment: when a trained transducer emits each unit of a transcript, read off the loss's occupancies.

The units get the frames, in order, that together hold most occupancy: the most expected correct ones, not the single
best path. A transducer may emit a unit later than it is spoken. `find_delay` measures by how much, and `times` finds
the words' beginnings and ends from the frames of their units and the loudness of the audio.

Guarantees: the words of an utterance are in order, lie inside the audio, do not overlap and do not last 0 s.
Try: `stillhouse align RUN CORPUS FEATURES --split test`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ...data.batches.loader import BatchLoader
from ..model.losses import transducer_costs
from ..model.transducer import Transducer
from .decode import batch_loudness, encoded_batches, state_frames
from .emissions import Word, words_and_units, words_of
from .times import FRAME_S, measured_delay

LONGEST = 30_000  # feature frames of an utterance, because memory grows with their square
BESIDE = 2  # encoder frames on each side of a unit's best frame
SAMPLED = 256  # utterances that the model's delay is measured on


@dataclass(frozen=True)
class Alignment:
    """An utterance whose words have times. It has no words if it is too long or no alignment exists.

    untimed: words of the transcript without a time.
    why: the reason for this, if there are any.
    """

    id: str
    duration_s: float
    words: list[Word]
    untimed: int = 0
    why: str = ""


def best_frames(occupancy: np.ndarray) -> np.ndarray:
    """Return frames int64 [U], not decreasing, with the greatest sum of occupancy [U, T]."""
    U, T = occupancy.shape
    best = np.zeros(T)
    choice = np.zeros((U, T), np.int64)
    for u in range(U):
        best = occupancy[u] + best
        # best[t] becomes the best sum up to frame t, and choice[u, t] the frame of that sum.
        rises = np.r_[True, best[1:] > np.maximum.accumulate(best)[:-1]]
        choice[u] = np.maximum.accumulate(np.where(rises, np.arange(T), 0))
        best = np.maximum.accumulate(best)
    frames = np.zeros(U, np.int64)
    t = T - 1
    for u in reversed(range(U)):
        t = frames[u] = choice[u, t]
    return frames


def emission_frames(occupancy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the frame in which each unit of occupancy [U, T] is expected, float64 [U], and its confidence [U].

    The expectation is taken over the frames beside the unit's best one, so that a second, unlikely place does not
    count. Frames do not decrease. The confidence is the occupancy of the best frame.
    """
    best = best_frames(occupancy)
    frames = best[:, None] + np.arange(-BESIDE, BESIDE + 1)
    inside = (frames >= 0) & (frames < occupancy.shape[1])
    own = np.where(inside, np.take_along_axis(occupancy, frames.clip(0, occupancy.shape[1] - 1), axis=1), 0.0)
    total = own.sum(axis=1)
    mean = np.divide((own * frames).sum(axis=1), total, out=best.astype(np.float64), where=total > 0)
    return np.maximum.accumulate(mean), occupancy[np.arange(len(best)), best]


def emitted(
    model: Transducer, loader: BatchLoader, device: torch.device, batch_frames: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (number, frames [U], confidence [U], loudness [F]) of each utterance of `loader`, longest first.

    Frames are of FRAME_S. They are empty if no alignment exists.
    """
    if not loader.utterances:
        return
    times = loader.features.frame_times
    for plan, batch, states, lengths in encoded_batches(model, loader, device, batch_frames):
        with torch.no_grad():
            _, occupancy = transducer_costs(
                model,
                model.joint.encoder(states),
                model.joint.predictor(model.predictor(batch.targets.to(device))),
                batch.targets,
                lengths.to("cpu", torch.int32),
                batch.target_lengths,
                want_occupancy=True,
            )
            assert occupancy is not None
        shares = occupancy.cpu().numpy().astype(np.float64)
        for b, number in enumerate(plan.indices):
            own = shares[b, : int(batch.target_lengths[b]), : int(lengths[b])]
            frames = confidence = np.zeros(0)
            if own.sum() > 0:
                frames, confidence = emission_frames(own)
            placed = frames * state_frames(model, times) + times.start_s / FRAME_S
            yield number, placed, confidence, batch_loudness(loader.features, batch, b)


def find_delay(
    model: Transducer, loader: BatchLoader, *, device: torch.device, batch_frames: int = 16_000
) -> float | None:
    """Return how many seconds after its sound the model emits a unit, measured on up to SAMPLED utterances of `loader`.

    They are spread evenly. None if they have too few pauses to tell.
    """
    short = np.flatnonzero(loader.frames[:, 0] <= LONGEST)
    some = loader.only(short[:: max(1, -(-len(short) // SAMPLED))].tolist())
    found = []
    for number, frames, _, loud in emitted(model, some, device, batch_frames):
        words = words_and_units(some.utterances[number].text, some.encoded[number].spans) if len(frames) else []
        found.append((np.array([frames[own[0]] for _, own in words]), loud))
    delay = measured_delay(found)
    return None if delay is None else delay * FRAME_S


def align(
    model: Transducer, loader: BatchLoader, *, device: torch.device, batch_frames: int = 16_000, delay_s: float = 0.0
) -> Iterator[Alignment]:
    """Yield an alignment of each utterance of `loader`, which has transcripts, longest first.

    The model is on `device` and emits units delay_s after their sound (see `find_delay`). A batch has batch_frames
    feature frames, padding included.
    """
    long, hz = loader.frames[:, 0] > LONGEST, loader.features.frame_times.hz
    for number in np.flatnonzero(long).tolist():
        utterance, duration_s = loader.utterances[number], int(loader.frames[number, 0]) / hz
        why = f"it lasts {duration_s / 60:.1f} minutes, and {LONGEST / hz / 60:.0f} are the most"
        yield Alignment(utterance.id, duration_s, [], len(utterance.text.split()), why)
    rest = loader.only(np.flatnonzero(~long).tolist())
    for number, frames, confidence, loud in emitted(model, rest, device, batch_frames):
        utterance, spans = rest.utterances[number], rest.encoded[number].spans
        words = words_of(utterance.text, spans, frames, confidence, loud, delay_s) if len(frames) else []
        why = "the tokenizer has no unit for them" if words else "no alignment exists"
        yield Alignment(utterance.id, len(loud) * FRAME_S, words, len(utterance.text.split()) - len(words), why)

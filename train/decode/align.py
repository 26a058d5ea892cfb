"""Forced alignment: when a trained transducer emits each unit of a transcript, read off the loss's occupancies.

The units get the frames, in order, that together hold most occupancy: the most expected correct ones, not the single
best path. A transducer may emit a unit later than it is spoken, so times are the model's, in steps of a frame.

Guarantees: the words of an utterance are in order, lie inside the audio and do not overlap.
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
from .decode import encoded_batches
from .emissions import FRAME_S, Word, words_of


@dataclass(frozen=True)
class Alignment:
    """An utterance whose words have times. It has no words if no alignment exists."""

    id: str
    duration_s: float
    words: list[Word]


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


def align(
    model: Transducer, loader: BatchLoader, *, device: torch.device, batch_frames: int = 16_000
) -> Iterator[Alignment]:
    """Yield an alignment of each utterance of `loader`, which has transcripts, longest first.

    The model is on `device`. A batch has batch_frames feature frames, padding included.
    """
    frame_s = FRAME_S * model.encoder.subsampling
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
        for b, (id, number) in enumerate(zip(batch.ids, plan.indices)):
            own = shares[b, : int(batch.target_lengths[b]), : int(lengths[b])]
            duration_s = int(batch.feature_lengths[b]) * FRAME_S
            words: list[Word] = []
            if own.sum() > 0:
                frames = best_frames(own)
                confidence = own[np.arange(len(frames)), frames]
                text, spans = loader.utterances[number].text, loader.encoded[number].spans
                words = words_of(text, spans, frames, confidence, frame_s, duration_s)
            yield Alignment(id, duration_s, words)

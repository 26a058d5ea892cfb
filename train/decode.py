"""Greedy decoding of a batch, frame by frame.

Invariant: an utterance's hypothesis does not depend on what else is in its batch (to float rounding).
Exercised by `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.features import FeatureFile
from ..data.manifest import Corpus
from ..data.sampler import BatchSampler
from ..data.units import Units
from .loader import BatchLoader
from .model import BLANK, Transducer


@torch.no_grad()
def greedy(model: Transducer, states: Tensor, lengths: Tensor, *, max_symbols: int = 8) -> list[list[int]]:
    """Best unit at every step, at most `max_symbols` a frame.

    states [B, T, dim] and lengths [B] from `model.encode`. Returns the units of each utterance.
    """
    batch, device = states.shape[0], states.device
    projected = model.joint.encoder(states).float()
    lengths = lengths.to(device)
    state = model.predictor.initial(batch, device)
    predicted = model.joint.predictor(model.predictor.step(state))
    emitted: list[tuple[Tensor, Tensor]] = []  # (where [B], units [B]) in order; one transfer to the host at the end
    for t in range(states.shape[1]):
        active = lengths > t
        for _ in range(max_symbols):
            unit = model.joint(projected[:, t], predicted).argmax(-1)
            active = active & (unit != BLANK)
            if not bool(active.any()):
                break
            emitted.append((active, unit))
            state = model.predictor.advance(state, unit, active)
            predicted = model.joint.predictor(model.predictor.step(state))
    hypotheses: list[list[int]] = [[] for _ in range(batch)]
    if emitted:
        where = torch.stack([a for a, _ in emitted], dim=1).cpu()
        units = torch.stack([u for _, u in emitted], dim=1).cpu()
        hypotheses = [units[b][where[b]].tolist() for b in range(batch)]
    return hypotheses


@dataclass(frozen=True)
class Hypothesis:
    id: str
    hyp: str
    ref: str


def transcribe(
    model: Transducer, loader: BatchLoader, *, device: torch.device, batch_frames: int = 30_000
) -> Iterator[Hypothesis]:
    """Hypotheses of every utterance of `loader`, at speed 1, longest first."""
    model.eval()
    sampler = BatchSampler(loader.frames, max_frames=batch_frames, shuffle=False)
    for plan in sampler.epoch(0):
        batch = loader.load(plan).to(device)
        with torch.no_grad():
            states, lengths = model.encode(batch.features, batch.feature_lengths.to(device))
        for id, units, reference in zip(batch.ids, greedy(model, states, lengths), loader.references(plan)):
            yield Hypothesis(id, loader.units.decode(units), reference)


def decoding_loader(corpus: Corpus, features: Path, units: Units, *, untranscribed: bool = False) -> BatchLoader:
    return BatchLoader(corpus, FeatureFile(features), units, untranscribed=untranscribed)

"""Decoding of whole utterances, batch by batch: greedy here, the beam in beam.py.

Invariant: an utterance's hypothesis does not depend on what else is in its batch (to float rounding), nor on the
pieces in which its encoder states came. Exercised by `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...data.batches.loader import BatchLoader
from ...data.batches.sampler import BatchSampler
from ...data.features.compute import FeatureFile
from ...data.manifest import Corpus
from ...data.units import Units
from ..model.transducer import BLANK, Transducer
from .align import FRAME_S, Word
from .emissions import Emissions, timed_words

MAX_SYMBOLS = 8  # a frame


class Search(Protocol):
    """A decoder of a batch, fed with encoder states as they come."""

    def feed(self, states: Tensor, lengths: Tensor) -> None:
        """States [B, T, dim]; of utterance b the first lengths[b] count."""

    def best(self) -> list[list[Emissions]]:
        """What was found so far for each utterance, best first; feeding may go on."""

    def finish(self) -> list[list[Emissions]]:
        """As `best`, of utterances that end here."""


def confidence(unit: Tensor, blank: Tensor) -> Tensor:
    """P(unit | not blank) from their log-probabilities: what the model thinks was said, whenever it was."""
    return torch.exp(unit - torch.log(-torch.expm1(blank.clamp(max=-1e-7)))).clamp(max=1.0)


class Greedy:
    """Best unit at every step, at most `max_symbols` a frame, of `batch` utterances."""

    def __init__(self, model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        self.model, self.max_symbols, self.batch = model, max_symbols, batch
        self.device = model.joint.output.weight.device
        self.state = model.predictor.initial(batch, self.device)
        self.predicted = model.joint.predictor(model.predictor.step(self.state))
        self.frames = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.score = torch.zeros(batch, dtype=torch.float64, device=self.device)
        self.found: list[list[tuple[int, int, float]]] = [[] for _ in range(batch)]  # unit, frame, sure

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        model = self.model
        projected = model.joint.encoder(states).float()
        lengths = lengths.to(self.device)
        emitted: list[tuple[Tensor, ...]] = []  # where, units, frames, sure [B]; to the host at the end
        for t in range(states.shape[1]):
            active = lengths > t
            for symbol in range(self.max_symbols + 1):
                logp = model.joint(projected[:, t], self.predicted).float().log_softmax(-1)
                unit = logp.argmax(-1) if symbol < self.max_symbols else torch.full_like(lengths, BLANK)
                best = logp.gather(1, unit[:, None])[:, 0]
                self.score += torch.where(active, best, 0.0)
                active = active & (unit != BLANK)
                if not bool(active.any()):
                    break
                emitted.append((active, unit, self.frames + t, confidence(best, logp[:, BLANK])))
                self.state = model.predictor.advance(self.state, unit, active)
                self.predicted = model.joint.predictor(model.predictor.step(self.state))
        self.frames += lengths.clamp(max=states.shape[1])
        self._keep(emitted)

    def _keep(self, emitted: list[tuple[Tensor, ...]]) -> None:
        if emitted:
            where, units, frames, sure = (torch.stack(column, dim=1).cpu() for column in zip(*emitted))
            for b, mine in enumerate(where):
                self.found[b] += zip(units[b][mine].tolist(), frames[b][mine].tolist(), sure[b][mine].tolist())

    def best(self) -> list[list[Emissions]]:
        scores = self.score.tolist()
        return [
            [Emissions([u for u, _, _ in mine], [t for _, t, _ in mine], [p for _, _, p in mine], score)]
            for mine, score in zip(self.found, scores)
        ]

    finish = best


def greedy_search(model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> Greedy:
    """The greedy search that the model's loss asks for."""
    if model.durations:
        from .greedy import TdtGreedy

        return TdtGreedy(model, batch, max_symbols=max_symbols)
    return Greedy(model, batch, max_symbols=max_symbols)


def greedy(model: Transducer, states: Tensor, lengths: Tensor, *, max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """The units that greedy decoding finds of states [B, T, dim] and lengths [B] from `model.encode`."""
    search = greedy_search(model, len(states), max_symbols=max_symbols)
    search.feed(states, lengths)
    return [found[0].units for found in search.finish()]


@dataclass(frozen=True)
class ScoredText:
    """One of several hypotheses; score = acoustic + fused, natural logarithms."""

    hyp: str
    score: float
    acoustic: float
    fused: float
    words: list[Word] = field(default_factory=list)


@dataclass(frozen=True)
class Hypothesis:
    """hyp is the best of `ranked`."""

    id: str
    hyp: str
    ref: str
    ranked: list[ScoredText] = field(default_factory=list)


def ranked(units: Units, found: list[Emissions], frame_s: float, duration_s: float, most: int = 1) -> list[ScoredText]:
    """The best `most` texts. Unit sequences that spell one text are one: their probabilities add up, the words' times
    are those of the likelier."""
    places: dict[str, int] = {}
    texts: list[ScoredText] = []
    for e in found:
        text, words = timed_words(units, e, frame_s, duration_s)
        at = places.setdefault(text, len(texts))
        if at == len(texts):
            texts.append(ScoredText(text, e.score, e.acoustic, e.fused, words))
        else:
            first = texts[at]
            score = float(np.logaddexp(first.score, e.score))
            texts[at] = replace(first, score=score, acoustic=first.acoustic + score - first.score)
    return sorted(texts, key=lambda r: -r.score)[:most]


def transcribe(
    model: Transducer,
    loader: BatchLoader,
    *,
    device: torch.device,
    batch_frames: int = 30_000,
    search: Callable[[Transducer, int], Search] = greedy_search,
    nbest: int = 1,
) -> Iterator[Hypothesis]:
    """Hypotheses of every utterance of `loader`, at speed 1, longest first."""
    model.eval()
    frame_s = FRAME_S * model.encoder.subsampling
    sampler = BatchSampler(loader.frames, max_frames=batch_frames, shuffle=False)
    for plan in sampler.epoch(0):
        batch = loader.load(plan).to(device)
        with torch.no_grad():
            states, lengths = model.encode(batch.features, batch.feature_lengths.to(device))
        decoder = search(model, len(batch.ids))
        decoder.feed(states, lengths)
        durations = (batch.feature_lengths * FRAME_S).tolist()
        for id, found, reference, s in zip(batch.ids, decoder.finish(), loader.references(plan), durations):
            texts = ranked(loader.units, found, frame_s, s, nbest)
            yield Hypothesis(id, texts[0].hyp, reference, texts)


def decoding_loader(corpus: Corpus, features: Path, units: Units, *, untranscribed: bool = False) -> BatchLoader:
    return BatchLoader(corpus, FeatureFile(features), units, untranscribed=untranscribed)

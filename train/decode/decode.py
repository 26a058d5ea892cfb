"""Decoding of whole utterances, batch by batch.

Invariant: an utterance's hypothesis does not depend on what else is in its batch (to float rounding), nor on the
pieces in which its encoder states came. Exercised by `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ...data.batches.loader import BatchLoader
from ...data.batches.sampler import BatchSampler
from ...data.features.compute import FeatureFile
from ...data.manifest import Corpus
from ...data.units import Units
from ..model.transducer import Transducer
from .align import FRAME_S, Word
from .emissions import Emissions, timed_words
from .greedy import Search, greedy_search


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

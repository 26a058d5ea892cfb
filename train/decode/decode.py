"""Transcribe a corpus: batches of utterances through the encoder and a search, and the texts that it finds.

Guarantees: the hypothesis of an utterance does not depend on the rest of its batch, to float rounding.
Try: `stillhouse decode RUN CORPUS FEATURES --split test`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...data.batches.loader import Batch, BatchLoader
from ...data.batches.sampler import BatchPlan, BatchSampler
from ...data.features.compute import FeatureFile
from ...data.features.provenance import refuse_changed_rows
from ...data.manifest import Corpus
from ...data.units import Units
from ..model.transducer import Transducer
from ..run.load import TrainedOn
from .emissions import Emissions, Word, timed_words
from .greedy import Search, greedy_search
from .times import loudness


@dataclass(frozen=True)
class ScoredText:
    """A text that a search found. score = acoustic + fused, in natural logarithms."""

    hyp: str
    score: float
    acoustic: float
    fused: float
    words: list[Word] = field(default_factory=list)


@dataclass(frozen=True)
class Hypothesis:
    """The result of an utterance, with the best text of `ranked` as `hyp`."""

    id: str
    hyp: str
    ref: str
    ranked: list[ScoredText] = field(default_factory=list)


def rank_texts(
    units: Units, results: list[Emissions], subsampling: int, loud: np.ndarray, most: int = 1, delay_s: float = 0.0
) -> list[ScoredText]:
    """Return the best `most` texts of a search, best first, with words by `timed_words`.

    Unit sequences that spell one text are merged. Their probabilities are added, and the words keep the times of the
    first of them.
    """
    texts: dict[str, ScoredText] = {}
    for e in results:
        text, words = timed_words(units, e, subsampling, loud, delay_s)
        if text not in texts:
            texts[text] = ScoredText(text, e.score, e.acoustic, e.fused, words)
        else:
            first = texts[text]
            score = float(np.logaddexp(first.score, e.score))
            texts[text] = replace(first, score=score, acoustic=first.acoustic + score - first.score)
    return sorted(texts.values(), key=lambda t: -t.score)[:most]


def encoded_batches(
    model: Transducer, loader: BatchLoader, device: torch.device, batch_frames: int
) -> Iterator[tuple[BatchPlan, Batch, Tensor, Tensor]]:
    """Yield (plan, batch, states [B, T', dim], lengths [B]) of all utterances at speed 1, longest first."""
    model.eval()
    for plan in BatchSampler(loader.frames, max_frames=batch_frames, shuffle=False).epoch(0):
        batch = loader.load(plan).to(device)
        with torch.no_grad():
            states, lengths = model.encode(batch.features, batch.feature_lengths.to(device))
        yield plan, batch, states, lengths


def batch_loudness(batch: Batch, number: int) -> np.ndarray:
    """Return the loudness of each frame of one utterance of a batch."""
    return loudness(batch.features[number, : int(batch.feature_lengths[number])].cpu().numpy())


def transcribe(
    model: Transducer,
    loader: BatchLoader,
    *,
    device: torch.device,
    batch_frames: int = 30_000,
    search: Callable[[Transducer, int], Search] = greedy_search,
    nbest: int = 1,
    delay_s: float = 0.0,
) -> Iterator[Hypothesis]:
    """Yield a hypothesis of each utterance of `loader` at speed 1, longest first, with its `nbest` best texts.

    The model is on `device` and emits units delay_s after their sound. A batch has batch_frames feature frames, padding
    included. `search` makes the search of a batch from the model and the number of utterances.
    """
    for plan, batch, states, lengths in encoded_batches(model, loader, device, batch_frames):
        decoder = search(model, len(batch.ids))
        decoder.feed(states, lengths)
        for b, (id, results, ref) in enumerate(zip(batch.ids, decoder.finish(), loader.references(plan))):
            loud = batch_loudness(batch, b)
            texts = rank_texts(loader.units, results, model.encoder.subsampling, loud, nbest, delay_s)
            yield Hypothesis(id, texts[0].hyp, ref, texts)


def decoding_loader(
    corpus: Corpus, features: Path, units: Units, *, untranscribed: bool = False, trained: TrainedOn | None = None
) -> BatchLoader:
    """Return a loader of a corpus and its feature file. `untranscribed`: utterances without text are allowed.

    Raises StaleError if the features have other settings than those that the model was `trained` on, or if their
    audio or times have changed.
    """
    file = FeatureFile(features)
    if trained is not None:
        trained.refuse_others(file)
    refuse_changed_rows(corpus, file, corpus.utterances)
    return BatchLoader(corpus, file, units, untranscribed=untranscribed)

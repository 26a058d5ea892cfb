"""Transcribe a corpus: batches of utterances through the encoder and a search, and the texts that it finds.

Guarantees: the hypothesis of an utterance does not depend on the rest of its batch, to float rounding.
Try: `stillhouse decode RUN CORPUS FEATURES --split test`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data.batches.loader import Batch, BatchLoader
from ...data.batches.sampler import BatchPlan, BatchSampler
from ...data.features.file import FeatureFile
from ...data.features.provenance import refuse_changed_rows
from ...data.features.settings import FrameTimes, is_encoder
from ...data.manifest import Corpus
from ...data.text import SPACE_MARK
from ...data.units import Units
from ..model.transducer import Transducer
from ..run.load import TrainedOn
from .emissions import Emissions, Word, timed_words
from .greedy import Search, greedy_search
from .times import FRAME_S, loudness

LONGEST = 3_000  # frames of an utterance that is decoded as a whole, unless the caller knows the model's own limit
SMOOTHED_FRAMES = 21  # width of the triangle that loudness is averaged with, to find a pause


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
    units: Units, results: list[Emissions], subsampling: float, loud: np.ndarray, most: int = 1, delay_s: float = 0.0
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


def join_texts(units: Units, parts: list[list[ScoredText]], most: int = 1) -> list[ScoredText]:
    """Return the best `most` texts of an utterance, best first, from those of its parts in order."""
    glue = " " if any(SPACE_MARK in piece for piece in units.pieces) else ""
    best = parts[0] if parts else [ScoredText("", 0.0, 0.0, 0.0)]
    for part in parts[1:]:
        pairs = [
            ScoredText(
                glue.join(filter(None, (a.hyp, b.hyp))),
                a.score + b.score,
                a.acoustic + b.acoustic,
                a.fused + b.fused,
                [*a.words, *b.words] if most > 1 else a.words,
            )
            for a in best
            for b in part
        ]
        best = sorted(pairs, key=lambda t: -t.score)[:most]
    if most == 1 and len(parts) > 1:  # The words of all parts are joined once, because a day has half a million.
        best = [replace(best[0], words=[word for part in parts for word in part[0].words])]
    return best


def moved(texts: list[ScoredText], by_s: float) -> list[ScoredText]:
    """Return texts whose words come by_s seconds later."""
    return [
        replace(t, words=[replace(w, start_s=w.start_s + by_s, end_s=w.end_s + by_s) for w in t.words]) for t in texts
    ]


def quietest(loud: np.ndarray) -> int:
    """Return how many frames come before the quietest place in the last third of the loudness [F]."""
    smooth = np.convolve(loud, np.bartlett(SMOOTHED_FRAMES + 2)[1:-1], mode="same")
    first = len(loud) * 2 // 3
    last = max(first + 1, len(loud) - SMOOTHED_FRAMES // 2)  # Later, the mean would reach beyond the end.
    return max(1, first + int(smooth[first:last].argmin()))


def loudness_of(file: FeatureFile, id: str, features: np.ndarray) -> np.ndarray:
    """Return the loudness [F] of each FRAME_S of an utterance of a feature file, with features [T, bins] at speed 1.

    It is 0 throughout, where no silence is, if the file does not tell it.
    """
    if not is_encoder(file.settings):
        return loudness(features)
    known = file.loudness(file.numbers([id])).astype(np.float32)
    return known if len(known) else np.zeros(max(1, round(len(features) / (file.frame_times.hz * FRAME_S))), np.float32)


def batch_loudness(file: FeatureFile, batch: Batch, number: int) -> np.ndarray:
    """Return the loudness of one utterance of a batch of `file`."""
    own = batch.features[number, : int(batch.feature_lengths[number])].cpu().numpy()
    return loudness_of(file, batch.ids[number], own)


def place_of(frame: int, times: FrameTimes) -> int:
    """Return the frame of FRAME_S that is at the beginning of a feature frame. The first one gets 0."""
    return max(0, round((times.start_s + frame / times.hz) / FRAME_S)) if frame else 0


def state_frames(model: Transducer, times: FrameTimes) -> float:
    """Return how many frames of FRAME_S an encoder state of the model has, over features with these `times`."""
    return model.encoder.subsampling / (times.hz * FRAME_S)


def transcribe(
    model: Transducer,
    loader: BatchLoader,
    *,
    device: torch.device,
    batch_frames: int = 30_000,
    search: Callable[[Transducer, int], Search] = greedy_search,
    nbest: int = 1,
    delay_s: float = 0.0,
    longest: int = LONGEST,
) -> Iterator[Hypothesis]:
    """Yield a hypothesis of each utterance of `loader` at speed 1, longest first, with its `nbest` best texts.

    The model is on `device` and emits units delay_s after their sound. A batch has batch_frames feature frames, padding
    included. `search` makes the search of a batch from the model and the number of utterances. An utterance of more
    than `longest` frames is cut at its quietest places, and the texts of its parts are joined.
    """
    file, times = loader.features, loader.features.frame_times
    state, late_s = state_frames(model, times), delay_s - times.start_s
    long = loader.frames[:, 0] > longest
    for number in np.flatnonzero(long)[np.argsort(-loader.frames[long, 0], kind="stable")].tolist():
        id = loader.utterances[number].id
        features = file.gather([id])[0]
        loud, bounds = loudness_of(file, id, features), [0]
        while len(features) - (begin := bounds[-1]) > longest:
            at = place_of(begin, times)
            quiet_s = (at + quietest(loud[at : place_of(begin + longest, times)])) * FRAME_S
            bounds.append(min(max(round((quiet_s - times.start_s) * times.hz), begin + 1), begin + longest))
        ranges = list(pairwise([*bounds, len(features)]))
        parts: list[list[ScoredText]] = []
        for at in range(0, len(ranges), size := max(1, batch_frames // longest)):
            group = ranges[at : at + size]
            cut = [torch.from_numpy(features[begin:end].astype(np.float32)) for begin, end in group]
            lengths = torch.tensor([len(part) for part in cut], device=device)
            decoder = search(model, len(cut))
            with torch.no_grad():
                decoder.feed(*model.encode(pad_sequence(cut, batch_first=True).to(device), lengths))
            for (begin, end), results in zip(group, decoder.finish(), strict=True):
                first = min(place_of(begin, times), len(loud) - 1)
                own = loud[first : None if end == len(features) else max(first + 1, place_of(end, times))]
                begin_s = first * FRAME_S  # The times of the part count from there.
                own_late_s = late_s + begin_s - begin / times.hz
                texts = rank_texts(loader.units, results, state, own, nbest, own_late_s)
                parts.append(moved(texts, begin_s))
        texts = join_texts(loader.units, parts, nbest)
        (ref,) = loader.references(BatchPlan(np.array([number]), np.zeros(1, np.int64), 0))
        yield Hypothesis(id, texts[0].hyp, ref, texts)
    loader = loader.only(np.flatnonzero(~long).tolist())
    if not loader.utterances:
        return
    for plan, batch, states, lengths in encoded_batches(model, loader, device, batch_frames):
        decoder = search(model, len(batch.ids))
        decoder.feed(states, lengths)
        for b, (id, results, ref) in enumerate(zip(batch.ids, decoder.finish(), loader.references(plan))):
            loud = batch_loudness(file, batch, b)
            texts = rank_texts(loader.units, results, state, loud, nbest, late_s)
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

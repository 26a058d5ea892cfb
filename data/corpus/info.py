"""Counts and hours of a corpus.

Guarantees: only the manifest is read, never the audio.
Try: `stillhouse corpus info corpus.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..manifest import Corpus, Utterance


@dataclass(frozen=True)
class SplitFacts:
    """Counts of a split, or of the whole corpus."""

    utterances: int
    sessions: int
    speakers: int
    with_audio: int
    hours: float
    words: int
    characters: int
    seconds_quantiles: list[float]  # minimum, 10 %, median, 90 %, maximum; empty if no duration is known


@dataclass(frozen=True)
class CorpusFacts:
    """What `stillhouse corpus info` prints."""

    path: str
    total: SplitFacts
    splits: dict[str, SplitFacts]  # "" for utterances without one
    meta: dict[str, int]  # columns of meta and how many values each has
    alphabet: list[str]  # characters of the transcripts, most frequent first


def describe(corpus: Corpus) -> CorpusFacts:
    """Return the facts of a corpus and of each of its splits."""
    groups: dict[str, list[Utterance]] = {}
    values: dict[str, set[str]] = {}
    letters: Counter[str] = Counter()
    for u in corpus.utterances:
        groups.setdefault(u.split or "", []).append(u)
        letters.update(u.text)
        for name, value in u.meta.items():
            values.setdefault(name, set()).add(value)
    return CorpusFacts(
        path=str(corpus.path),
        total=_facts(corpus.utterances),
        splits={name: _facts(groups[name]) for name in sorted(groups)},
        meta={name: len(distinct) for name, distinct in sorted(values.items())},
        alphabet=[c for c, _ in sorted(letters.items(), key=lambda item: (-item[1], item[0]))],
    )


def _facts(utterances: list[Utterance]) -> SplitFacts:
    seconds = np.array([u.duration_s for u in utterances if u.audio is not None and u.duration_s is not None])
    quantiles = np.quantile(seconds, [0, 0.1, 0.5, 0.9, 1]) if len(seconds) else []
    return SplitFacts(
        utterances=len(utterances),
        sessions=len({(u.session is None, u.session or u.id) for u in utterances}),
        speakers=len({u.speaker for u in utterances if u.speaker is not None}),
        with_audio=sum(u.audio is not None for u in utterances),
        hours=round(float(seconds.sum()) / 3600, 4),
        words=sum(len(u.text.split()) for u in utterances),
        characters=sum(len(u.text) for u in utterances),
        seconds_quantiles=[round(float(q), 3) for q in quantiles],
    )

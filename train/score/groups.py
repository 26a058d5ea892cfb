"""Error rates of parts of a set: by speaker, by session, by any column of the manifest; and its worst utterances.

Invariant: the parts' errors and reference words add up to the set's. Exercised by
`stillhouse score HYP --corpus CORPUS --by speaker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.corpus.split import group_of
from ...data.errors import CorpusError
from ...data.manifest import Corpus
from .alignment import AlignedPair, aligned, errors
from .wer import Rate, counts, rate


@dataclass(frozen=True)
class Group:
    """name: the speaker, session, …; "" for utterances without one."""

    name: str
    utterances: int
    wer: Rate
    cer: Rate


@dataclass(frozen=True)
class Aligned:
    """One utterance with its alignment and its word error rate (errors over reference words, at least one)."""

    id: str
    pairs: list[AlignedPair]
    errors: int
    wer: float


def group_names(corpus: Corpus, ids: Sequence[str], by: str) -> list[str]:
    """The group of each utterance; CorpusError for an id that the corpus lacks, or a column that nobody has."""
    if missing := [id for id in ids if id not in corpus.by_id]:
        raise CorpusError(
            f"{len(missing)} hypotheses are of no utterance of the corpus, {missing[0]} for one", where=corpus.path
        )
    found = [group_of(corpus.by_id[id], by) for id in ids]
    if not any(found):
        columns = sorted({name for u in corpus.utterances for name in u.meta})
        raise CorpusError(
            f"no utterance has a {by}",
            where=corpus.path,
            expected="one of " + ", ".join(["speaker", "session", "split", *columns]),
        )
    return [name or "" for name in found]


def by_group(names: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> list[Group]:
    """Scores of each group, the worst first; equally bad ones by name."""
    words, characters = counts(references, hypotheses), counts(references, hypotheses, characters=True)
    groups = []
    for name in sorted(set(names)):
        mine = np.array([n == name for n in names])
        groups.append(Group(name, int(mine.sum()), rate(words[mine]), rate(characters[mine])))
    return sorted(groups, key=lambda g: (-g.wer.rate, g.name))


def worst(found: Sequence[tuple[str, str, str]]) -> list[Aligned]:
    """(id, reference, hypothesis) aligned; most errors first, utterances without errors left out."""
    out = []
    for id, ref, hyp in found:
        pairs = aligned(ref, hyp)
        if count := errors(pairs):
            out.append(Aligned(id, pairs, count, count / max(1, len(ref.split()))))
    return sorted(out, key=lambda a: (-a.errors, -a.wer, a.id))

"""Error rates of the parts of a set (by speaker, session or any column of the manifest), and its worst utterances.

Guarantees: the errors and reference words of the groups add up to those of the set.
Try: `stillhouse score HYP --corpus CORPUS --by speaker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.corpus.split import group_of
from ...data.errors import CorpusError
from ...data.manifest import Corpus
from .alignment import AlignedUtterance, align_utterance
from .wer import Rate, error_counts, rate


@dataclass(frozen=True)
class Group:
    """Scores of a group. `name` is the speaker, the session and so on. It is empty for utterances without one."""

    name: str
    utterances: int
    wer: Rate
    cer: Rate


def group_names(corpus: Corpus, ids: Sequence[str], by: str) -> list[str]:
    """Return the group of each utterance.

    Raises CorpusError if the corpus does not have one of the utterances, or if none of them has a value for `by`.
    """
    if missing := [id for id in ids if id not in corpus.by_id]:
        problem = f"{len(missing)} hypotheses belong to no utterance of the corpus, for example {missing[0]}"
        raise CorpusError(problem, where=corpus.path)
    groups = [group_of(corpus.by_id[id], by) or "" for id in ids]
    if not any(groups):
        columns = ["speaker", "session", "split", *sorted({name for u in corpus.utterances for name in u.meta})]
        raise CorpusError(f"no utterance has a {by}", where=corpus.path, expected=f"one of {', '.join(columns)}")
    return groups


def score_groups(names: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> list[Group]:
    """Return the scores of each group, the worst first, equally bad ones by name."""
    words, characters = error_counts(references, hypotheses), error_counts(references, hypotheses, characters=True)
    groups = []
    for name in sorted(set(names)):
        members = np.array([n == name for n in names])
        groups.append(Group(name, int(members.sum()), rate(words[members]), rate(characters[members])))
    return sorted(groups, key=lambda g: (-g.wer.rate, g.name))


def worst_utterances(triples: Sequence[tuple[str, str, str]]) -> list[AlignedUtterance]:
    """Align (id, reference, hypothesis) and return the utterances with errors, most errors first."""
    utterances = [align_utterance(*triple) for triple in triples]
    return sorted((u for u in utterances if u.errors), key=lambda u: (-u.errors, -u.wer, u.id))

"""Utterances that join a corpus: text without audio beside speech, or more speech.

Guarantees: the utterances of the corpus stay as they are and where they are. An id that means something else in the
corpus ends the addition before anything is written, and what is there already is not added again.
Try: `stillhouse corpus import text novels.txt corpus.jsonl --add --split text`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CorpusError, first_few
from ..manifest import Corpus, Utterance

SEGMENT = ("audio", "start_s", "duration_s", "channel")


@dataclass(frozen=True)
class Added:
    """A corpus with the utterances that joined it, how many did, and how many were there before."""

    utterances: list[Utterance]
    new: int
    known: int
    sessions: int  # of the corpus, which new utterances continue


def add_utterances(corpus: Corpus, more: Sequence[Utterance]) -> Added:
    """Return the utterances of a corpus and behind them those of `more` that it lacks.

    An utterance is there already if the corpus has its id with the same text, and with the same part of audio unless it
    is text alone. Its split may differ, and so may zeros in front of the numbers in the id of a text alone. Raises
    CorpusError if an id has another text or other audio in the corpus.
    """
    known = corpus.by_id
    clashes = [u.id for u in more if u.id in known and not _same(known[u.id], u)]
    if clashes:
        how = "text" if known[clashes[0]].text != next(u for u in more if u.id == clashes[0]).text else "audio"
        what = f"the corpus has ids of {len(clashes)} new utterances with another {how}: {first_few(clashes)}"
        remedy = "nothing was added. Give the new utterances other ids, for example by another name of their file"
        raise CorpusError(what, where=corpus.path, remedy=remedy)
    new = _without_renumbered(corpus, [u for u in more if u.id not in known])
    if new and all(u.audio is None for u in new):
        own = {u.text: u.id for u in corpus.utterances if u.audio is None}
        if all(u.text in own for u in new):
            what = f"the corpus has all of these texts under other ids, such as {own[new[0].text]} for {new[0].id}"
            raise CorpusError(what, where=corpus.path, remedy="nothing was added, because it would count twice")
    sessions = {u.session for u in corpus.utterances if u.session is not None} & {u.session for u in new}
    return Added([*corpus.utterances, *new], len(new), len(more) - len(new), len(sessions))


def _without_renumbered(corpus: Corpus, new: list[Utterance]) -> list[Utterance]:
    """Leave out texts without audio that the corpus has under an id with other zeros in front of its numbers.

    `corpus import text` numbers the lines of a file with as many digits as the last one has, so that a file that grew
    gives its old lines other ids.
    """
    if all(u.audio is not None for u in new):
        return new
    known = {(_numbers(u.id), u.text) for u in corpus.utterances if u.audio is None}
    return [u for u in new if u.audio is not None or (_numbers(u.id), u.text) not in known]


def _numbers(id: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", id)


def _same(there: Utterance, u: Utterance) -> bool:
    sound = u.audio is None or all(getattr(there, name) == getattr(u, name) for name in SEGMENT)
    return there.text == u.text and sound

"""Find contexts that no longer fit a corpus, from the order and the texts of its utterances. No teacher is needed.

Guarantees: an utterance is named if its window saw another text than stands there now, or an end of the session that is
no end now. `context_left` and `context_right` say how far a window reached. A neighbour that it saw in part counts
whole, and windows that only were cut elsewhere still fit. (`extract --refresh` compares inputs exactly.)
Try: `pytest tests/extract/pipeline/test_refresh.py -k stale`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..disk.layout import hash_text
from ..format.arrays import RawArray
from ..format.index import same_text
from ..reader import Store
from ..views import View, parse_context

REFRESH = "stillhouse extract CORPUS STORE --refresh, with that teacher"
Session = Sequence[tuple[str, str]]  # (id, raw text) of its utterances, in order


def behind(store: Store) -> dict[str, int]:
    """Return {teacher: number of utterances} of teachers that were not refreshed when another teacher was.

    These utterances of the store's newest corpus are missing, or come from another text, or are not in it any more.
    Whether audio has changed is not known without the corpus.
    """
    found = {}
    for name in store.plan.teachers:
        own = store.index_of(name)
        if own.edition != store.index.edition:
            dropped = int((store.index.rows(own.ids()) < 0).sum())
            found[name] = dropped + int((~is_newest(store, name, store.utterance_ids)).sum())
    return {name: count for name, count in found.items() if count}


def is_newest(store: Store, teacher: str, ids: Sequence[str]) -> np.ndarray:
    """Return which utterances a teacher has from the text that the store's newest corpus has, bool [B].

    A speech teacher hears no text, so it has every utterance that it knows.
    """
    own = store.index_of(teacher)
    return own.rows(ids) >= 0 if store.plan.teachers[teacher].is_speech else same_text([store.index, own], ids)


def behind_text(teacher: str, count: int) -> str:
    """Return what `behind` says of a teacher, as a line for people."""
    utterances = "1 utterance differs" if count == 1 else f"{count:,} utterances differ"
    return f"{teacher} is behind the corpus: {utterances}; {REFRESH}"


def uncompared_text(teacher: str) -> str:
    """Return what it means that the plan's `is_compared` is False of a teacher, as a line for people."""
    return (
        f"{teacher} was planned by an earlier version, which did not compare its batches with one text at a time; the "
        "same extract command does, and refuses to go on if the states differ"
    )


def stale(store: Store, views: Sequence[View], sessions: Sequence[Session]) -> dict[str, list[str]]:
    """Return {utterance: contexts} that saw other neighbours than `sessions` has. Its own text is not compared.

    `sessions` are those of the whole corpus that the store was made from, as they are now.
    """
    found: dict[str, list[str]] = {}
    for teacher in dict.fromkeys(v.teacher for v in views):
        contexts = list(dict.fromkeys(v.context for v in views if v.teacher == teacher and v.context != "alone"))
        if contexts:
            _of_teacher(store, teacher, contexts, sessions, found)
    return found


def _of_teacher(
    store: Store, teacher: str, contexts: list[str], sessions: Sequence[Session], found: dict[str, list[str]]
) -> None:
    index, record = store.index_of(teacher), store.plan.teachers[teacher]
    length = np.asarray(RawArray(store.paths, teacher, "length").read())
    sides = ("context_left", "context_right")
    seen = {c: [RawArray(store.paths, teacher, s).read(record.contexts.index(c)) for s in sides] for c in contexts}
    asked = {c: parse_context(c) for c in contexts}
    # Utterances without tokens are never part of a context.
    said = index.order[length[index.order] > 0]
    position = np.full(len(index), -1)
    position[said] = np.arange(len(said))
    groups = index.session[said]
    begins = _begins(groups)
    ends = len(groups) - 1 - _begins(groups[::-1])[::-1]  # the last of each session
    texts, tokens = index.text_hash[said], length[said]
    for session in sessions:
        spoken = [(i, hash_text(t)) for i, t in session if t.strip()]
        rows = index.rows([i for i, _ in spoken])
        now = np.array([h for _, h in spoken], dtype=np.uint64)
        here = position[np.maximum(rows, 0)] if len(rows) else rows
        mine = np.flatnonzero((rows >= 0) & (here >= 0))
        mine = mine[texts[here[mine]] == now[mine]]  # Its own text has not changed.
        if len(mine) and len(mine) == len(spoken):
            first = int(here[0])
            whole = first == begins[first] and first + len(spoken) - 1 == ends[first]
            if whole and np.array_equal(here, np.arange(first, first + len(spoken))):
                continue
        for u in mine.tolist():
            at, row = int(here[u]), int(rows[u])
            for context in contexts:
                left, right = seen[context][0][row], seen[context][1][row]
                before = _as_it_was(at, u, -1, left, asked[context].left, texts, now, tokens, int(begins[at]))
                after = _as_it_was(at, u, 1, right, asked[context].right, texts, now, tokens, int(ends[at]))
                if not (before and after):
                    found.setdefault(spoken[u][0], []).append(context)


def _begins(groups: np.ndarray) -> np.ndarray:
    """Return, for each place in runs of equal numbers, where its run begins."""
    start = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1)) if len(groups) else np.zeros(0, int)
    return np.repeat(start, np.diff(np.append(start, len(groups))))


def _as_it_was(
    at: int, u: int, step: int, seen: int, asked: int, texts: np.ndarray, now: np.ndarray, length: np.ndarray, end: int
) -> bool:
    """Whether the neighbours of `at` (`u` in the session as it is now) are those that a window of `seen` tokens saw."""
    if asked == 0:
        return True
    rest = int(seen)
    while rest > 0 and at != end:
        at, u = at + step, u + step
        if not 0 <= u < len(now) or texts[at] != now[u]:
            return False
        rest -= int(length[at])
    # If the window wanted more tokens than it saw, the session must still end there.
    return not (at == end and seen < asked) or not 0 <= u + step < len(now)

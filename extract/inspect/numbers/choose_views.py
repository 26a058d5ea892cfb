"""Help to choose views: how well each predicts the ASR units, how similar they are, and a set that follows from both.

Guarantees: every view is probed at the same places, the beginnings of the transcripts' ASR units, except where a
decoder's token is the first of its utterance (see `counted`). Scores come from
sessions and texts that the probe was not fitted to. The suggestion follows from the numbers that are shown.
Try: `stillhouse views STORE --corpus CORPUS --units UNITS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....data.errors import NoStoreError, StaleError
from ....data.manifest import Corpus
from ....data.units import Units
from ...store import Store, View, hash_text
from ..sample import OnProgress, available_rows, ignore
from .probe import Probe, fold_numbers, ridge, tied
from .similarity import packed_places, similarity, states_at, tokens_over, without_first

CLASSES = 100  # most frequent units; all others are one more class
CKA_TOKENS = 2000
FOLDS = 5
END = -1  # class of what follows the last unit
LEAST_SHARE = 0.1
RULE = (
    "The score is the mean of the two R², on sessions and texts that the probe was not fitted to. A score of 0 is no "
    "better than the units' frequencies. The view with the highest score is first. The next view is always the one "
    "whose score times (1 - its largest CKA with those chosen) is highest. "
    f"Its score must be above {LEAST_SHARE:g} of the first"
)


@dataclass(frozen=True)
class Probed:
    """The probe of a view or of a teacher's input embeddings (TEACHER/static), for the unit at a place and the next."""

    view: str
    width: int
    here_r2: float  # R² over all units' indicators
    here_accuracy: float  # share of places whose highest indicator is correct
    next_r2: float
    next_accuracy: float
    score: float


@dataclass(frozen=True)
class Suggested:
    view: str
    score: float
    most_alike: float  # largest CKA with the views chosen before it


@dataclass(frozen=True)
class Choice:
    views: list[Probed]
    static: list[Probed]
    chance_here: float  # accuracy of the most frequent unit
    chance_next: float
    cka: list[list[float]]  # [V][V], in the order of `views`
    suggested: list[Suggested]  # in the order in which they were chosen
    together: Probed  # one probe of all suggested views
    rule: str
    places: int
    cka_places: int
    utterances: int
    folds: int
    folds_by: str  # "session" or "utterance"; in both cases utterances with one text are in one fold


@dataclass(frozen=True)
class _Places:
    ids: list[str]
    tokens: dict[str, list[np.ndarray]]  # {teacher: token indices of each utterance}
    probe: Probe
    folds_by: str


def choose(
    store: Store,
    views: Sequence[View],
    corpus: Corpus,
    units: Units,
    *,
    pick: int = 3,
    places: int = 6000,
    seed: int = 0,
    on_progress: OnProgress = ignore,
) -> Choice:
    """Probe every view at `places` unit beginnings, and suggest `pick` of them. Raises NoStoreError or StaleError."""
    at = _places(store, views, corpus, units, places, seed)
    alike = similarity(store, views, CKA_TOKENS, seed, on_progress)

    def read(view: View) -> np.ndarray:
        return states_at(store, view, at.ids, at.tokens[view.teacher])

    scores = []
    for view in views:
        on_progress(view)
        scores.append(_probed(view.address, read(view), at.probe))
    chosen = suggest(scores, np.array(alike.cka), pick)
    return Choice(
        views=scores,
        static=[_probed(f"{t}/static", _embeddings(store, t, at), at.probe) for t in at.tokens],
        chance_here=_most_frequent(at.probe.here),
        chance_next=_most_frequent(at.probe.next),
        cka=alike.cka,
        suggested=[Suggested(scores[i].view, scores[i].score, round(overlap, 4)) for i, overlap in chosen],
        together=_probed("together", np.concatenate([read(views[i]) for i, _ in chosen], axis=1), at.probe),
        rule=RULE,
        places=len(at.probe.fold),
        cka_places=alike.places,
        utterances=len(at.ids),
        folds=int(at.probe.fold.max()) + 1,
        folds_by=at.folds_by,
    )


def suggest(scores: Sequence[Probed], cka: np.ndarray, pick: int) -> list[tuple[int, float]]:
    """Choose views by RULE; the first wins a tie. Returns (number of a view, its largest CKA with those before)."""
    gain = np.maximum([s.score for s in scores], 0)
    chosen = [(int(np.argmax(gain)), 0.0)]
    eligible = gain >= LEAST_SHARE * gain.max()
    while len(chosen) < min(pick, len(scores)):
        overlap = np.clip(cka[:, [i for i, _ in chosen]].max(axis=1), 0, 1)
        worth = np.where(eligible, gain * (1 - overlap), 0)
        worth[[i for i, _ in chosen]] = 0
        best = int(np.argmax(worth))
        if worth[best] <= 1e-6:
            break
        chosen.append((best, float(overlap[best])))
    return chosen


def _probed(name: str, states: np.ndarray, probe: Probe) -> Probed:
    r = ridge(states, probe)
    numbers = [round(float(x), 4) for x in (r.r2[0], r.accuracy[0], r.r2[1], r.accuracy[1], np.mean(r.r2))]
    return Probed(name, states.shape[1], *numbers)


def _embeddings(store: Store, teacher: str, at: _Places) -> np.ndarray:
    """float32 [places, D]: the input embedding of the token at each place."""
    table = np.asarray(store.embedding(teacher)[1])
    lengths, token_id, _ = store.tokens(at.ids, teacher)
    rows = store.vocabulary_rows(teacher, token_id[packed_places(lengths, at.tokens[teacher])])
    return table[rows].astype(np.float32)


def _places(store: Store, views: Sequence[View], corpus: Corpus, units: Units, count: int, seed: int) -> _Places:
    ids, rows, left = list[str](), list[int](), count
    begins, symbols = list[np.ndarray](), list[np.ndarray]()
    for row in np.random.default_rng(seed).permutation(available_rows(store, views)).tolist():
        name = store.index.id(row)
        utterance = corpus.by_id.get(name)
        if utterance is None:
            continue
        if store.index.text_hash[row] != hash_text(utterance.text):
            remedy = "stillhouse extract --refresh"
            raise StaleError("its transcript differs from the one in the store", where=name, remedy=remedy)
        encoded = units.encode(utterance.text)
        solid = encoded.spans[:, 1] > encoded.spans[:, 0]
        if not solid.any():
            continue
        ids.append(name)
        rows.append(row)
        begins.append(encoded.spans[solid, 0][:left].astype(np.int64))
        symbols.append(np.append(encoded.ids[solid], END)[: left + 1])
        left -= len(begins[-1])
        if left <= 0:
            break
    good, tokens = tokens_over(store, ids, list(dict.fromkeys(v.teacher for v in views)), begins) if ids else ([], {})
    keep, tokens = without_first(store, tokens) if ids else ([], tokens)
    for g, k in zip(good, keep):
        g[g] = k
    here = [s[: len(b)][g] for s, b, g in zip(symbols, begins, good)]
    after = [s[1 : len(b) + 1][g] for s, b, g in zip(symbols, begins, good)]
    counts = [int(g.sum()) for g in good]
    if sum(counts) < 10 * FOLDS or len(ids) < FOLDS:
        what = f"the corpus and the store share {sum(counts)} units of {len(ids)} utterances"
        expected = f"at least {10 * FOLDS} units of {FOLDS} utterances in all of the views"
        raise NoStoreError(what, where=store.address, expected=expected)
    # A text is in one fold only, even if several speakers read it. So is a session, if there are enough sessions.
    texts = np.asarray(store.index.text_hash)[rows]
    groups = tied(np.asarray(store.index_of(views[0].teacher).session)[rows], texts)
    by_session = len(np.unique(groups)) >= FOLDS
    if not by_session:
        groups = np.unique(texts, return_inverse=True)[1]
    if len(np.unique(groups)) < FOLDS:
        what = f"the corpus and the store share {len(np.unique(groups))} different texts"
        expected = f"at least {FOLDS}, because the probe is tested on other texts than it is fitted to"
        raise NoStoreError(what, where=store.address, expected=expected)
    folds = fold_numbers(np.repeat(groups, counts), FOLDS, seed)
    probe = Probe(_classes(np.concatenate(here)), _classes(np.concatenate(after)), folds)
    return _Places(ids, tokens, probe, "session" if by_session else "utterance")


def _classes(symbols: np.ndarray) -> np.ndarray:
    """Class numbers from 0, the most frequent symbols first; the last class has all symbols beyond `CLASSES`."""
    values, inverse, counts = np.unique(symbols, return_inverse=True, return_counts=True)
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    return np.minimum(rank, CLASSES)[inverse]


def _most_frequent(classes: np.ndarray) -> float:
    return round(float(np.bincount(classes).max() / len(classes)), 4)

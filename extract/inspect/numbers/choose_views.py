"""Which views to train with: how well each tells the ASR units, how alike they are, and a set that follows from both.

Invariant: every view is probed at the same places, the beginnings of the transcripts' ASR units, and judged on sessions
and texts that its probe was not fitted to; what is suggested follows from the numbers that are shown.
Exercised by: `stillhouse views STORE --corpus CORPUS --units UNITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ....data.errors import NoStoreError, StaleError
from ....data.manifest import Corpus
from ....data.units import Units
from ...store import Store, View, hash_text
from ..sample import held_rows
from .probe import Probe, fold_numbers, ridge, tied
from .similarity import Similarity, similarity, states_at, tokens_over

CLASSES = 100  # most frequent units that the probe tells apart; all others are one more
FOLDS = 5
END = -1  # what follows the last unit
RULE = (
    "score: mean of the two R² (0: no better than the units' frequencies), on sessions and texts not fitted to. First "
    "the view of the highest score; then, one by one, the view whose score times (1 - its largest CKA with those "
    "chosen) is highest, as long as it scores above {least:g} of the first"
)
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Probed:
    """One view, or a teacher's input embeddings (TEACHER/static). here: the unit that begins at the place; next: the
    one after it. R² counts all units' indicators; accuracy is the share of places where the highest was right.
    """

    view: str
    width: int
    here_r2: float
    here_accuracy: float
    next_r2: float
    next_accuracy: float
    score: float


@dataclass(frozen=True)
class Suggested:
    """A view of the suggested set, in the order in which it was chosen."""

    view: str
    score: float
    most_alike: float  # its largest CKA with those chosen before it


@dataclass(frozen=True)
class Choice:
    """Everything that `views` tells. chance: accuracies of the most frequent unit and the most frequent next one."""

    views: list[Probed]
    static: list[Probed]
    chance_here: float
    chance_next: float
    cka: list[list[float]]  # [V][V], in the order of `views`
    suggested: list[Suggested]
    together: Probed  # one probe of all that are suggested
    rule: str
    places: int
    cka_places: int
    utterances: int
    folds: int
    folds_by: str  # "session" or "utterance"; either way utterances of one text are in one fold


@dataclass(frozen=True)
class _Places:
    """Where views are read: tokens[teacher][u] are token indices of utterance u; here, next and fold are [places]."""

    ids: list[str]
    tokens: dict[str, list[np.ndarray]]
    here: np.ndarray
    next: np.ndarray
    fold: np.ndarray
    folds_by: str


def choose(
    store: Store,
    views: Sequence[View],
    corpus: Corpus,
    units: Units,
    *,
    pick: int = 3,
    places: int = 6000,
    cka_tokens: int = 2000,
    seed: int = 0,
    report: Callable[[object], None] | None = None,
) -> Choice:
    """Probe every view at `places` unit beginnings and suggest `pick` of them.

    Errors: NoStoreError where the corpus and the store share too little, StaleError for a changed transcript.
    """
    at = _places(store, views, corpus, units, places, seed)
    alike = similarity(store, views, cka_tokens, seed, report)
    probe = Probe(_classes(at.here), _classes(at.next), at.fold)

    def read(view: View) -> np.ndarray:
        return states_at(store, view, at.ids, at.tokens[view.teacher])

    scores = []
    for view in views:
        if report is not None:
            report(view)
        scores.append(_probed(view.address, read(view), probe))
    static = [_probed(f"{t}/static", _embeddings(store, t, at), probe) for t in at.tokens]
    chosen = suggest(scores, np.array(alike.cka), pick)
    suggested = [Suggested(scores[i].view, scores[i].score, round(overlap, 4)) for i, overlap in chosen]
    return Choice(
        views=scores,
        static=static,
        chance_here=_most_frequent(at.here),
        chance_next=_most_frequent(at.next),
        cka=alike.cka,
        suggested=suggested,
        together=_probed("together", np.concatenate([read(views[i]) for i, _ in chosen], axis=1), probe),
        rule=RULE.format(least=LEAST_SHARE),
        places=len(at.here),
        cka_places=alike.places,
        utterances=len(at.ids),
        folds=int(at.fold.max()) + 1,
        folds_by=at.folds_by,
    )


def heat_map(choice: Choice) -> Similarity:
    """The part of a choice that `plots.similarity` draws."""
    return Similarity([p.view for p in choice.views], choice.cka_places, choice.cka)


def suggest(scores: Sequence[Probed], cka: np.ndarray, pick: int) -> list[tuple[int, float]]:
    """(number of a view, its largest CKA with those before), by the rule in RULE. Ties: the first."""
    gain = np.maximum([s.score for s in scores], 0)
    chosen = [(int(np.argmax(gain)), 0.0)]
    able = gain >= LEAST_SHARE * gain.max()
    while len(chosen) < min(pick, len(scores)):
        overlap = np.clip(cka[:, [i for i, _ in chosen]].max(axis=1), 0, 1)
        worth = np.where(able, gain * (1 - overlap), 0)
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
    lengths, token_id, _ = store.tokens(at.ids, teacher)
    start = np.cumsum(lengths, dtype=np.int64) - lengths
    rows = np.concatenate([t + s for t, s in zip(at.tokens[teacher], start.tolist())])
    table = np.asarray(store.embedding(teacher)[1])
    return table[store.vocabulary_rows(teacher, token_id[rows])].astype(np.float32)


def _places(store: Store, views: Sequence[View], corpus: Corpus, units: Units, count: int, seed: int) -> _Places:
    ids: list[str] = []
    begins: list[np.ndarray] = []
    symbols: list[np.ndarray] = []
    rows: list[int] = []
    left = count
    for row in np.random.default_rng(seed).permutation(held_rows(store, views)).tolist():
        name = store.index.id(row)
        utterance = corpus.by_id.get(name)
        if utterance is None:
            continue
        if store.index.text_hash[row] != hash_text(utterance.text):
            raise StaleError(
                "its transcript is another one than in the store", where=name, remedy="stillhouse extract --refresh"
            )
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
    here = [s[: len(b)][g] for s, b, g in zip(symbols, begins, good)]
    after = [s[1 : len(b) + 1][g] for s, b, g in zip(symbols, begins, good)]
    counts = [int(g.sum()) for g in good]
    if sum(counts) < 10 * FOLDS or len(ids) < FOLDS:
        raise NoStoreError(
            f"the corpus and the store share {sum(counts)} units of {len(ids)} utterances",
            where=store.address,
            expected=f"{10 * FOLDS} units of {FOLDS} utterances at least, in all of the views",
        )
    # Nobody is judged on a text that he was fitted to, whoever else has read it, nor on a context of it
    texts = np.asarray(store.index.text_hash)[rows]
    groups = tied(np.asarray(store.index.session)[rows], texts)
    by_session = len(np.unique(groups)) >= FOLDS
    if not by_session:
        groups = np.unique(texts, return_inverse=True)[1]
    if len(np.unique(groups)) < FOLDS:
        raise NoStoreError(
            f"{len(np.unique(groups))} different texts among those that the corpus and the store share",
            where=store.address,
            expected=f"{FOLDS} at least: one text is either fitted to or judged on",
        )
    return _Places(
        ids,
        tokens,
        np.concatenate(here),
        np.concatenate(after),
        fold_numbers(np.repeat(groups, counts), FOLDS, seed),
        "session" if by_session else "utterance",
    )


def _classes(symbols: np.ndarray) -> np.ndarray:
    """Numbers from 0: the most frequent symbols first, all beyond `CLASSES` together the last."""
    values, inverse, counts = np.unique(symbols, return_inverse=True, return_counts=True)
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    return np.minimum(rank, CLASSES)[inverse]


def _most_frequent(symbols: np.ndarray) -> float:
    return round(float(np.bincount(_classes(symbols)).max() / len(symbols)), 4)

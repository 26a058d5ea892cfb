"""The transfer's access to one teacher of a store: present utterances, tokens, and states or a control's targets.

Guarantees: an utterance that the store lacks, or holds from another text or beside other neighbours, is named or left
out, never read. Nothing changes after construction, and the object pickles without the corpus.
Try: `pytest tests/distill/test_targets.py tests/distill/test_controls.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.errors import NoStoreError, StaleError, StoreError, first_few
from ..data.manifest import Corpus
from ..extract.store import Store, View, hash_text, to_float32
from ..extract.store.verify.stale import stale
from .controls import punctuation_ids, shuffled_partners, table_norm, vocabulary, word_codes, word_numbers
from .spans import expand

_REFRESH = "extract changed utterances again: stillhouse extract CORPUS STORE … --refresh"


@dataclass(frozen=True)
class ViewSpec:
    """One view of a TargetReader, with the numbers that standardise its targets."""

    address: str  # such as "minilm/alone/6"
    teacher: str
    width: int  # D
    mean: np.ndarray  # float32 [D]
    std: np.ndarray  # float32 [D]


@dataclass(frozen=True)
class TeacherBatch:
    """Packed tokens of B utterances, N in all."""

    lengths: np.ndarray  # int [B]
    token_id: np.ndarray  # int [N]
    span: np.ndarray  # int [N, 2]
    table_row: np.ndarray  # int64 [N]: rows of the teacher's input embeddings
    states: list[np.ndarray]  # float32 [N, D] for each chosen view


class TeacherStates:
    """One teacher of a store, with some of its views. `specs` describes them, or a control's targets in their place.

    Arguments:
        name: the teacher's name in a batch, which differs from `teacher` if two stores have a teacher of that name.
        views: views of this teacher.
        control, seed: those of TargetReader.
        corpus: the whole manifest, with the utterances' present neighbours and the punctuation, or None.
    """

    def __init__(
        self, store: Store, teacher: str, name: str, views: Sequence[View], control: str | None = None, seed: int = 0,
        corpus: Corpus | None = None,
    ) -> None:  # fmt: skip
        self.store, self.teacher, self.name, self.views = store, teacher, name, list(views)
        self._control, self._dtype = control, store.teacher(teacher).dtype
        # A copy, because the store's array may be a memory map, which a later process could not share through a pickle.
        self.table = np.array(store.embedding(teacher)[1])  # float16 [K, D], by ascending token id
        self._codes = control in ("words", "words-shuffled")
        if self._codes:
            self._punctuation = _punctuation(store, teacher, corpus)
            lengths, token_id, span = store.tokens_of_rows(np.flatnonzero(store.lengths(teacher)), teacher)
            self._words = vocabulary(word_numbers(token_id, span, lengths, self._punctuation))
        self.specs = self._specs()
        shuffled = control in ("shuffled", "words-shuffled")
        # int64 [U]: the row from which each row of the store gets its states, if shuffled
        self._partner = shuffled_partners(store.lengths(teacher), seed, store.index.text_hash) if shuffled else None
        # Utterances with other neighbours than their contexts saw. Controls are not checked.
        self._stale = frozenset(() if corpus is None or control is not None else _stale(store, self.views, corpus))

    def _specs(self) -> list[ViewSpec]:
        if self._control == "static":
            return [ViewSpec(f"{self.name}/static", self.name, self.table.shape[1], *table_norm(self.table))]
        if self._codes:
            zero, one = np.zeros(len(self._words) + 1, np.float32), np.ones(len(self._words) + 1, np.float32)
            return [ViewSpec(f"{self.name}/words", self.name, len(zero), zero, one)]
        specs = []
        for view in self.views:
            mean, std = (np.asarray(value, np.float32) for value in self.store.norm(view))
            address = view.address.replace(self.teacher, self.name, 1)
            specs.append(ViewSpec(address, self.name, len(mean), mean, std))
        return specs

    def present(self, ids: Sequence[str], texts: Sequence[str], skip: bool = False) -> np.ndarray:
        """Return which utterances the store holds in all views and from these transcripts, bool [B].

        Raises:
            NoStoreError: utterances are missing, unless `skip`.
            StaleError: transcripts or neighbours have changed, unless `skip`.
        """

        def refuse(error: type[StoreError], what: str, wrong: np.ndarray, remedy: str) -> None:
            if wrong.any() and not skip:
                names = first_few([ids[i] for i in np.flatnonzero(wrong).tolist()])
                raise error(f"{what} {names}", where=self.name, remedy=remedy + ', or on_missing = "skip"')

        held = np.ones(len(ids), bool)
        for view in self.views:
            held &= self.store.has(ids, view)
        refuse(NoStoreError, "no states of", ~held, "extract the missing utterances: stillhouse extract")
        index = np.flatnonzero(held).tolist()
        fresh = held.copy()
        stored = np.asarray(self.store.text_hash([ids[i] for i in index], self.teacher))
        fresh[index] = [int(old) == hash_text(texts[i]) for old, i in zip(stored, index, strict=True)]
        refuse(StaleError, "changed transcripts of", held & ~fresh, _REFRESH)
        stale_context = np.array([i in self._stale for i in ids], bool)
        refuse(StaleError, "other neighbours than their contexts saw have", fresh & stale_context, _REFRESH)
        fresh &= ~stale_context
        if self._partner is not None:  # The longest utterances may have no partner.
            index = np.flatnonzero(fresh).tolist()
            fresh[index] = self._partner[self.store.rows([ids[i] for i in index], self.teacher)] >= 0
        return fresh

    def gather(self, ids: Sequence[str], chosen: Sequence[int]) -> TeacherBatch:
        """Return tokens of present utterances, and the states of the `chosen` numbers of `specs`."""
        source_ids = ids
        if self._partner is not None:
            source_ids = [self.store.index.id(int(r)) for r in self._partner[self.store.rows(ids, self.teacher)]]
        states: list[np.ndarray] = []
        if self._control == "static" or self._codes or not chosen:
            lengths, token_id, span = self.store.tokens(source_ids, self.teacher)
            if self._codes and chosen:
                states = [word_codes(word_numbers(token_id, span, lengths, self._punctuation), self._words)]
        else:
            views = [self.views[n] for n in chosen]
            gathered = self.store.gather(source_ids, views)
            lengths, token_id, span = (g[self.teacher] for g in (gathered.lengths, gathered.token_id, gathered.span))
            states = [to_float32(gathered.states[view], self._dtype) for view in views]
        if self._partner is not None:
            begin = np.cumsum(lengths, dtype=np.int64) - lengths
            lengths, token_id, span = self.store.tokens(ids, self.teacher)
            rows = expand(begin, lengths.astype(np.int64))
            states = [values[rows] for values in states]
        table_row = self.store.vocabulary_rows(self.teacher, token_id)
        if self._control == "static" and chosen:
            states = [self.table[table_row].astype(np.float32)]
        return TeacherBatch(lengths, token_id, span, table_row, states)


def _punctuation(store: Store, teacher: str, corpus: Corpus | None) -> np.ndarray:
    """Return the token ids of punctuation, which the texts of the corpus show. Without a corpus there are none."""
    texts = {} if corpus is None else {u.id: u.text for u in corpus.utterances}
    rows = np.flatnonzero(store.lengths(teacher))
    ids = [i for i in map(store.index.id, rows.tolist()) if i in texts]
    if not ids:
        return np.zeros(0, np.int64)
    hashes = np.asarray(store.text_hash(ids, teacher)).tolist()
    ids = [i for i, old in zip(ids, hashes, strict=True) if int(old) == hash_text(texts[i])]
    lengths, token_id, span = store.tokens(ids, teacher)
    return punctuation_ids(token_id, span, lengths, [texts[i] for i in ids])


def _stale(store: Store, views: Sequence[View], corpus: Corpus) -> list[str]:
    """Return the utterances whose contexts saw other texts than the corpus has."""
    own = corpus.select(store.plan.corpus.get("split"))
    sessions = [[(u.id, u.text) for u in (own.utterances[i] for i in s)] for s in own.sessions()]
    return list(stale(store, views, sessions))

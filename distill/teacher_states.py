"""The transfer's access to one teacher of a store: its utterances, tokens or frames, and states, codes or a control.

Guarantees: an utterance that the store lacks, or holds from another text or beside other neighbours, is named or left
out, never read. Nothing changes after construction, and the object pickles without the corpus.
Try: `pytest tests/distill/test_targets.py tests/distill/test_controls.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..data.errors import ConfigError, NoStoreError, StaleError, StoreError, first_few
from ..data.features.provenance import stamp
from ..data.manifest import Corpus
from ..extract.store import Gathered, Store, View, hash_text, to_float32
from ..extract.store.read.rows import TeacherRows
from ..extract.store.verify.stale import stale
from .controls import punctuation_ids, shuffled_partners, table_norm, vocabulary, word_codes, word_numbers
from .distances import CODES
from .frames import SLACK, StudentTimes, stretches
from .spans import expand, places

_REFRESH = "extract changed utterances again: stillhouse extract CORPUS STORE … --refresh"


@dataclass(frozen=True)
class ViewSpec:
    """One view of a TargetReader, with the numbers that standardise its targets."""

    address: str  # such as "minilm/alone/6"
    teacher: str
    width: int  # D of states, or C * 256 of codes: what a head predicts
    mean: np.ndarray  # float32 [D]
    std: np.ndarray  # float32 [D]
    codebooks: int = 0  # C, if the targets are codes


@dataclass(frozen=True)
class TeacherBatch:
    """Packed tokens or frames of B utterances, N in all. Frames have no ids and no table."""

    lengths: np.ndarray  # int [B]
    token_id: np.ndarray  # int [N]
    span: np.ndarray  # int [N, 2]: characters, or microseconds of the original audio
    table_row: np.ndarray  # int64 [N]: rows of the teacher's input embeddings
    states: list[np.ndarray]  # for each chosen view float32 [N, D], or uint8 [N, C] of codes


class TeacherStates:
    """One teacher of a store, with some of its views. `specs` describes them, or a control's targets in their place.

    Arguments:
        name: the teacher's name in a batch, which differs from `teacher` if two stores have a teacher of that name.
        views: views of this teacher.
        control, seed, codes: those of TargetReader.
        corpus: the whole manifest, with the utterances' present neighbours and the punctuation, or None.
    """

    _unlike = "other neighbours than their contexts saw have"

    def __init__(
        self, store: Store, teacher: str, name: str, views: Sequence[View], control: str | None = None, seed: int = 0,
        corpus: Corpus | None = None, codes: bool = False,
    ) -> None:  # fmt: skip
        self.store, self.teacher, self.name, self.views = store, teacher, name, list(views)
        self._control, self._dtype, self._as_codes = control, store.teacher(teacher).dtype, codes
        self._words: np.ndarray | None = None  # uint64, those of a control of words
        self._read_vocabulary(corpus)
        self.specs = self._specs()
        shuffled = control in ("shuffled", "words-shuffled")
        # int64 [U]: the row from which each row of the store gets its states, if shuffled
        self._partner = shuffled_partners(store.lengths(teacher), seed, store.index.text_hash) if shuffled else None
        # Utterances with other neighbours than their contexts saw. Controls are not checked.
        self._stale = frozenset(() if corpus is None or control is not None else self._stale_inputs(corpus))

    def _read_vocabulary(self, corpus: Corpus | None) -> None:
        # A copy, because the store's array may be a memory map, which a later process could not share through a pickle.
        self.table = np.array(self.store.embedding(self.teacher)[1])  # float16 [K, D], by ascending token id
        if self._control in ("words", "words-shuffled"):
            self._punctuation = _punctuation(self.store, self.teacher, corpus)
            rows = np.flatnonzero(self.store.lengths(self.teacher))
            lengths, token_id, span = self.store.tokens_of_rows(rows, self.teacher)
            self._words = vocabulary(word_numbers(token_id, span, lengths, self._punctuation))

    def _stale_inputs(self, corpus: Corpus) -> list[str]:
        """Return the utterances whose contexts saw other texts than the corpus has."""
        own = corpus.select(self.store.plan.corpus.get("split"))
        sessions = [[(u.id, u.text) for u in (own.utterances[i] for i in s)] for s in own.sessions()]
        return list(stale(self.store, self.views, sessions))

    def _specs(self) -> list[ViewSpec]:
        if self._as_codes and self._control not in (None, "shuffled"):
            raise ConfigError(f"the control {self._control} has no codes", remedy="choose another distance than codes")
        if self._control == "static":
            return [ViewSpec(f"{self.name}/static", self.name, self.table.shape[1], *table_norm(self.table))]
        if self._words is not None:
            zero, one = np.zeros(len(self._words) + 1, np.float32), np.ones(len(self._words) + 1, np.float32)
            return [ViewSpec(f"{self.name}/words", self.name, len(zero), zero, one)]
        specs = []
        for view in self.views:
            mean, std = (np.asarray(value, np.float32) for value in self.store.norm(view))
            address = view.address.replace(self.teacher, self.name, 1)
            if not self._as_codes:
                specs.append(ViewSpec(address, self.name, len(mean), mean, std))
                continue
            kind, _, codebooks = self._dtype.partition(":")
            if kind != "pq":
                what = f"the distance codes needs codes, and the states of {view.address} are {self._dtype}"
                remedy = "extract it with --dtype pq:32, or choose another distance"
                raise ConfigError(what, where=self.name, expected="a view of dtype pq:M", remedy=remedy)
            specs.append(ViewSpec(address, self.name, int(codebooks) * CODES, mean, std, int(codebooks)))
        return specs

    def present(
        self, ids: Sequence[str], texts: Sequence[str], skip: bool = False, seconds: np.ndarray | None = None
    ) -> np.ndarray:
        """Return which utterances the store holds in all views and from these inputs, bool [B].

        Arguments:
            texts: the transcripts of the utterances.
            seconds: float [B], how long the original audio of the features is.

        Raises:
            NoStoreError: utterances are missing, unless `skip`.
            StaleError: transcripts, neighbours or durations have changed, unless `skip`.
        """

        def refuse(error: type[StoreError], what: str, wrong: np.ndarray, remedy: str) -> None:
            if wrong.any() and not skip:
                names = first_few([ids[i] for i in np.flatnonzero(wrong).tolist()])
                raise error(f"{what} {names}", where=self.name, remedy=remedy + ', or on_missing = "skip"')

        held = np.ones(len(ids), bool)
        for view in self.views:
            held &= self.store.has(ids, view)
        refuse(NoStoreError, "no states of", ~held, "extract the missing utterances: stillhouse extract")
        fresh = held.copy()
        index = np.flatnonzero(held)
        what, fresh[index] = self._unchanged(ids, texts, index, seconds)
        refuse(StaleError, what, held & ~fresh, _REFRESH)
        stale_context = np.array([i in self._stale for i in ids], bool)
        refuse(StaleError, self._unlike, fresh & stale_context, _REFRESH)
        fresh &= ~stale_context
        if self._partner is not None:  # The longest utterances may have no partner.
            index = np.flatnonzero(fresh)
            fresh[index] = self._partner[self.store.rows([ids[i] for i in index.tolist()], self.teacher)] >= 0
        return fresh

    def _unchanged(
        self, ids: Sequence[str], texts: Sequence[str], index: np.ndarray, seconds: np.ndarray | None
    ) -> tuple[str, np.ndarray]:
        """Return what would be wrong, in words, and which of the utterances `index` are as they were, bool."""
        stored = np.asarray(self.store.text_hash([ids[i] for i in index.tolist()], self.teacher))
        same = [int(old) == hash_text(texts[i]) for old, i in zip(stored, index.tolist(), strict=True)]
        return "changed transcripts of", np.array(same, bool)

    def gather(self, ids: Sequence[str], chosen: Sequence[int]) -> TeacherBatch:
        """Return tokens of present utterances, and the states of the `chosen` numbers of `specs`."""
        states: list[np.ndarray] = []
        source_ids = self._sources(ids)
        if self._control == "static" or self._words is not None or not chosen:
            lengths, token_id, span = self.store.tokens(source_ids, self.teacher)
            if self._words is not None and chosen:
                states = [word_codes(word_numbers(token_id, span, lengths, self._punctuation), self._words)]
        else:
            gathered, states = self._gather(source_ids, chosen)
            lengths, token_id, span = (g[self.teacher] for g in (gathered.lengths, gathered.token_id, gathered.span))
        if self._partner is not None:
            given = lengths
            lengths, token_id, span = self.store.tokens(ids, self.teacher)
            states = _cut(states, given, lengths)
        table_row = self.store.vocabulary_rows(self.teacher, token_id)
        if self._control == "static" and chosen:
            states = [self.table[table_row].astype(np.float32)]
        return TeacherBatch(lengths, token_id, span, table_row, states)

    def _sources(self, ids: Sequence[str]) -> Sequence[str]:
        """Return the ids of the utterances that give these ones their states."""
        if self._partner is None:
            return ids
        return [self.store.index.id(int(r)) for r in self._partner[self.store.rows(ids, self.teacher)]]

    def _gather(self, ids: Sequence[str], chosen: Sequence[int]) -> tuple[Gathered, list[np.ndarray]]:
        """Return what the store has of these utterances, and the states or the codes of each chosen view."""
        views = [self.views[n] for n in chosen]
        if self._as_codes:
            gathered = self.store.gather(ids, views, "codes")
            return gathered, [gathered.states[view] for view in views]
        gathered = self.store.gather(ids, views)
        return gathered, [to_float32(gathered.states[view], self._dtype) for view in views]


class SpeechStates(TeacherStates):
    """A speech teacher, whose states are those of frames of the original audio. Their spans are microseconds.

    Arguments:
        student: when the encoder states are that learn from it.
        The others are those of TeacherStates.

    Raises:
        ConfigError: the control needs the tokens of a text.
    """

    _unlike = "another part of their audio than was extracted have"

    def __init__(
        self, store: Store, teacher: str, name: str, views: Sequence[View], control: str | None, seed: int,
        corpus: Corpus | None, codes: bool, student: StudentTimes,
    ) -> None:  # fmt: skip
        if control not in (None, "shuffled"):
            raise ConfigError(
                f"the control {control} needs a text, and {teacher} is a speech teacher",
                where=views[0].address,
                expected="the control shuffled, or none",
            )
        self.student = student
        record = store.teacher(teacher)
        self.hz, self.middle_s = float(record.rate_hz), float(record.offset_s)
        super().__init__(store, teacher, name, views, control, seed, corpus, codes)

    def _read_vocabulary(self, corpus: Corpus | None) -> None:
        self.table = np.zeros((0, 0), np.float16)

    def _stale_inputs(self, corpus: Corpus) -> list[str]:
        """Return the utterances that are now another part of the file that was extracted.

        Of another version of a file, nothing is known without reading it.
        """
        rows = self.store.index_of(self.teacher).rows([u.id for u in corpus.utterances])
        known = [
            (u, int(row)) for u, row in zip(corpus.utterances, rows, strict=True) if row >= 0 and u.audio is not None
        ]
        source = TeacherRows(self.store.plan, self.teacher).audio_source(np.array([row for _, row in known], np.int64))
        found = []
        for (u, _), (version, start, _, channel) in zip(known, source.tolist(), strict=True):
            if (round(u.start_s * 1e9), -1 if u.channel is None else u.channel) != (start, channel):
                with suppress(OSError):
                    if stamp(corpus.audio_path(u)) == version % 2**64:
                        found.append(u.id)
        return found

    def _unchanged(
        self, ids: Sequence[str], texts: Sequence[str], index: np.ndarray, seconds: np.ndarray | None
    ) -> tuple[str, np.ndarray]:
        assert seconds is not None
        frames = self.store.lengths(self.teacher)[self.store.rows([ids[i] for i in index.tolist()], self.teacher)]
        stored, heard = self.middle_s + (frames - 0.5) / self.hz, seconds[index]
        same = np.abs(stored - heard) <= SLACK / self.hz + SLACK / self.student.row_hz
        what = "other audio in the features than in the store has"
        if not same.all():
            first = int(np.flatnonzero(~same)[0])
            what = f"the features have {heard[first]:.2f} s of audio and the store {stored[first]:.2f} s for"
        return what, same

    def gather(self, ids: Sequence[str], chosen: Sequence[int]) -> TeacherBatch:
        """Return frames of present utterances, and the states of the `chosen` numbers of `specs`."""
        lengths = self.store.lengths(self.teacher)[self.store.rows(ids, self.teacher)]
        states: list[np.ndarray] = []
        if chosen:
            gathered, states = self._gather(self._sources(ids), chosen)
            if self._partner is not None:
                states = _cut(states, gathered.lengths[self.teacher], lengths)
        none = np.zeros(0, np.int64)
        return TeacherBatch(lengths, none, stretches(places(lengths)[1], self.middle_s, self.hz), none, states)


def _cut(states: list[np.ndarray], given: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Return the first `lengths` rows of each utterance, which has `given` rows."""
    begin = np.cumsum(given, dtype=np.int64) - given
    rows = expand(begin, lengths.astype(np.int64))
    return [values[rows] for values in states]


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

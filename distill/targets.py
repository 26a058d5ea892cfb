"""From stores to targets: reads what the views hold for a batch of utterances and lays it onto positions.

Invariant: what is read belongs to the transcripts given: an utterance that a store lacks, or holds from
another text, is an error that names it, or (on_missing="skip") counted and left out of that store's teachers;
never silently wrong. numpy and CPU tensors only, no state that changes: `read` runs in the trainer's prefetch
thread.
Exercised by: pytest tests/distill/test_targets.py; `stillhouse train CONFIG`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.errors import ConfigError, NoStoreError, StaleError, StoreError
from ..data.manifest import Corpus
from ..extract.store import Store, View, hash_text, to_float32
from ..extract.store.freshness import stale
from .batch import Positions, TransferBatch
from .controls import CODE_WIDTH, CONTROLS, donors, table_norm, word_codes
from .mixing import draw
from .spans import Overlaps, expand, identity, overlaps, pack, places, word_spans

POSITIONS = ("token", "word", "unit")
_NAMED = 5


@dataclass(frozen=True)
class ViewSpec:
    """One view as the transfer sees it; mean and std float32 [D] are what standardised its targets."""

    address: str
    teacher: str
    width: int
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class _Source:
    """A teacher of a store, with the views asked for; `name` differs from `teacher` where two stores share
    it.
    """

    store: Store
    teacher: str
    name: str
    views: list[View]
    numbers: list[int]
    dtype: str  # what the stored numbers mean
    vocabulary: np.ndarray  # int [K], sorted
    table: np.ndarray  # float16 [K, D], in the vocabulary's order
    donor: np.ndarray | None  # int64 [U]: whose states each row of the store gets, if shuffled
    stale: frozenset[str] = frozenset()  # utterances with other neighbours than their contexts saw


class TargetReader:
    """Reads targets of several views, of several teachers, from one or several stores over the same corpus.

    sources      pairs of a store and the views of it to read (Store.resolve gives them)
    position     what has a target: "token" (each teacher's own), "word" or "unit" (ASR units)
    on_missing   "error", or "skip": leave the utterance out for the teachers that lack it, and count it
    sample       k: read k of the views a step, drawn by `seed` and step (mixing "sample"); None: all
    control      None; "shuffled": each utterance gets another's states of equal length; "static": the views of a
                 teacher are replaced by one, TEACHER/static, of its input embeddings; "words": by one, TEACHER/words,
                 of a random code for each word; "words-shuffled": the same of another utterance's words
    corpus       the whole manifest: utterances whose neighbours are no longer those that a context saw are stale, too
    pin          targets are made in pinned memory, from which a CUDA device copies without waiting

    Where two stores have a teacher of the same name, the later one's is called NAME@2, NAME@3, … here.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Store, Sequence[View]]],
        position: str = "token",
        on_missing: str = "error",
        *,
        sample: int | None = None,
        control: str | None = None,
        seed: int = 0,
        corpus: Corpus | None = None,
        pin: bool = False,
    ) -> None:
        if control is not None and control not in CONTROLS:
            raise ConfigError(f"no control {control!r}", expected=", ".join(CONTROLS))
        if position not in POSITIONS:
            raise ConfigError(f"no position {position!r}", expected=", ".join(POSITIONS))
        if on_missing not in ("error", "skip"):
            raise ConfigError(f"on_missing cannot be {on_missing!r}", expected="error, skip")
        self.position, self.on_missing, self.sample, self.seed = position, on_missing, sample, seed
        self.control, self.pin = control, pin
        self._corpus = corpus
        self.views: list[ViewSpec] = []
        self._sources: list[_Source] = []
        for number, (store, views) in enumerate(sources, start=1):
            for teacher in dict.fromkeys(view.teacher for view in views):
                taken = any(source.name == teacher for source in self._sources)
                self._add(store, teacher, f"{teacher}@{number}" if taken else teacher, views)
        self._corpus = None  # not to be pickled along
        if not self.views:
            raise ConfigError("no views to read", remedy="name one, such as minilm/alone/6")
        if sample is not None:
            draw(len(self.views), sample, seed, 0)  # refuses now what it would refuse at the first step

    def _add(self, store: Store, teacher: str, name: str, views: Sequence[View]) -> None:
        own = list(dict.fromkeys(view for view in views if view.teacher == teacher))
        first = len(self.views)
        vocabulary, table = store.embedding(teacher)
        order = np.argsort(vocabulary)
        # Copies: the store's arrays may be memory maps, which a later process could not share through a pickle
        vocabulary, table = np.asarray(vocabulary)[order], np.asarray(table)[order]
        if self.control == "static":
            self.views.append(ViewSpec(f"{name}/static", name, table.shape[1], *table_norm(table)))
        elif self._words:
            zero, one = np.zeros(CODE_WIDTH, np.float32), np.ones(CODE_WIDTH, np.float32)
            self.views.append(ViewSpec(f"{name}/words", name, CODE_WIDTH, zero, one))
        else:
            for view in own:
                mean, std = (np.asarray(value, np.float32) for value in store.norm(view))
                address = view.address if name == teacher else view.address.replace(teacher, name, 1)
                self.views.append(ViewSpec(address, name, len(mean), mean, std))
        numbers, dtype = list(range(first, len(self.views))), store.teacher(teacher).dtype
        donor = donors(store.lengths(teacher), self.seed, store.index.text_hash) if self._shuffled else None
        stale = frozenset(self._stale(store, own))
        self._sources.append(_Source(store, teacher, name, own, numbers, dtype, vocabulary, table, donor, stale))

    def _stale(self, store: Store, views: Sequence[View]) -> list[str]:
        """Utterances whose contexts saw what the corpus no longer says; controls that read no states have none."""
        if self._corpus is None or self.control is not None:
            return []
        corpus = self._corpus.select(store.plan.corpus.get("split"))
        said = [[(u.id, u.text) for u in (corpus.utterances[i] for i in s)] for s in corpus.sessions()]
        return list(stale(store, views, said))

    @property
    def _words(self) -> bool:
        return self.control in ("words", "words-shuffled")

    @property
    def _shuffled(self) -> bool:
        return self.control in ("shuffled", "words-shuffled")

    @property
    def embeddings(self) -> dict[str, torch.Tensor]:
        """The teachers' input embeddings, float16 [K, D], rows as the batches' `query_row` counts them."""
        return {source.name: torch.from_numpy(source.table) for source in self._sources}

    def read(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        unit_spans: Sequence[np.ndarray] | None = None,
        *,
        step: int = 0,
    ) -> TransferBatch:
        """Targets of B utterances.

        texts are the manifest's raw transcripts; unit_spans one int32 [U, 2] an utterance (Units.encode),
        needed by position "unit" and by the occupancy aligner; `step` concerns `sample` alone.
        Errors: NoStoreError for utterances a store lacks, StaleError for changed transcripts, StoreError for
        damage.
        """
        if self.position == "unit" and unit_spans is None:
            raise ConfigError("position 'unit' needs the spans of the ASR units")
        if not len(ids) == len(texts) == len(ids if unit_spans is None else unit_spans):
            raise ValueError(f"{len(ids)} ids, {len(texts)} texts: not one batch")
        drawn = range(len(self.views))
        chosen = set(drawn if self.sample is None else draw(len(drawn), self.sample, self.seed, step))
        units = None if unit_spans is None else pack(unit_spans)
        positions: dict[str, Positions] = {}
        targets: dict[str, torch.Tensor] = {}
        skipped = np.zeros(len(ids), bool)
        for source in self._sources:
            numbers = [n for n in source.numbers if n in chosen]
            present = self._present(source, ids, texts) if numbers else np.zeros(len(ids), bool)
            try:
                read = self._read(source, numbers, present, ids, texts, units)
            except StoreError:
                if self.on_missing == "error":
                    raise
                present = self._undamaged(source, numbers, present, ids, texts, units)
                read = self._read(source, numbers, present, ids, texts, units)
            if numbers:
                skipped |= ~present
            positions[source.name] = read[0]
            targets |= read[1]
        return TransferBatch(len(ids), positions, targets, int(skipped.sum()))

    def _present(self, source: _Source, ids: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """bool [B]: utterances that the store holds, in every view asked for, from these very transcripts."""
        held = np.ones(len(ids), bool)
        for view in source.views:
            held &= source.store.has(ids, view)
        self._refuse(
            NoStoreError,
            "no states of",
            ~held,
            ids,
            source,
            "extract the missing utterances: stillhouse extract",
        )
        index = np.flatnonzero(held).tolist()
        fresh = held.copy()
        stored = np.asarray(source.store.text_hash([ids[i] for i in index], source.teacher))
        fresh[index] = [int(old) == hash_text(texts[i]) for old, i in zip(stored, index, strict=True)]
        self._refuse(
            StaleError,
            "changed transcripts of",
            held & ~fresh,
            ids,
            source,
            "extract what has changed: stillhouse extract CORPUS STORE … --refresh",
        )
        moved = np.array([i in source.stale for i in ids], bool) if source.stale else np.zeros(len(ids), bool)
        self._refuse(
            StaleError,
            "other neighbours than their contexts saw have",
            fresh & moved,
            ids,
            source,
            "extract what has changed: stillhouse extract CORPUS STORE … --refresh",
        )
        fresh &= ~moved
        if source.donor is not None:  # the longest utterance has nobody to take from
            index = np.flatnonzero(fresh).tolist()
            fresh[index] = source.donor[source.store.rows([ids[i] for i in index])] >= 0
        return fresh

    def _undamaged(
        self,
        source: _Source,
        numbers: list[int],
        present: np.ndarray,
        ids: Sequence[str],
        texts: Sequence[str],
        units: tuple[np.ndarray, np.ndarray] | None,
    ) -> np.ndarray:
        """bool [B]: of the present utterances those that can be read. One by one, since this is rare."""
        whole = present.copy()
        for i in np.flatnonzero(present).tolist():
            own = None
            if units is not None:
                first = int(units[1][:i].sum())
                own = units[0][first : first + int(units[1][i])], units[1][i : i + 1]
            try:
                self._read(source, numbers, np.ones(1, bool), ids[i : i + 1], texts[i : i + 1], own)
            except StoreError:
                whole[i] = False
        return whole

    def _refuse(
        self,
        error: type[StoreError],
        what: str,
        wrong: np.ndarray,
        ids: Sequence[str],
        source: _Source,
        remedy: str,
    ) -> None:
        if wrong.any() and self.on_missing == "error":
            names = [ids[i] for i in np.flatnonzero(wrong).tolist()]
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            listed = ", ".join(names[:_NAMED]) + more
            raise error(f"{what} {listed}", where=source.name, remedy=remedy + ', or on_missing = "skip"')

    def _read(
        self,
        source: _Source,
        numbers: list[int],
        present: np.ndarray,
        ids: Sequence[str],
        texts: Sequence[str],
        units: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[Positions, dict[str, torch.Tensor]]:
        """Positions of one teacher, and its targets by address."""
        lengths = np.zeros(len(ids), np.int64)
        states: dict[int, np.ndarray] = {}
        token_id, token_span = np.zeros(0, np.int64), np.zeros((0, 2), np.int32)
        if present.any():
            held = [ids[i] for i in np.flatnonzero(present).tolist()]
            lengths[present], token_id, token_span, states = self._gather(source, held, numbers)
        table_rows = self._vocabulary_rows(source, token_id)
        spans, position_lengths, tokens_of = self._positions(present, texts, units, token_span, lengths)
        kept = np.flatnonzero(tokens_of.covered)
        tokens_of = tokens_of if len(kept) == tokens_of.rows else tokens_of.select(kept)
        batch_of, index_in = places(position_lengths)
        batch_of, index_in, kept_spans = batch_of[kept], index_in[kept], spans[kept]
        grid = max(1, int(position_lengths.max(initial=0)))
        text_lengths = np.array([max(1, len(text)) for text in texts], np.float32)
        unit_weight = unit_rows = None
        if units is not None:
            to_positions = overlaps(spans, position_lengths, *units)
            unit_weight = torch.from_numpy(to_positions.padded(position_lengths, units[1]))
            if unit_weight.shape[1] < grid:
                unit_weight = unit_weight.new_zeros(len(ids), grid, unit_weight.shape[2])
            unit_rows = torch.from_numpy(np.flatnonzero(to_positions.covered[kept]))
        key = token_id
        if self.position != "token":
            # The text under a position is what it is an occurrence of
            names = [texts[b][i:j].casefold() for b, (i, j) in zip(batch_of, kept_spans.tolist(), strict=True)]
            # The same on every rank; 63 bits fit an int64
            hashes = {name: hash_text(name) >> 1 for name in set(names)}
            key = np.array([hashes[name] for name in names], np.int64)
        one_each = self.position == "token"
        positions = Positions(
            lengths=torch.from_numpy(position_lengths),
            grid=grid,
            row=torch.from_numpy(batch_of * grid + index_in),
            key=torch.from_numpy(np.asarray(key, np.int64)),
            place=torch.from_numpy(kept_spans.mean(1, dtype=np.float32) / text_lengths[batch_of]),
            query_row=torch.from_numpy(table_rows[tokens_of.column]),
            query_start=None if one_each else torch.from_numpy(tokens_of.start[:-1]),
            query_weight=None if one_each else torch.from_numpy(tokens_of.weight),
            unit_weight=unit_weight,
            unit_rows=unit_rows,
            masked=len(spans) - len(kept),
        )
        targets = {}
        for number in numbers:
            spec = self.views[number]
            if self.control == "static":
                values = source.table[table_rows].astype(np.float32)
            else:
                values = states.get(number, np.zeros((0, spec.width), np.float32))
            values = values if one_each else tokens_of.pool(values)
            target = torch.empty(values.shape, dtype=torch.float32, pin_memory=self.pin)
            np.subtract(values, spec.mean, out=target.numpy())
            values = target.numpy()
            values /= spec.std
            damaged = ~np.isfinite(values.sum(-1))
            if damaged.any():
                bad = ", ".join(dict.fromkeys(ids[b] for b in batch_of[damaged].tolist()))
                raise StoreError(
                    f"states that are not finite for {bad}",
                    where=spec.address,
                    remedy="run stillhouse inspect verify",
                )
            targets[spec.address] = target
        return positions, targets

    def _gather(
        self, source: _Source, ids: list[str], numbers: list[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, np.ndarray]]:
        """Lengths [b], token ids [ΣN], spans [ΣN, 2] of utterances, and states float32 [ΣN, D] by number of view."""
        store, teacher = source.store, source.teacher
        if self.control == "static":
            return *store.tokens(ids, teacher), {}
        giver = ids
        if source.donor is not None:
            giver = [store.index.id(int(r)) for r in source.donor[store.rows(ids)]]
        if self._words:
            theirs, token_id, span = store.tokens(giver, teacher)
            states = dict.fromkeys(numbers, word_codes(token_id, span, theirs))
        else:
            views = {n: source.views[n - source.numbers[0]] for n in numbers}
            found = store.gather(giver, list(views.values()))
            theirs, token_id, span = found.lengths[teacher], found.token_id[teacher], found.span[teacher]
            states = {n: to_float32(found.states[view], source.dtype) for n, view in views.items()}
        if source.donor is None:
            return theirs, token_id, span, states
        own = store.tokens(ids, teacher)
        begin = np.cumsum(theirs, dtype=np.int64) - theirs
        rows = expand(begin, own[0].astype(np.int64))
        return *own, {n: values[rows] for n, values in states.items()}

    def _positions(
        self,
        present: np.ndarray,
        texts: Sequence[str],
        units: tuple[np.ndarray, np.ndarray] | None,
        token_span: np.ndarray,
        token_lengths: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, Overlaps]:
        """Spans [ΣP, 2] of all positions, masked ones too, of the present utterances; lengths [B]; map to
        tokens.
        """
        if self.position == "token":
            return token_span, token_lengths, identity(len(token_span))
        if self.position == "word":
            none = np.zeros((0, 2), np.int32)
            spans, lengths = pack([word_spans(t) if here else none for t, here in zip(texts, present, strict=True)])
        else:
            assert units is not None
            spans, lengths = units[0][np.repeat(present, units[1])], np.where(present, units[1], 0)
        return spans, lengths, overlaps(spans, lengths, token_span, token_lengths)

    def _vocabulary_rows(self, source: _Source, token_id: np.ndarray) -> np.ndarray:
        if not len(token_id):
            return np.zeros(0, np.int64)
        row = np.searchsorted(source.vocabulary, token_id)
        found = source.vocabulary[np.minimum(row, len(source.vocabulary) - 1)] == token_id
        if not found.all():
            missing = np.unique(token_id[~found])[:_NAMED].tolist()
            raise StoreError(
                f"no input embedding of token ids {missing}",
                where=source.name,
                remedy="run stillhouse inspect verify",
            )
        return row.astype(np.int64)

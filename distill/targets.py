"""From stores to targets: reads what the views hold for a batch of utterances and lays it onto positions.

Invariant: what is read belongs to the transcripts given: an utterance that a store lacks, or holds from
another text, is an error that names it, or (on_missing="skip") counted and left out of that store's teachers;
never silently wrong. numpy and CPU tensors only, no state that changes: `read` runs in the trainer's prefetch
thread.
Exercised by: pytest tests/distill/test_targets.py; `stillhouse train CONFIG`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data.errors import ConfigError, StoreError
from ..data.manifest import Corpus
from ..extract.store import Store, View, hash_text
from .batch import Positions, TransferBatch
from .controls import CONTROLS
from .mixing import draw
from .spans import Overlaps, identity, overlaps, pack, places, word_spans
from .teacher_states import TeacherStates, ViewSpec

POSITIONS = ("token", "word", "unit")


class TargetReader:
    """Reads targets of several views, of several teachers, from one or several stores over the same corpus.

    sources      pairs of a store and the views of it to read (Store.resolve gives them)
    position     what has a target: "token" (each teacher's own), "word" or "unit" (ASR units)
    on_missing   "error", or "skip": leave the utterance out for the teachers that lack it, and count it
    sample       k: read k of the views a step, drawn by `seed` and step (mixing "sample"); None: all
    control      None; "shuffled": each utterance gets another's states of equal length; "static": the views of a
                 teacher are replaced by one, TEACHER/static, of its input embeddings; "words": by one, TEACHER/words,
                 of one-hot codes of the words; "words-shuffled": the same of another utterance's words
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
        self.views: list[ViewSpec] = []
        self._teachers: list[TeacherStates] = []
        for number, (store, views) in enumerate(sources, start=1):
            for teacher in dict.fromkeys(view.teacher for view in views):
                taken = any(known.name == teacher for known in self._teachers)
                own = dict.fromkeys(view for view in views if view.teacher == teacher)
                name = f"{teacher}@{number}" if taken else teacher
                self._teachers.append(TeacherStates(store, teacher, name, list(own), control, seed, corpus))
                self.views += self._teachers[-1].specs
        if not self.views:
            raise ConfigError("no views to read", remedy="name one, such as minilm/alone/6")
        if sample is not None:
            draw(len(self.views), sample, seed, 0)  # refuses now what it would refuse at the first step

    @property
    def embeddings(self) -> dict[str, torch.Tensor]:
        """The teachers' input embeddings, float16 [K, D], rows as the batches' `query_row` counts them."""
        return {teacher.name: torch.from_numpy(teacher.table) for teacher in self._teachers}

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
        first = 0
        for teacher in self._teachers:
            numbers = [n for n in range(len(teacher.specs)) if first + n in chosen]
            first += len(teacher.specs)
            present = np.zeros(len(ids), bool)
            if numbers:
                present = teacher.present(ids, texts, self.on_missing == "skip")
            try:
                read = self._read(teacher, numbers, present, ids, texts, units)
            except StoreError:
                if self.on_missing == "error":
                    raise
                present = self._undamaged(teacher, numbers, present, ids, texts, units)
                read = self._read(teacher, numbers, present, ids, texts, units)
            if numbers:
                skipped |= ~present
            positions[teacher.name] = read[0]
            targets |= read[1]
        return TransferBatch(len(ids), positions, targets, int(skipped.sum()))

    def _undamaged(
        self,
        teacher: TeacherStates,
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
                self._read(teacher, numbers, np.ones(1, bool), ids[i : i + 1], texts[i : i + 1], own)
            except StoreError:
                whole[i] = False
        return whole

    def _read(
        self,
        teacher: TeacherStates,
        numbers: list[int],
        present: np.ndarray,
        ids: Sequence[str],
        texts: Sequence[str],
        units: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[Positions, dict[str, torch.Tensor]]:
        """Positions of one teacher, and its targets by address."""
        held = [ids[i] for i in np.flatnonzero(present).tolist()]
        found = teacher.gather(held, numbers)
        lengths = np.zeros(len(ids), np.int64)
        lengths[present] = found.lengths
        spans, position_lengths, tokens_of = self._positions(present, texts, units, found.span, lengths)
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
        key = found.token_id
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
            query_row=torch.from_numpy(found.table_row[tokens_of.column]),
            query_start=None if one_each else torch.from_numpy(tokens_of.start[:-1]),
            query_weight=None if one_each else torch.from_numpy(tokens_of.weight),
            unit_weight=unit_weight,
            unit_rows=unit_rows,
            masked=len(spans) - len(kept),
        )
        targets = {}
        for number, values in zip(numbers, found.states, strict=True):
            spec = teacher.specs[number]
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

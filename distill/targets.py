"""From stores to targets: read the states of a batch of utterances and map them to the transfer positions.

Guarantees: states belong to the given transcripts, or to audio as long as that of the features. An utterance that a
store lacks, or holds from another text, is an error that names it. With on_missing="skip" it is counted and left out
for that store's teachers. All is numpy and CPU tensors, and no state changes, so `read` can run in the trainer's
read-ahead thread.
Try: `pytest tests/distill/test_targets.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.errors import ConfigError, StoreError
from ..data.manifest import Corpus
from ..extract.store import Store, View, hash_text
from .batch import Positions, TransferBatch
from .controls import CONTROLS
from .frames import StudentTimes, drawn, frame_keys, on_one_axis, reach, stretches
from .mixing import draw
from .spans import Overlaps, identity, overlaps, pack, places, word_spans
from .teacher_states import SpeechStates, TeacherStates, ViewSpec

POSITIONS = ("token", "word", "unit", "state")


@dataclass(frozen=True)
class _Utterances:
    """The utterances of one call of `read`: ids, transcripts, and packed spans of ASR units with their numbers.

    `rows` and `speeds` [B] are those of the features, of the position "state" alone.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    units: tuple[np.ndarray, np.ndarray] | None  # int32 [ΣU, 2], int64 [B]
    rows: np.ndarray
    speeds: np.ndarray
    step: int

    def only(self, i: int) -> _Utterances:
        """Return utterance i alone."""
        units = self.units
        if units is not None:
            first = int(units[1][:i].sum())
            units = units[0][first : first + int(units[1][i])], units[1][i : i + 1]
        one = slice(i, i + 1)
        return _Utterances(self.ids[one], self.texts[one], units, self.rows[one], self.speeds[one], self.step)


class TargetReader:
    """Reads targets of several views, of several teachers, from one or several stores over the same corpus.

    If two stores have a teacher of the same name, the later one is called NAME@2, NAME@3, … here.

    Arguments:
        sources: pairs of a store and its views to read, from `Store.resolve`.
        position: what has a target: "token" (each teacher's own), "word" or "unit" (ASR units) of text teachers, or
            "state" (encoder states), of speech teachers.
        on_missing: "error", or "skip" to leave an utterance out for the teachers that lack it, and count it.
        sample: read this many views in each step, drawn by `seed` and step, for the mixing "sample". None: all.
        control: None, or targets that a teacher's knowledge cannot explain. "shuffled" gives each utterance the states
            of another one of equal length. "static" replaces a teacher's views by one, TEACHER/static, of its input
            embeddings, and "words" by TEACHER/words, of one-hot codes of the words. "words-shuffled" takes the codes
            of another utterance's words.
        corpus: the whole manifest. With it, an utterance is also stale if its context saw other neighbours.
        pin: put targets into pinned memory, from which a CUDA device copies without waiting.
        codes: read the codes of views of dtype pq:M, for the distance "codes".
        student: when the encoder states are, for the position "state".
        share: how many of the encoder states have a target, of 1. Each step draws others, by `seed` and step.

    Raises:
        ConfigError: a choice is unknown, or there is no view, or a view that does not go with the position.
    """

    def __init__(
        self, sources: Sequence[tuple[Store, Sequence[View]]], position: str = "token", on_missing: str = "error", *,
        sample: int | None = None, control: str | None = None, seed: int = 0, corpus: Corpus | None = None,
        pin: bool = False, codes: bool = False, student: StudentTimes | None = None, share: float = 1.0,
    ) -> None:  # fmt: skip
        if control is not None and control not in CONTROLS:
            raise ConfigError(f"there is no control {control!r}", expected=", ".join(CONTROLS))
        if position not in POSITIONS:
            raise ConfigError(f"there is no position {position!r}", expected=", ".join(POSITIONS))
        if on_missing not in ("error", "skip"):
            raise ConfigError(f"on_missing cannot be {on_missing!r}", expected="error, skip")
        self.position, self.on_missing, self.sample, self.seed = position, on_missing, sample, seed
        self.control, self.pin, self.codes, self.share = control, pin, codes, share
        self.student = student if position == "state" else None
        if position == "state" and student is None:
            raise ConfigError("position 'state' needs the times of the encoder states")
        self.views: list[ViewSpec] = []
        self._teachers: list[TeacherStates] = []
        for number, (store, views) in enumerate(sources, start=1):
            for teacher in dict.fromkeys(view.teacher for view in views):
                taken = any(known.name == teacher for known in self._teachers)
                own = dict.fromkeys(view for view in views if view.teacher == teacher)
                name = f"{teacher}@{number}" if taken else teacher
                student = self._student_of(store, teacher, list(own))
                known = store, teacher, name, list(own), control, seed, corpus, codes
                self._teachers.append(TeacherStates(*known) if student is None else SpeechStates(*known, student))
                self.views += self._teachers[-1].specs
        if not self.views:
            raise ConfigError("there are no views to read", remedy="name one, such as minilm/alone/6")
        if sample is not None:
            draw(len(self.views), sample, seed, 0)  # An impossible number is an error now, not at the first step.

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """The teachers' input embeddings, float16 [K, D], with the rows that `query_row` of a batch counts."""
        return {teacher.name: torch.from_numpy(teacher.table) for teacher in self._teachers}

    def _student_of(self, store: Store, teacher: str, views: list[View]) -> StudentTimes | None:
        """Return the times of the encoder states if this is a speech teacher. Refuse one that has other positions."""
        if store.teacher(teacher).is_speech == (self.student is not None):
            return self.student
        if self.student is None:
            what, wanted, other = "is of a speech teacher, whose frames are no tokens", "text", '"frames"'
        else:
            what, wanted, other = "is of a text teacher, which has no frames", "speech", '"occupancy", or another'
        remedy = f"set aligner = {other}"
        raise ConfigError(f"the view {what}", where=views[0].address, expected=f"a {wanted} teacher", remedy=remedy)

    def read(
        self, ids: Sequence[str], texts: Sequence[str], unit_spans: Sequence[np.ndarray] | None = None, *,
        step: int = 0, rows: np.ndarray | None = None, speeds: Sequence[float] | None = None,
    ) -> TransferBatch:  # fmt: skip
        """Return the targets of B utterances.

        Arguments:
            ids: B utterance ids.
            texts: their raw transcripts in the manifest.
            unit_spans: one int32 [U, 2] for each utterance, from `Units.encode`. Position "unit" and the aligners
                "occupancy" and "predictor" need them.
            step: the training step, for `sample` and `share`.
            rows, speeds: the rows of features and the speed of each utterance, [B]. Position "state" needs the rows.

        Raises:
            NoStoreError: a store lacks utterances.
            StaleError: transcripts have changed since the extraction, or the features are of audio of another length.
            StoreError: stored states are damaged.
        """
        if self.position == "unit" and unit_spans is None:
            raise ConfigError("position 'unit' needs the spans of the ASR units")
        if self.student is not None and rows is None:
            raise ConfigError("position 'state' needs the rows of features of each utterance")
        if not len(ids) == len(texts) == len(ids if unit_spans is None else unit_spans):
            raise ValueError(f"{len(ids)} ids and {len(texts)} texts are not one batch")
        units = None if unit_spans is None else pack(unit_spans)
        rows = np.zeros(len(ids), np.int64) if rows is None else np.asarray(rows, np.int64)
        speed = np.ones(len(ids)) if speeds is None else np.asarray(speeds, np.float64)
        seconds = None if self.student is None else self.student.durations(rows, speed)
        batch = _Utterances(ids, texts, units, rows, speed, step)
        every = range(len(self.views))
        drawn = set(every if self.sample is None else draw(len(every), self.sample, self.seed, step))
        positions: dict[str, Positions] = {}
        targets: dict[str, Tensor] = {}
        skipped = np.zeros(len(ids), bool)
        first = 0
        for teacher in self._teachers:
            chosen = [n for n in range(len(teacher.specs)) if first + n in drawn]
            first += len(teacher.specs)
            present = np.zeros(len(ids), bool)
            if chosen:
                present = teacher.present(ids, texts, self.on_missing == "skip", seconds)
            try:
                positions[teacher.name], own = self._read(teacher, chosen, present, batch)
            except StoreError:
                if self.on_missing == "error":
                    raise
                present = self._undamaged(teacher, chosen, present, batch)
                positions[teacher.name], own = self._read(teacher, chosen, present, batch)
            if chosen:
                skipped |= ~present
            targets |= own
        return TransferBatch(len(ids), positions, targets, int(skipped.sum()))

    def _undamaged(
        self, teacher: TeacherStates, chosen: list[int], present: np.ndarray, batch: _Utterances
    ) -> np.ndarray:
        """Return which of the present utterances can be read, bool [B]. It reads one by one, since this is rare."""
        readable = present.copy()
        for i in np.flatnonzero(present).tolist():
            try:
                self._read(teacher, chosen, np.ones(1, bool), batch.only(i))
            except StoreError:
                readable[i] = False
        return readable

    def _read(
        self, teacher: TeacherStates, chosen: list[int], present: np.ndarray, batch: _Utterances
    ) -> tuple[Positions, dict[str, Tensor]]:
        """Return one teacher's positions in the present utterances, and the targets of its chosen views by address."""
        read = teacher.gather([batch.ids[i] for i in np.flatnonzero(present).tolist()], chosen)
        token_lengths = np.zeros(len(batch.ids), np.int64)
        token_lengths[present] = read.lengths
        if isinstance(teacher, SpeechStates):
            positions, batch_of, frames_of = self._states(teacher, present, batch, read.span, token_lengths)
            return positions, self._targets(teacher, chosen, read.states, batch, batch_of, frames_of)
        spans, lengths, tokens_of = self._positions(present, batch, read.span, token_lengths)
        kept = np.flatnonzero(tokens_of.covered)
        tokens_of = tokens_of if len(kept) == tokens_of.rows else tokens_of.select(kept)
        batch_of, index_in = (values[kept] for values in places(lengths))
        kept_spans = spans[kept]
        grid = max(1, int(lengths.max(initial=0)))
        text_lengths = np.array([max(1, len(text)) for text in batch.texts], np.float32)
        unit_weight = unit_rows = None
        if batch.units is not None:
            units_of = overlaps(spans, lengths, *batch.units)
            unit_weight = torch.from_numpy(units_of.padded(lengths, batch.units[1]))
            if unit_weight.shape[1] < grid:
                unit_weight = unit_weight.new_zeros(len(batch.ids), grid, unit_weight.shape[2])
            unit_rows = torch.from_numpy(np.flatnonzero(units_of.covered[kept]))
        is_token = self.position == "token"
        key = read.token_id
        if not is_token:
            # Equal texts under two positions make them occurrences of one word.
            words = [batch.texts[b][i:j].casefold() for b, (i, j) in zip(batch_of, kept_spans.tolist(), strict=True)]
            # The hash is the same on each rank, and 63 bits fit an int64.
            hashes = {word: hash_text(word) >> 1 for word in set(words)}
            key = np.array([hashes[word] for word in words], np.int64)
        positions = Positions(
            lengths=torch.from_numpy(lengths),
            grid=grid,
            row=torch.from_numpy(batch_of * grid + index_in),
            key=torch.from_numpy(np.asarray(key, np.int64)),
            place=torch.from_numpy(kept_spans.mean(1, dtype=np.float32) / text_lengths[batch_of]),
            query_row=torch.from_numpy(read.table_row[tokens_of.column]),
            query_start=None if is_token else torch.from_numpy(tokens_of.start[:-1]),
            query_weight=None if is_token else torch.from_numpy(tokens_of.weight),
            unit_weight=unit_weight,
            unit_rows=unit_rows,
            masked=len(spans) - len(kept),
            share=torch.from_numpy(tokens_of.listed()[1]) if self.codes else None,
        )
        pooled = None if is_token and not self.codes else tokens_of
        return positions, self._targets(teacher, chosen, read.states, batch, batch_of, pooled)

    def _states(
        self, teacher: SpeechStates, present: np.ndarray, batch: _Utterances, frame_span: np.ndarray,
        frame_lengths: np.ndarray,
    ) -> tuple[Positions, np.ndarray, Overlaps]:  # fmt: skip
        """Return the encoder states that have a target, the utterance of each, and the map from them to frames."""
        student = teacher.student
        lengths = np.where(present, student.states(batch.rows), 0)
        index, counts = drawn(lengths, self.share, batch.ids, self.seed, batch.step)
        speeds = np.repeat(batch.speeds, counts)
        spans, frames = on_one_axis(stretches(index, student.middle_s, student.hz, speeds), frame_span)
        frames_of = overlaps(spans, counts, frames, frame_lengths)
        kept = np.flatnonzero(frames_of.covered)
        frames_of = frames_of.select(kept)
        batch_of, grid = np.repeat(np.arange(len(lengths)), counts)[kept], max(1, int(lengths.max(initial=0)))
        index = index[kept]
        none = torch.zeros(0, dtype=torch.int64)
        positions = Positions(
            lengths=torch.from_numpy(lengths),
            grid=grid,
            row=torch.from_numpy(batch_of * grid + index),
            key=torch.from_numpy(frame_keys(batch.ids, np.bincount(batch_of, minlength=len(lengths)), index)),
            place=torch.from_numpy(((index + 0.5) / lengths[batch_of]).astype(np.float32)),
            query_row=none,
            query_start=None,
            query_weight=None,
            unit_weight=None,
            unit_rows=None,
            masked=len(spans) - len(kept),
            share=torch.from_numpy(frames_of.listed()[1]) if self.codes else None,
            reach=reach(student.hz, teacher.hz),
        )
        return positions, batch_of, frames_of

    def _targets(
        self, teacher: TeacherStates, chosen: list[int], states_of_views: list[np.ndarray], batch: _Utterances,
        batch_of: np.ndarray, pieces_of: Overlaps | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the targets of each view by its address. The pieces are tokens or frames, None: one a position."""
        targets = {}
        for number, states in zip(chosen, states_of_views, strict=True):
            spec = teacher.specs[number]
            if self.codes:
                assert pieces_of is not None
                targets[spec.address] = torch.from_numpy(states[pieces_of.listed()[0]])
                continue
            target, damaged = self._standardise(states if pieces_of is None else pieces_of.pool(states), spec)
            if damaged.any():
                ids = ", ".join(dict.fromkeys(batch.ids[b] for b in batch_of[damaged].tolist()))
                raise StoreError(
                    f"states that are not finite for {ids}", where=spec.address, remedy="run stillhouse inspect verify"
                )
            targets[spec.address] = target
        return targets

    def _standardise(self, states: np.ndarray, spec: ViewSpec) -> tuple[Tensor, np.ndarray]:
        """Return the targets float32 [M, D] of a view's states, and which of them are not finite, bool [M]."""
        target = torch.empty(states.shape, dtype=torch.float32, pin_memory=self.pin)
        values = target.numpy()
        np.subtract(states, spec.mean, out=values)
        values /= spec.std
        return target, ~np.isfinite(values.sum(-1))

    def _positions(
        self, present: np.ndarray, batch: _Utterances, token_span: np.ndarray, token_lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Overlaps]:
        """Return spans [ΣP, 2] of all positions, masked ones too, their numbers int [B], and the map to tokens."""
        if self.position == "token":
            return token_span, token_lengths, identity(len(token_span))
        if self.position == "word":
            none = np.zeros((0, 2), np.int32)
            spans, lengths = pack([word_spans(t) if p else none for t, p in zip(batch.texts, present, strict=True)])
        else:
            assert batch.units is not None
            unit_spans, counts = batch.units
            spans, lengths = unit_spans[np.repeat(present, counts)], np.where(present, counts, 0)
        return spans, lengths, overlaps(spans, lengths, token_span, token_lengths)

"""What changed in a corpus since a store was made from it: new, changed and removed utterances, and stale contexts.

Guarantees: an utterance is stale in a context exactly when the model would now get a different input for it. Input
hashes decide that, for every session that has changed. Nothing is written here.
Try: `stillhouse extract CORPUS STORE --teacher …` with a changed corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...data.errors import StaleError, first_few
from ...data.manifest import Corpus, Utterance
from ..speech.sounds import same_sounds
from ..speech.teacher import ALONE, AnyTeacher, SpeechTeacher
from ..store.disk.layout import hash_text
from ..store.format.arrays import RawArray
from ..store.format.commits import Commits
from ..store.format.index import Index
from ..store.format.plan import Plan, TeacherRecord
from ..store.read.rows import TeacherRows
from ..store.views import parse_context
from ..teacher.contexts import ItemWindows, TokenLists, Window, WindowFormat, item_windows, window_lengths
from ..teacher.tokenizer import Tokeniser, Tokens
from .layout import PlanDraft, order_sessions

TRIED_TEXTS = 48  # in each context, the shortest and the longest among them


@dataclass(frozen=True)
class CorpusDiff:
    """A corpus in the order of a store, compared with the one that a teacher's states were made from."""

    utterances: list[Utterance]
    session: np.ndarray  # int32 [n], session of each utterance
    rows: np.ndarray  # int64 [n], row of each utterance with an unchanged text (or audio), or -1
    replaces: np.ndarray  # int64 [n], row of the same id, or -1
    removed: list[str]  # ids that the corpus does not have any more
    split: str | None = None  # the part of the corpus that was read
    stale: dict[str, np.ndarray] = field(default_factory=dict)  # {context: positions of utterances with another input}
    compared: str = "text"  # what was compared: the "text", or the "audio" for a speech teacher
    # Positions of utterances with the audio of their row and another text: a row has one text, so it is copied.
    retold: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @cached_property
    def keep(self) -> np.ndarray:
        """bool [n]: utterances whose row stays."""
        keep = self.rows >= 0
        for positions in (*self.stale.values(), self.retold):
            keep[positions] = False
        return keep

    @property
    def changed(self) -> list[str]:
        """Ids of utterances with another text, or other audio."""
        return [u.id for u, row, old in zip(self.utterances, self.rows, self.replaces) if row < 0 <= old]

    def check(self, plan: Plan, teacher: str) -> None:
        """Raise StaleError, with what differs, unless the corpus only adds utterances."""
        differences = []
        if changed := self.changed:
            other = "another text" if self.compared == "text" else "other audio"
            differences.append(f"{_count(changed)} {other} than in the store: {first_few(changed)}")
        stale = sorted({int(p) for positions in self.stale.values() for p in positions})
        if stale:
            names = [self.utterances[p].id for p in stale]
            views = ", ".join(f"{teacher}/{c}: {len(p):,}" for c, p in self.stale.items() if len(p))
            differences.append(
                f"{_count(names)} other neighbours than their contexts saw ({views}): {first_few(names)}"
            )
        if self.removed:
            differences.append(
                f"{len(self.removed):,} utterances of the store are not in the corpus: {first_few(self.removed)}"
            )
        if differences:
            raise StaleError(
                "; ".join(differences),
                where=plan.paths.root,
                remedy="the same command with --refresh extracts these again and hides those not in the corpus",
            )


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,} utterances have" if len(names) > 1 else "1 utterance has"


def diff_corpus(plan: Plan, corpus: Corpus, record: TeacherRecord, teacher: AnyTeacher) -> CorpusDiff | None:
    """Return what changed for a teacher, or None. A new teacher is compared with the newest table of utterances.

    A text teacher compares texts and their order, and a speech teacher the audio of each utterance.
    """
    known = record.name in plan.teachers
    index = Index(plan.paths, plan.edition(record.name if known else None))
    seed = (plan.latest(record.name) if known else plan.generations[0]).seed
    sessions = order_sessions(corpus, seed)
    utterances = [corpus.utterances[i] for s in sessions for i in s]
    sizes = np.array([len(s) for s in sessions])
    session = np.repeat(np.arange(len(sessions), dtype=np.int32), sizes)
    replaces = index.rows([u.id for u in utterances])
    texts = np.array([hash_text(u.text) for u in utterances], dtype=np.uint64)
    same = (replaces >= 0) & (index.text_hash[np.maximum(replaces, 0)] == texts)
    if isinstance(teacher, SpeechTeacher):
        rows = _rows_of_same_sound(plan, record, teacher, utterances, replaces) if known else replaces
        touched = rows < 0
    else:
        rows = np.where(same, replaces, -1)
        touched = ~_unchanged(index, rows, session, sizes)
    in_corpus = np.zeros(len(index), dtype=bool)
    in_corpus[replaces[replaces >= 0]] = True
    removed = np.flatnonzero(index.live & ~in_corpus)
    if not touched.any() and not len(removed):
        return None
    ids = [index.id(row) for row in removed.tolist()]
    corpus_diff = CorpusDiff(utterances, session, rows, replaces, ids, corpus.split)
    if isinstance(teacher, SpeechTeacher):
        return replace(corpus_diff, compared="audio", retold=np.flatnonzero((rows >= 0) & ~same))
    if known:
        corpus_diff.stale.update(_stale(plan, record, teacher.tokeniser, corpus_diff, touched))
    return corpus_diff


def _rows_of_same_sound(
    plan: Plan, record: TeacherRecord, teacher: SpeechTeacher, utterances: list[Utterance], replaces: np.ndarray
) -> np.ndarray:
    """int64 [n]: the row of each utterance whose audio is the one that the store knows, or -1."""
    known = np.flatnonzero(replaces >= 0)
    rows, teacher_rows = replaces[known], TeacherRows(plan, record.name)
    array, commits = RawArray(plan.paths, record.name, "input_hash").read(0), Commits(plan.paths, record.name, ALONE)
    committed = {shard for shard, _ in commits.of}
    shards = (teacher_rows.start[rows] // teacher_rows.shard_rows).tolist()
    same = same_sounds(
        teacher.corpus,
        [utterances[p] for p in known.tolist()],
        source=teacher_rows.audio_source(rows),
        hashes=array[rows],
        extracted=np.array([s in committed for s in shards], bool) & (teacher_rows.length[rows] > 0),
        encoder=teacher.encoder,
        length=teacher_rows.length[rows],
    )
    found = np.full(len(replaces), -1)
    found[known[same]] = rows[same]
    return found


def _unchanged(index: Index, rows: np.ndarray, session: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """bool [n]: utterances whose whole session has the same utterances and texts in the same order as before."""
    old = index.session_of
    begins = np.flatnonzero(np.diff(old, prepend=old[0] - 1)) if len(old) else np.zeros(0, int)
    old_size = np.diff(np.append(begins, len(old)))
    run = np.repeat(np.arange(len(begins)), old_size)  # of each position in the old order
    position = np.where(rows >= 0, index.position[np.maximum(rows, 0)], 0)
    first = np.cumsum(sizes) - sizes
    inside = np.arange(len(rows)) - first[session]
    same = rows >= 0
    same &= (run[position] == run[position[first]][session]) & (position - begins[run[position]] == inside)
    same &= old_size[run[position]] == sizes[session]
    return np.logical_and.reduceat(same, first)[session]


def _stale(
    plan: Plan, record: TeacherRecord, tokeniser: Tokeniser, corpus_diff: CorpusDiff, touched: np.ndarray
) -> dict[str, np.ndarray]:
    """{context: positions}: utterances with an unchanged text for which the model would get a different input."""
    candidates = np.flatnonzero(touched & (corpus_diff.rows >= 0))
    if not len(candidates):
        return {}
    teacher_rows, core_tokens = TeacherRows(plan, record.name), plan.latest(record.name).core_tokens
    new = np.flatnonzero(touched & (corpus_diff.rows < 0)).tolist()
    tokens = tokeniser.encode([corpus_diff.utterances[p].text for p in new], record.transform)
    texts = CorpusTexts(corpus_diff.rows, teacher_rows, split_tokens(tokens, new))
    rows = corpus_diff.rows[candidates]
    shards = (teacher_rows.start[rows] // teacher_rows.shard_rows).tolist()
    stale = {}
    for context, layers in plan.views(record.name).items():
        windows = windows_of(record, context, core_tokens, texts, corpus_diff.session, candidates)
        array = RawArray(plan.paths, record.name, "input_hash")
        stored = array.read(plan.teachers[record.name].contexts.index(context))
        commits = Commits(plan.paths, record.name, context)
        committed = {s: any((s, k) in commits.of for k in layers) for s in set(shards)}
        readable = np.array([committed[s] for s in shards], dtype=bool) & (teacher_rows.length[rows] > 0)
        stale[context] = candidates[readable & (stored[rows] != windows.input_hash)]
    return stale


def split_tokens(tokens: Tokens, positions: Sequence[int]) -> dict[int, np.ndarray]:
    """Return {position: token ids} of utterances that were tokenised together."""
    return dict(zip(positions, np.split(tokens.ids, np.cumsum(tokens.length)[:-1])))


class CorpusTexts:
    """Token ids of a corpus by position; a slice gives a list of arrays.

    Arguments:
        rows: the store's row of each utterance, or -1.
        teacher_rows: tokens of a teacher in the store; None if `new` has all of them.
        new: {position: token ids} of utterances without a row.
    """

    def __init__(
        self, rows: np.ndarray, teacher_rows: TeacherRows | None, new: Mapping[int, np.ndarray] | None = None
    ) -> None:
        self._rows, self._teacher_rows, self._new = rows, teacher_rows, new or {}

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        rows = self._rows[which]
        stored: list[np.ndarray] = []
        if self._teacher_rows is not None and (rows >= 0).any():
            ranges = self._teacher_rows.ranges(rows[rows >= 0])
            stored = np.split(self._teacher_rows.tokens(self._teacher_rows.token_id, ranges), ranges.into[1:])
        first, parts = which.indices(len(self._rows))[0], iter(stored)
        return [next(parts) if row >= 0 else self._new[first + i] for i, row in enumerate(rows.tolist())]


def windows_of(
    record: TeacherRecord, context: str, core_tokens: int, texts: TokenLists, session: np.ndarray, positions: np.ndarray
) -> ItemWindows:
    """Return the windows of a teacher for utterances that are given by their positions in the corpus."""
    return item_windows(parse_context(context), format_of(record, core_tokens), texts, session, positions)


def format_of(record: TeacherRecord, core_tokens: int) -> WindowFormat:
    """Return what a teacher puts around a text, and how long its windows are."""
    causal = record.kind == "decoder"
    return WindowFormat(record.prefix_ids, record.suffix_ids, record.join_ids, record.window, core_tokens, causal)


def tried_windows(
    record: TeacherRecord, core_tokens: int, texts: TokenLists, length: np.ndarray, session: np.ndarray
) -> list[Window]:
    """Return the windows of some utterances in each context of a teacher: the shortest, the longest, some between.

    `length` is int64 [n], the tokens of each utterance of the corpus.
    """
    windows: list[Window] = []
    for context in record.contexts:
        tokens = window_lengths(parse_context(context), format_of(record, core_tokens), length, session)
        texts_with = np.flatnonzero(tokens)
        if len(texts_with):
            ranked = texts_with[np.argsort(tokens[texts_with], kind="stable")]
            spread = np.linspace(0, len(ranked) - 1, TRIED_TEXTS).round().astype(int)
            positions = np.unique(ranked[spread])
            windows += windows_of(record, context, core_tokens, texts, session, positions).windows
    return windows


class DraftedCorpus:
    """The corpus of a draft in its order: `texts`, `session` and `length`; and `position` by row, or -1."""

    def __init__(self, draft: PlanDraft, name: str) -> None:
        plan, layout, new_rows = draft.plan, draft.layout, draft.new_rows
        if new_rows is not None:
            order, self.session, count = new_rows.order, new_rows.session, new_rows.first + len(new_rows.ids)
        elif layout is not None and len(plan.generations) == 1:
            order, self.session, count = np.arange(len(layout.ids)), layout.session, len(layout.ids)
        else:
            index = Index(plan.paths, plan.edition(name))
            order, self.session, count = index.order, index.session_of, len(index)
        self.position = np.full(count, -1)
        self.position[order] = np.arange(len(order))
        # Rows from `first` on are not on disk yet, and the draft has their tokens.
        first = 0 if layout is not None else count if new_rows is None else new_rows.first
        tokens = layout.tokens if layout is not None else None if new_rows is None else new_rows.tokens
        teacher_rows = None if layout is not None else TeacherRows(plan, name)
        stored = np.where(order < first, order, -1)
        self.length = np.zeros(len(order), np.int64)
        if teacher_rows is not None:
            self.length[stored >= 0] = teacher_rows.length[stored[stored >= 0]]
        if tokens is not None:
            self.length[stored < 0] = tokens.length[order[stored < 0] - first]
        self._draft = draft
        if isinstance(tokens, Tokens) or (tokens is None and not plan.teachers[name].is_speech):
            new = {} if tokens is None else split_tokens(tokens, self.position[first:].tolist())
            self.texts = CorpusTexts(stored, teacher_rows, new)

    def ids(self, rows: range) -> list[str]:
        """Return the ids of rows."""
        plan, layout, new_rows = self._draft.plan, self._draft.layout, self._draft.new_rows
        if layout is not None:
            return layout.ids[rows.start : rows.stop]
        if new_rows is None:
            index = Index(plan.paths, plan.edition())
            return [index.id(row) for row in rows]
        index = Index(plan.paths, max(g.edition for g in plan.generations if g.edition != new_rows.number))
        return [index.id(row) if row < new_rows.first else new_rows.ids[row - new_rows.first] for row in rows]

    def around(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the session before and after each utterance, int64 [n] each."""
        ends = np.cumsum(self.length)
        first = np.flatnonzero(np.diff(self.session, prepend=-1))
        begin = np.repeat((ends - self.length)[first], np.diff(np.append(first, len(ends))))
        end = np.repeat(ends[np.append(first[1:], len(ends)) - 1], np.diff(np.append(first, len(ends))))
        return ends - self.length - begin, end - ends

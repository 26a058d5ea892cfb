"""What a corpus has become since a store was made from it: new, changed and removed utterances, stale contexts.

Invariant: an utterance is stale in a context exactly when the model would be fed something else for it now; input
hashes decide, over every window of every session that is not as it was. Nothing is written here.
Run: `stillhouse extract CORPUS STORE --teacher …` with a corpus that has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...data.errors import StaleError
from ...data.manifest import Corpus, Utterance
from ..store.disk.layout import hash_text
from ..store.format.arrays import RawArray
from ..store.format.commits import Commits
from ..store.format.index import Index
from ..store.format.plan import Plan, TeacherRecord
from ..store.read.rows import TeacherRows
from ..store.views import parse_context
from ..teacher.contexts import ItemWindows, TokenLists, WindowFormat, item_windows, session_bounds
from ..teacher.tokenizer import Tokeniser, Tokens
from .layout import order_sessions

NAMED = 5


@dataclass(frozen=True)
class CorpusDiff:
    """A corpus as it is now, in the order of the store, against the edition that a teacher is at.

    rows int64 [n]: the row of each utterance whose text is as it was, else -1; replaces int64 [n]: the row of the same
    id, else -1; keep bool [n]: its row serves on; stale: {context: positions of utterances that saw something else}.
    """

    utterances: list[Utterance]
    session: np.ndarray
    rows: np.ndarray
    replaces: np.ndarray
    gone: list[str]
    split: str | None = None
    stale: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def keep(self) -> np.ndarray:
        keep = self.rows >= 0
        for positions in self.stale.values():
            keep[positions] = False
        return keep

    @property
    def changed(self) -> list[str]:
        return [u.id for u, r, b in zip(self.utterances, self.rows, self.replaces) if r < 0 <= b]

    @property
    def only_adds(self) -> bool:
        return not (self.gone or self.changed or any(len(p) for p in self.stale.values()))

    def check(self, plan: Plan, teacher: str) -> None:
        """Errors: StaleError naming what of the store is no longer what the corpus says."""
        if self.only_adds:
            return
        found = []
        if changed := self.changed:
            found.append(f"{_count(changed)} another text than in the store: {some(changed)}")
        stale = sorted({int(p) for positions in self.stale.values() for p in positions})
        if stale:
            names = [self.utterances[p].id for p in stale]
            views = ", ".join(f"{teacher}/{c}: {len(p):,}" for c, p in self.stale.items() if len(p))
            found.append(f"{_count(names)} other neighbours than their contexts saw ({views}): {some(names)}")
        if self.gone:
            found.append(f"{len(self.gone):,} utterances of the store are not in the corpus: {some(self.gone)}")
        raise StaleError(
            "; ".join(found),
            where=plan.paths.root,
            remedy="the same command with --refresh extracts just these again and drops what is not in the corpus",
        )


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,} utterances have" if len(names) > 1 else "1 utterance has"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def diff_corpus(plan: Plan, corpus: Corpus, record: TeacherRecord, tokeniser: Tokeniser) -> CorpusDiff | None:
    """What has changed for a teacher, or None. One that is new to the store is compared with the newest edition."""
    known = record.name in plan.teachers
    index = Index(plan.paths.data / "utterances", plan.edition(record.name if known else None))
    seed = (plan.latest(record.name) if known else plan.generations[0]).seed
    sessions = order_sessions(corpus, seed)
    utterances = [corpus.utterances[i] for s in sessions for i in s]
    sizes = np.array([len(s) for s in sessions])
    session = np.repeat(np.arange(len(sessions), dtype=np.int32), sizes)
    replaces = index.rows([u.id for u in utterances])
    texts = np.array([hash_text(u.text) for u in utterances], dtype=np.uint64)
    same = (replaces >= 0) & (index.text_hash[np.maximum(replaces, 0)] == texts)
    rows = np.where(same, replaces, -1)
    touched = ~_as_before(index, rows, session, sizes)
    here = np.zeros(len(index), dtype=bool)
    here[replaces[replaces >= 0]] = True
    lost = np.flatnonzero(index.live & ~here)
    if not touched.any() and not len(lost):
        return None
    change = CorpusDiff(utterances, session, rows, replaces, [index.id(int(r)) for r in lost], corpus.split)
    if known:
        change.stale.update(_stale(plan, record, tokeniser, change, touched))
    return change


def _as_before(index: Index, rows: np.ndarray, session: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """bool [n]: utterances whose whole session is as it was: the same ones with the same texts, in the same order."""
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
    plan: Plan, record: TeacherRecord, tokeniser: Tokeniser, change: CorpusDiff, touched: np.ndarray
) -> dict[str, np.ndarray]:
    """{context: positions}: of utterances whose text is as it was, those that would be fed something else."""
    candidates = np.flatnonzero(touched & (change.rows >= 0))
    views = plan.views(record.name)
    if not len(candidates):
        return {}
    t, g = TeacherRows(plan, record.name), plan.latest(record.name)
    texts = PlannedTexts(
        t, change.rows, tokenise(change, np.flatnonzero(touched & (change.rows < 0)), tokeniser, record)
    )
    found = {}
    for context, layers in views.items():
        work = windows_of(record, context, g.core_tokens, texts, change.session, candidates)
        rows = change.rows[candidates]
        stored = RawArray(plan.paths.data / record.name / "input_hash").read(
            plan.teachers[record.name].contexts.index(context)
        )
        commits = Commits(plan.paths, record.name, context)
        shards = t.start[rows] // t.shard_rows
        made = {s: any((s, k) in commits.of for k in layers) for s in np.unique(shards).tolist()}
        there = np.array([made[s] for s in shards.tolist()], dtype=bool) & (t.length[rows] > 0)
        found[context] = candidates[there & (stored[rows] != work.input_hash)]
    return found


def tokenise(
    change: CorpusDiff, positions: np.ndarray, tokeniser: Tokeniser, record: TeacherRecord
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{position: (token ids, spans)} of utterances whose tokens the store does not have."""
    tokens = tokeniser.encode([change.utterances[p].text for p in positions.tolist()], record.transform)
    return split_tokens(tokens, positions.tolist())


def split_tokens(tokens: Tokens, positions: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    ends = np.cumsum(tokens.length)[:-1]
    return dict(zip(positions, zip(np.split(tokens.ids, ends), np.split(tokens.span, ends))))


class PlannedTexts:
    """Token ids of a corpus by position: of a store's rows, and `more` for those that it does not have."""

    def __init__(self, t: TeacherRows, rows: np.ndarray, more: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
        self._t, self._rows, self._more = t, rows, more

    def __getitem__(self, which: slice) -> list[np.ndarray]:
        rows = self._rows[which]
        places = self._t.places(rows[rows >= 0])
        stored = iter(np.split(self._t.tokens(self._t.token_id, places), places.into[1:]) if len(places.start) else [])
        first = which.indices(len(self._rows))[0]
        return [next(stored) if r >= 0 else self._more[first + i][0] for i, r in enumerate(rows.tolist())]


def windows_of(
    record: TeacherRecord,
    context: str,
    core: int,
    texts: TokenLists,
    session: np.ndarray,
    wanted: Sequence[int] | np.ndarray,
) -> ItemWindows:
    """The windows that a teacher is fed for some utterances of a corpus, in one context."""
    causal = record.kind == "decoder"
    form = WindowFormat(record.prefix_ids, record.suffix_ids, record.join_ids, record.window, core, causal)
    return item_windows(parse_context(context), form, texts, session, wanted)


__all__ = ["CorpusDiff", "PlannedTexts", "diff_corpus", "session_bounds", "some", "tokenise", "windows_of"]

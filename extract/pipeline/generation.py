"""Draft the next plan of a store: a new store, a new teacher, more views, or a changed corpus.

Guarantees: nothing is written here. Rows, tokens and committed files of earlier generations stay as they are: a
generation adds work and rows, and drops what is not needed any more.
Try: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ...data.errors import StaleError, StoreError
from ...data.manifest import Corpus, Utterance
from ..speech.sounds import Sounds
from ..speech.teacher import AnyTeacher, SpeechTeacher
from ..store.disk.files import StoreFiles
from ..store.disk.layout import hash_text
from ..store.disk.paths import Paths
from ..store.format.arrays import RawArray
from ..store.format.commits import Commits
from ..store.format.index import Index
from ..store.format.plan import Generation, Plan, PlannedWork, Shard, TeacherRecord, read_plan
from ..store.read.rows import TeacherRows
from ..store.writer import versions
from ..teacher.exact import choose_passes, give_same_states
from ..teacher.passes import PADDED
from ..teacher.tokenizer import Tokeniser, Tokens
from .corpus_diff import CorpusDiff, DraftedCorpus, diff_corpus, tried_windows
from .layout import (
    Layout,
    NewRows,
    PlanDraft,
    check_sounds,
    cut_layout,
    cut_shards,
    lay_out,
    read_input,
)
from .request import Request, check_settings, differences


def draft_plan(
    files: StoreFiles,
    corpus: Corpus,
    teacher: AnyTeacher,
    record: TeacherRecord,
    request: Request,
    refresh: bool = False,
) -> PlanDraft:
    """Draft the plan that holds all that is asked for. With `refresh`, rows that differ from the corpus are dropped.

    Raises:
        StaleError: the store was made with other settings or, without `refresh`, from other texts.
        TeacherError: the tokens do not fit the model, most of the text is unknown to the tokenizer, or the model cannot
            run the corpus's windows as transformers would.
    """
    draft = _draft(files, corpus, teacher, record, request, refresh)
    draft = replace(draft, warnings=_check_tokens(draft, teacher))
    return _with_passes(draft, teacher, record.name)


def _draft(
    files: StoreFiles, corpus: Corpus, teacher: AnyTeacher, record: TeacherRecord, request: Request, refresh: bool
) -> PlanDraft:
    """The draft before its tokens are checked, and the teacher is asked how windows go through it."""
    if not Paths(files).store_json.exists():
        return plan_new_store(files, corpus, teacher, record, request)
    plan = read_plan(files)
    if is_unused(plan, record):
        number, plan = next_generation(plan), without_teacher(plan, record.name)
        if not plan.teachers:
            return replace(plan_new_store(files, corpus, teacher, record, request), replaces=True)
        corpus_diff = diff_corpus(plan, corpus, record, teacher)
        draft = plan_new_teacher(plan, corpus, teacher, record, request, corpus_diff, number)
        return replace(draft, replaces=True)
    check_settings(plan, record)
    corpus_diff = diff_corpus(plan, corpus, record, teacher)
    if corpus_diff is not None and not refresh:
        corpus_diff.check(plan, record.name)
    if record.name not in plan.teachers:
        return plan_new_teacher(plan, corpus, teacher, record, request, corpus_diff)
    if corpus_diff is not None or missing_views(plan, record):
        return plan_more_views(plan, teacher, record, corpus_diff)
    return PlanDraft(plan, new=False)


def is_unused(plan: Plan, record: TeacherRecord) -> bool:
    """Whether a store has a teacher of this name, no states of it, and other settings or none of its batches tried.

    Then it can be planned again.
    """
    old = plan.teachers.get(record.name)
    if old is None or not plan.paths.files.has_locks:
        return False
    if not differences(old, record) and plan.is_compared(record.name):
        return False
    commits = (Commits(plan.paths, old.name, context).of for context in old.contexts)
    return all(shard == "norms" for of in commits for shard, _ in of)


def without_teacher(plan: Plan, name: str) -> Plan:
    """Return a plan without a teacher and its generations."""
    teachers = {n: t for n, t in plan.teachers.items() if n != name}
    return replace(plan, teachers=teachers, generations=[g for g in plan.generations if g.teacher != name])


def _check_tokens(draft: PlanDraft, teacher: AnyTeacher) -> list[str]:
    """Return warnings about the tokens that a draft adds. Few new texts may all be unknown, so only all texts fail."""
    layout, rows = draft.layout, draft.new_rows
    added = layout.tokens if layout is not None else rows.tokens if rows is not None else None
    if isinstance(teacher, SpeechTeacher):
        return added.notes if isinstance(added, Sounds) else []
    tokeniser = teacher.tokeniser
    if not isinstance(tokeniser, Tokeniser):
        return []
    if layout is not None and isinstance(added, Tokens):
        return tokeniser.check(added, layout.ids, teacher.source, teacher.embedding_rows)
    if rows is not None and isinstance(added, Tokens):
        return tokeniser.check(added, rows.ids, teacher.source, teacher.embedding_rows, judge=False)
    return []


def plan_new_store(
    files: StoreFiles, corpus: Corpus, teacher: AnyTeacher, record: TeacherRecord, request: Request
) -> PlanDraft:
    """Draft the plan of a new store."""
    layout = lay_out(corpus, teacher, request.transform, request.seed, request.dtype)
    batch = request.batch_sizes(teacher.device)
    generation = first_generation(0, record, layout, batch, request.core_tokens, request.seed)
    facts = {"utterances": len(layout.ids), "sessions": int(layout.session[-1]) + 1} | _split(corpus.split)
    plan = Plan(Paths(files), generation.created, facts, versions(), {record.name: record}, [generation])
    return PlanDraft(plan, layout)


def plan_new_teacher(
    plan: Plan,
    corpus: Corpus,
    teacher: AnyTeacher,
    record: TeacherRecord,
    request: Request,
    corpus_diff: CorpusDiff | None,
    number: int | None = None,
) -> PlanDraft:
    """Draft a plan with another teacher: the same utterances in the same rows, with its own tokens and shards.

    `number` is the generation's; None: the next.
    """
    index, first = Index(plan.paths, plan.edition()), plan.generations[0]
    number, edition, new_rows = next_generation(plan) if number is None else number, plan.edition(), None
    rows, ids = index.row, [""] * len(index)
    for row in index.row.tolist():
        ids[row] = index.id(row)
    if corpus_diff is not None:
        new_rows = _changed_table(corpus_diff, np.flatnonzero(~corpus_diff.keep), number, len(index))
        edition, rows, ids = number, new_rows.order, ids + new_rows.ids
    utterances: list[Utterance | None] = [None] * len(ids)
    for row in rows.tolist():
        utterances[row] = corpus.by_id[ids[row]]
    tokens = read_input(teacher, utterances, record.transform)
    if isinstance(tokens, Sounds):
        check_sounds(tokens, corpus)
    layout = cut_layout(ids, tokens, record.width, record.dtype)
    batch = request.batch_sizes(teacher.device)
    generation = first_generation(number, record, layout, batch, first.core_tokens, first.seed, edition)
    return PlanDraft(_with_generation(plan, record, generation, corpus_diff), layout, new_rows)


def plan_more_views(
    plan: Plan, teacher: AnyTeacher, record: TeacherRecord, corpus_diff: CorpusDiff | None = None
) -> PlanDraft:
    """Draft a plan with more views of a teacher that the store has, and with what has changed in the corpus."""
    old, latest = plan.teachers[record.name], plan.latest(record.name)
    views, missing, number = plan.views(record.name), missing_views(plan, record), next_generation(plan)
    kept = [s.number for s in plan.shards(record.name)]
    new_rows, vocabulary = None, latest.vocabulary
    tail: list[Shard] = []
    dropped: list[int] = []
    if corpus_diff is not None:
        new_rows, tail = _new_rows(plan, teacher, record, corpus_diff, number)
        teacher_rows, rows = TeacherRows(plan, record.name), corpus_diff.rows[corpus_diff.keep]
        rows = rows[teacher_rows.length[rows] > 0]  # utterances without tokens are in no shard
        used = set((teacher_rows.start[rows] // latest.shard_rows).tolist()) or set(kept)
        dropped, kept = [s for s in kept if s not in used], [s for s in kept if s in used]
        vocabulary = new_rows.known + len(new_rows.vocabulary if new_rows.vocabulary is not None else ())
    added = [s.number for s in tail]
    work = [PlannedWork(c, layers + missing.get(c, []), added) for c, layers in views.items() if added]
    work += [PlannedWork(c, layers, kept if c in views else kept + added) for c, layers in missing.items()]
    generation = later_generation(
        plan,
        record.name,
        number,
        work=[w for w in work if w.shards],
        shards=[*latest.shards, *tail],
        edition=number if new_rows is not None else latest.edition,
        vocabulary=vocabulary,
        dropped_shards=dropped,
    )
    longer = replace(
        old,
        contexts=[*dict.fromkeys(old.contexts + record.contexts)],
        layers=[*dict.fromkeys(old.layers + record.layers)],
        fingerprints=old.fingerprints | record.fingerprints | old.fingerprints,
    )
    return PlanDraft(_with_generation(plan, longer, generation, corpus_diff), new_rows=new_rows)


def _with_passes(draft: PlanDraft, teacher: AnyTeacher, name: str) -> PlanDraft:
    """The draft with the way in which windows go through its teacher, tried on the shortest and longest ones.

    Raises StaleError if an earlier version has begun the teacher in batches that change its states.
    """
    plan, known = draft.plan, draft.layout is None  # whether the store has this teacher
    if not draft.new and plan.is_compared(name):
        return draft
    if isinstance(teacher, SpeechTeacher):
        plan.generations[-1] = replace(plan.generations[-1], passes=str(teacher.passes))
        return draft
    drafted, core_tokens = DraftedCorpus(draft, name), plan.latest(name).core_tokens
    windows = tried_windows(plan.teachers[name], core_tokens, drafted.texts, drafted.length, drafted.session)
    chosen = choose_passes(teacher, windows)
    if known and not plan.is_compared(name) and not give_same_states(teacher, windows, chosen):
        now = chosen.words if chosen.words != PADDED.words else "them with masks that keep the model's own windows"
        raise StaleError(
            f"an earlier version has begun the teacher {name!r} in {PADDED.words}, and its states are wrong there. "
            f"This version runs {now}",
            where=plan.paths.root,
            remedy="extract into another store, or give another --name",
        )
    if draft.new:
        plan.generations[-1] = replace(plan.generations[-1], passes=str(chosen))
    plan = replace(plan, compared=[*dict.fromkeys([*plan.compared, name])])
    return replace(draft, plan=plan)


def missing_views(plan: Plan, record: TeacherRecord) -> dict[str, list[int]]:
    """Return {context: layers} that are asked for and in no generation yet."""
    planned = plan.teachers[record.name].fingerprints
    missing = {c: [k for k in record.layers if f"{c}/{k}" not in planned] for c in record.contexts}
    return {c: layers for c, layers in missing.items() if layers}


def first_generation(
    number: int,
    record: TeacherRecord,
    layout: Layout,
    batch: tuple[int, int],
    core_tokens: int,
    seed: int,
    edition: int = 0,
) -> Generation:
    """Return a teacher's first generation: all of its views in all of its shards."""
    return Generation(
        number=number,
        teacher=record.name,
        work=[PlannedWork(c, record.layers, [s.number for s in layout.shards]) for c in record.contexts],
        shard_rows=layout.shard_rows,
        shards=layout.shards,
        batch_tokens=batch[0],
        batch_overhead_tokens=batch[1],
        core_tokens=core_tokens,
        seed=seed,
        created=utc_now(),
        edition=edition,
    )


def later_generation(plan: Plan, name: str, number: int, **changes: Any) -> Generation:
    """Return a generation after a teacher's latest. It adds no work and drops nothing, but for the `changes`."""
    fresh: dict[str, Any] = {"work": [], "dropped_shards": [], "dropped_views": []}
    return replace(plan.latest(name), number=number, created=utc_now(), **fresh | changes)


def next_generation(plan: Plan) -> int:
    """Return a number above every generation and every commit record of the store."""
    numbers = [g.number for g in plan.generations]
    for name, teacher in plan.teachers.items():
        for context in teacher.contexts:
            numbers += [c.generation for c in Commits(plan.paths, name, context).of.values()]
    return 1 + max(numbers)


def rows_after(plan: Plan) -> int:
    """Return the first row after those of all teachers. Rows without tokens are in a shard's range, too."""
    return max(s.last for g in plan.generations for s in g.shards)


def utc_now() -> str:
    """Return the time as store.json records it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _with_generation(plan: Plan, record: TeacherRecord, generation: Generation, corpus_diff: CorpusDiff | None) -> Plan:
    facts = plan.corpus
    if corpus_diff is not None:
        counts = {"utterances": len(corpus_diff.utterances), "sessions": int(corpus_diff.session.max()) + 1}
        facts = {k: v for k, v in facts.items() if k != "split"} | counts | _split(corpus_diff.split)
    teachers = plan.teachers | {record.name: record}
    return replace(plan, corpus=facts, teachers=teachers, generations=[*plan.generations, generation])


def _split(split: str | None) -> dict[str, str]:
    """What store.json records of the part of the corpus that was extracted."""
    return {} if split is None else {"split": split}


def _changed_table(corpus_diff: CorpusDiff, new: np.ndarray, number: int, first: int) -> NewRows:
    """The table of a changed corpus, with rows from `first` on for the utterances at the positions `new`."""
    order = np.where(corpus_diff.keep, corpus_diff.rows, 0)
    order[new] = first + np.arange(len(new))
    utterances = [corpus_diff.utterances[p] for p in new.tolist()]
    return NewRows(
        number,
        first,
        order,
        corpus_diff.session,
        ids=[u.id for u in utterances],
        text_hash=np.array([hash_text(u.text) for u in utterances], dtype=np.uint64),
        source=corpus_diff.replaces[new].astype(np.int32),
    )


def _new_rows(
    plan: Plan, teacher: AnyTeacher, record: TeacherRecord, corpus_diff: CorpusDiff, number: int
) -> tuple[NewRows, list[Shard]]:
    """Rows, tokens and shards for all utterances whose rows cannot stay. Raises StoreError if one exceeds a shard."""
    latest = plan.latest(record.name)
    first = rows_after(plan)
    new = np.flatnonzero(~corpus_diff.keep)
    table = _changed_table(corpus_diff, new, number, first)
    tokens = read_input(teacher, [corpus_diff.utterances[p] for p in new.tolist()], record.transform)
    lengths, rows, begin = tokens.length.astype(np.int64), latest.shard_rows, len(latest.shards)
    if len(new) and int(lengths.max()) > rows:
        raise StoreError(
            f"{int(lengths.max()):,} states do not fit into a shard of this store, which has {rows:,} rows",
            where=table.ids[int(lengths.argmax())],
            remedy="split the utterance in the manifest, or extract the corpus into a new store",
        )
    shards, start = cut_shards(lengths, rows) if len(new) else ([], np.zeros(0, np.int64))
    new_rows = replace(table, tokens=tokens, start=start + begin * rows)
    if isinstance(tokens, Tokens):
        known = RawArray(plan.paths, record.name, "vocab_id").read()
        known = known[: latest.vocabulary or len(known)]
        added = np.setdiff1d(tokens.ids, known).astype(np.int32)
        new_rows = replace(new_rows, known=len(known), vocabulary=added)
    return new_rows, [Shard(begin + s.number, first + s.first, first + s.last, s.rows) for s in shards]

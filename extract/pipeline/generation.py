"""Extending a store by a generation: more layers, contexts, utterances, another teacher, later texts.

Invariant: rows, tokens and committed files that exist stay as they are; a generation adds work and rows, or no longer
counts some. Arrays grow before store.json names the generation, so a planner may die at any moment.
Run: `stillhouse extract CORPUS STORE --teacher … --layers MORE --context MORE`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ...data.errors import StoreError
from ...data.manifest import Corpus
from ..store.disk.durable import crash_point, fsync_folder, write_json
from ..store.disk.layout import dtype_of, group_json, hash_text, shard_rows
from ..store.format import plan as plans
from ..store.format.arrays import RawArray
from ..store.format.block_sums import recording_sums
from ..store.format.commits import Commits
from ..store.format.growing import append, grow
from ..store.format.index import Index, write_edition
from ..store.format.plan import Generation, Plan, PlannedWork, Shard
from ..store.read.rows import TeacherRows
from ..store.writer import encode
from ..teacher.model import Teacher
from ..teacher.tokenizer import Tokens
from .corpus_diff import CorpusDiff
from .layout import Layout, cut_shards
from .new_store import write_teacher


def missing_views(plan: Plan, record: plans.TeacherRecord) -> dict[str, list[int]]:
    """{context: layers} that are asked for and in no generation yet."""
    have = plan.teachers[record.name].fingerprints if record.name in plan.teachers else {}
    out = {c: [k for k in record.layers if f"{c}/{k}" not in have] for c in record.contexts}
    return {c: layers for c, layers in out.items() if layers}


def next_generation(plan: Plan) -> int:
    """A number above every generation and every commit record of the store."""
    numbers = [g.number for g in plan.generations]
    for name, teacher in plan.teachers.items():
        for context in teacher.contexts:
            numbers += [c.generation for c in Commits(plan.paths, name, context).of.values()]
    return 1 + max(numbers)


@dataclass(frozen=True)
class NewRows:
    """Rows that a changed corpus adds to a store, and the corpus's table with them.

    ids, text_hash uint64, source int32: of the new rows [first, first + len(ids)), source being the row that each
    replaces, or -1. order, session int32 [n]: rows of the corpus in its order. tokens, start int64: of the new rows,
    for a teacher that the store knows. vocabulary int32: ids that come to the `known` ones.
    """

    number: int
    first: int
    ids: list[str]
    text_hash: np.ndarray
    source: np.ndarray
    order: np.ndarray
    session: np.ndarray
    served: np.ndarray | None = None  # bool [n]: who can be asked for; None: all
    tokens: Tokens | None = None
    start: np.ndarray | None = None
    known: int = 0
    vocabulary: np.ndarray | None = None


@dataclass(frozen=True)
class PlanDraft:
    """A plan on paper: `new` where it is yet to be written, with the layout of a teacher new to the store, and what a
    changed corpus adds.
    """

    plan: Plan
    layout: Layout | None = None
    new_rows: NewRows | None = None
    new: bool = True


def plan_more_views(
    plan: Plan, record: plans.TeacherRecord, change: CorpusDiff | None = None, teacher: Teacher | None = None
) -> PlanDraft:
    """More views of a teacher that the store knows, or (with the teacher) what has changed in the corpus."""
    old, latest = plan.teachers[record.name], plan.latest(record.name)
    views, missing, number = plan.views(record.name), missing_views(plan, record), next_generation(plan)
    there = [s.number for s in plan.shards(record.name)]
    growth, vocabulary = None, latest.vocabulary
    tail: list[Shard] = []
    dropped: list[int] = []
    if change is not None and teacher is not None:
        growth, tail = _grown(plan, record, change, teacher, number)
        t, kept = TeacherRows(plan, record.name), change.rows[change.keep]
        kept = kept[t.length[kept] > 0]  # the rest is in no shard
        used = set((t.start[kept] // latest.shard_rows).tolist()) or set(there)
        dropped, there = [s for s in there if s not in used], [s for s in there if s in used]
        vocabulary = growth.known + len(growth.vocabulary if growth.vocabulary is not None else ())
    ends = [s.number for s in tail]
    work = [PlannedWork(c, layers + missing.get(c, []), ends) for c, layers in views.items() if ends]
    work += [PlannedWork(c, layers, there if c in views else there + ends) for c, layers in missing.items()]
    generation = replace(
        latest,
        number=number,
        work=[w for w in work if w.shards],
        shards=[*latest.shards, *tail],
        created=utc_now(),
        edition=number if growth is not None else latest.edition,
        vocabulary=vocabulary,
        dropped_shards=dropped,
        dropped_views=[],
    )
    grown = replace(
        old,
        contexts=old.contexts + [c for c in record.contexts if c not in old.contexts],
        layers=old.layers + [k for k in record.layers if k not in old.layers],
        fingerprints=old.fingerprints
        | {f"{c}/{k}": record.fingerprints[f"{c}/{k}"] for c, layers in missing.items() for k in layers},
    )
    return PlanDraft(_with(plan, grown, generation, change), new_rows=growth)


def plan_new_teacher(
    plan: Plan,
    corpus: Corpus,
    teacher: Teacher,
    record: plans.TeacherRecord,
    batch: tuple[int, int],
    change: CorpusDiff | None = None,
) -> PlanDraft:
    """Another teacher: the same utterances in the same rows, its own tokens and shards.

    `batch` is (tokens a batch, overhead in tokens). A corpus that has changed becomes an edition that this teacher is
    the first to be at.
    """
    index, first = Index(plan.paths.data / "utterances", plan.edition()), plan.generations[0]
    number, edition, growth = next_generation(plan), plan.edition(), None
    order, session, count = index.order, index.session_of, len(index)
    if change is not None:
        new = np.flatnonzero(~change.keep)
        growth = _table(change, new, number, count)
        edition, order, session, count = number, growth.order, growth.session, count + len(new)
    ids, texts, hashes = [""] * count, [""] * count, np.zeros(count, dtype=np.uint64)
    for r in order.tolist() if change is not None else index.row.tolist():
        ids[r] = index.id(r) if r < len(index) else growth.ids[r - len(index)] if growth is not None else ""
        texts[r] = corpus.by_id[ids[r]].text
        hashes[r] = hash_text(texts[r])
    tokens = teacher.tokeniser.encode(texts, record.transform)
    lengths = tokens.length.astype(np.int64)
    rows = shard_rows(int(lengths.sum()), int(lengths.max()), record.width, dtype_of(record.dtype))
    shards, start = cut_shards(lengths, rows)
    generation = replace(
        first,
        number=number,
        teacher=record.name,
        work=[PlannedWork(c, record.layers, [s.number for s in shards]) for c in record.contexts],
        shard_rows=rows,
        shards=shards,
        batch_tokens=batch[0],
        batch_overhead_tokens=batch[1],
        created=utc_now(),
        edition=edition,
        vocabulary=0,
        dropped_shards=[],
        dropped_views=[],
    )
    by_row = np.full(count, -1, dtype=np.int32)
    by_row[order] = session
    layout = Layout(ids, hashes, by_row, tokens, start, rows, shards)
    return PlanDraft(_with(plan, record, generation, change), layout, growth)


def _with(plan: Plan, record: plans.TeacherRecord, generation: Generation, change: CorpusDiff | None) -> Plan:
    corpus = plan.corpus
    if change is not None:
        counts = {"utterances": len(change.utterances), "sessions": int(change.session.max()) + 1}
        corpus = {k: v for k, v in corpus.items() if k != "split"} | counts | split_of(change.split)
    teachers = plan.teachers | {record.name: record}
    return replace(plan, corpus=corpus, teachers=teachers, generations=[*plan.generations, generation])


def split_of(split: str | None) -> dict[str, str]:
    """What store.json says of the part of the corpus that was extracted."""
    return {} if split is None else {"split": split}


def utc_now() -> str:
    """Return the time as store.json records it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def rows_after(plan: Plan) -> int:
    """One past the last row of any teacher: rows have shards, also those without tokens."""
    return max(s.last for g in plan.generations for s in g.shards)


def _table(change: CorpusDiff, new: np.ndarray, number: int, first: int) -> NewRows:
    """The corpus's table, with rows from `first` on for the utterances at the positions `new`."""
    order = np.where(change.keep, change.rows, 0)
    order[new] = first + np.arange(len(new))
    said = [change.utterances[p] for p in new.tolist()]
    return NewRows(
        number=number,
        first=first,
        ids=[u.id for u in said],
        text_hash=np.array([hash_text(u.text) for u in said], dtype=np.uint64),
        source=change.replaces[new].astype(np.int32),
        order=order,
        session=change.session,
    )


def _grown(
    plan: Plan, record: plans.TeacherRecord, change: CorpusDiff, teacher: Teacher, number: int
) -> tuple[NewRows, list[Shard]]:
    """Rows, tokens and tail shards for all that has no row that serves on. Errors: StoreError for one too long."""
    latest = plan.latest(record.name)
    first = rows_after(plan)
    new = np.flatnonzero(~change.keep)
    growth = _table(change, new, number, first)
    tokens = teacher.tokeniser.encode([change.utterances[p].text for p in new.tolist()], record.transform)
    lengths, rows, begin = tokens.length.astype(np.int64), latest.shard_rows, len(latest.shards)
    if len(new) and int(lengths.max()) > rows:
        raise StoreError(
            f"{int(lengths.max()):,} tokens do not fit into a shard of this store, which has {rows:,} rows",
            where=growth.ids[int(lengths.argmax())],
            remedy="split the utterance in the manifest, or extract the corpus into a new store",
        )
    shards, start = cut_shards(lengths, rows) if len(new) else ([], np.zeros(0, np.int64))
    known = RawArray(plan.paths.data / record.name / "vocab_id").read()
    known = known[: latest.vocabulary or len(known)]
    vocabulary = np.setdiff1d(tokens.ids, known).astype(np.int32)
    grown = replace(growth, tokens=tokens, start=start + begin * rows, known=len(known), vocabulary=vocabulary)
    tail = [Shard(begin + s.number, first + s.first, first + s.last, s.rows) for s in shards]
    return grown, tail


def write_generation(plan: Plan, teacher: Teacher | None, layout: Layout | None, growth: NewRows | None = None) -> None:
    """Bring the last generation of a plan into force; the caller holds the lock `plan`.

    With `layout`, its teacher is new to the store; with `growth`, the corpus has changed.
    """
    paths, generation = plan.paths, plan.generations[-1]
    record = plan.teachers[generation.teacher]
    group = paths.data / record.name
    with recording_sums() as made:
        if growth is not None:
            write_new_rows(plan, growth)
            crash_point("grown")
        if layout is not None and teacher is not None:
            shutil.rmtree(group, ignore_errors=True)  # a planner died here; the store does not know this teacher yet
            write_teacher(paths, record, teacher, layout)
            write_json(paths.data / "zarr.json", group_json({"stillhouse": {"teachers": list(plan.teachers)}}))
        else:
            grow_teacher(plan, growth)
            if growth is not None and growth.tokens is not None:
                write_tokens(plan, growth, teacher)
            write_json(group / "zarr.json", group_json({"stillhouse": asdict(record)}))
    plans.write_generation(plan, generation, made)
    crash_point("planned")
    plans.write_head(plan)
    fsync_folder(paths.root)


def write_new_rows(plan: Plan, growth: NewRows) -> None:
    """The table of a changed corpus."""
    g = growth
    served = np.ones(len(g.order), dtype=bool) if g.served is None else g.served
    write_edition(plan.paths, g.number, g.first, g.ids, g.text_hash, g.order, g.session, served, g.source)


def grow_teacher(plan: Plan, growth: NewRows | None) -> None:
    """Make a teacher's arrays as long as its contexts, layers, rows and tokens are now."""
    generation = plan.generations[-1]
    record, group = plan.teachers[generation.teacher], plan.paths.data / generation.teacher
    c, k = len(record.contexts), len(record.layers)
    n = len(generation.shards) * generation.shard_rows
    u = growth.first + len(growth.ids) if growth is not None else 0
    for name in ("hidden", "scale") if dtype_of(record.dtype).scaled else ("hidden",):
        grow(group / name, {0: c, 1: k, 2: n})
    for name in ("norm_mean", "norm_std"):
        grow(group / name, {0: c, 1: k})
    grow(group / "crc32c", {0: c, 1: k, 2: u})
    for name in ("input_hash", "context_left", "context_right"):
        grow(group / name, {0: c, 1: u})


def write_tokens(plan: Plan, growth: NewRows, teacher: Teacher | None) -> None:
    """Tokens and vocabulary of the new rows."""
    generation = plan.generations[-1]
    group, rows = plan.paths.data / generation.teacher, generation.shard_rows
    tokens, start = growth.tokens, growth.start
    assert tokens is not None and start is not None and growth.vocabulary is not None
    end = len(generation.shards) * rows
    begin = int(start[0]) // rows * rows if len(start) else end
    token_id, span = np.full(end - begin, -1, np.int32), np.full((end - begin, 2), -1, np.int32)
    into = [np.arange(a, a + n) for a, n in zip((start - begin).tolist(), tokens.length.tolist())]
    where = np.concatenate(into) if into else np.zeros(0, int)
    token_id[where], span[where] = tokens.ids, tokens.span
    append(group / "start", start, growth.first)
    append(group / "length", tokens.length, growth.first)
    append(group / "token_id", token_id, begin)
    append(group / "span", span, begin)
    if len(growth.vocabulary) and teacher is not None:
        add_vocabulary(group, teacher, growth.vocabulary, growth.known)


def add_vocabulary(group: Path, teacher: Teacher, ids: np.ndarray, known: int) -> None:
    """Append token ids with their input embeddings and spellings behind the `known` ones that count."""
    embedding = encode(teacher.embedding(ids), dtype_of("float16"))
    pieces = bytes(RawArray(group / "vocab_piece").read()).split(b"\n")[:known]
    added = "".join("\n" + p.replace("\n", "⏎") for p in teacher.tokeniser.pieces(ids.tolist())).encode()
    append(group / "vocab_id", ids, known)
    append(group / "embedding", embedding, known)
    append(group / "vocab_piece", np.frombuffer(added, dtype=np.uint8), len(b"\n".join(pieces)), last=True)

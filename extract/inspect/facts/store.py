"""What a store contains, how much of it is extracted, and whether it is damaged: `inspect info`, `ls` and `verify`.

Guarantees: only committed states count. Only `verify --data` and `--sample` read states.
Try: `stillhouse inspect info STORE`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import NoStoreError, StoreError
from ...maintain.repair import Repaired
from ...store import Store, View
from ...store.disk.paths import Paths
from ...store.format.arrays import RawArray
from ...store.format.plan import Shard, WorkItem
from ...store.storage import open_files
from ...store.verify.stale import behind, is_newest
from ...store.verify.sums import unchecked
from ...store.verify.verify import StoreFinding, damaged_records, findings
from ..sample import quantisation_errors


def as_json(fact: Any, kind: str) -> dict[str, Any]:
    """Return a fact as a dictionary that begins with its schema. Schemas (docs/reference/inspect.md) only grow."""
    return {"schema": f"stillhouse.inspect.{kind}/1", **asdict(fact)}


@dataclass(frozen=True)
class ViewFacts:
    view: str
    teacher: str
    context: str
    layer: int
    complete: bool
    units: int  # shards in which the view is committed
    units_planned: int
    utterances: int  # committed, without those that a later text has replaced
    utterances_planned: int
    tokens: int  # committed; for a speech teacher, frames
    tokens_planned: int
    bytes: int
    fingerprint: str | None
    int8_error: float | None  # for int8: root mean square error over root mean square, without a decoder's first tokens
    int8_error_standardised: float | None  # the same for standardised states
    behind: int = 0  # utterances that differ from the newest corpus, because this teacher has not been refreshed
    pq_error: float | None = None  # for pq: as int8_error
    pq_error_standardised: float | None = None
    axis: str = "token"  # what the states are of: "token", or "frame" for a speech teacher


@dataclass(frozen=True)
class TeacherFacts:
    name: str
    kind: str  # "encoder" or "decoder" of text, or "speech"
    model: str
    architecture: str
    revision: str | None
    weights_hash: str
    tokenizer_hash: str
    transform: str
    join: str
    leading_space: str  # before each text: "yes", "no", or "auto", in scripts that write spaces between words
    window: int
    width: int
    depth: int
    dtype: str
    model_dtype: str
    contexts: list[str]
    layers: list[int]
    vocabulary: int
    tokens: int  # of the corpus as this teacher has it, extracted or not; for a speech teacher, frames
    units: int  # committed work items, counted for each layer
    units_planned: int
    views: int
    views_planned: int
    hidden_bytes: int
    about: str  # one line from the model's folder, or ""
    int8_error: float | None  # largest of its views
    behind: int = 0  # as of its views
    work_items: int = 0  # committed, as `extract --status` counts them
    work_items_planned: int = 0
    compared: bool = True  # whether batches were compared with one text at a time; earlier versions did not
    pq_error: float | None = None  # largest of its views
    pq_error_standardised: float | None = None
    axis: str = "token"  # or "frame" for a speech teacher
    rate_hz: float = 0.0  # frames in a second
    offset_s: float = 0.0  # time of the middle of frame 0
    sample_rate_hz: int = 0  # of the samples that the model takes


@dataclass(frozen=True)
class StoreFacts:
    path: str
    version: int
    created: str
    complete: bool
    utterances: int
    sessions: int
    tokens: int  # of text teachers
    bytes: int
    hidden_bytes: int
    generations: int
    teachers: list[TeacherFacts]
    versions: dict[str, str]
    frames: int = 0  # of speech teachers


@dataclass(frozen=True)
class UtteranceFacts:
    utterance: str
    row: int
    session: int
    tokens: dict[str, int]  # number of tokens by text teacher
    views: int  # views in which it is committed
    views_planned: int
    frames: dict[str, int] = field(default_factory=dict)  # number of frames by speech teacher


def store_facts(store: Store) -> StoreFacts:
    """Return the facts of a store. Raises StoreError if the plan or an array is damaged."""
    views = view_facts(store, store.planned_views)
    teachers = [_teacher_facts(store, name, [v for v in views if v.teacher == name]) for name in store.plan.teachers]
    session = store.index.session
    return StoreFacts(
        path=store.address,
        version=store.plan.version,
        created=store.plan.created,
        complete=all(v.complete for v in views),
        utterances=len(store.utterance_ids),
        sessions=int(session.max(initial=-1)) + 1,
        tokens=sum(t.tokens for t in teachers if t.axis == "token"),
        bytes=sum(n for _, n in store.paths.files.sizes(store.paths.root)),
        hidden_bytes=sum(t.hidden_bytes for t in teachers),
        generations=len(store.plan.generations),
        teachers=teachers,
        versions=store.plan.versions,
        frames=sum(t.tokens for t in teachers if t.axis == "frame"),
    )


@dataclass(frozen=True)
class Verified:
    path: str
    complete: bool
    units: int  # committed work items, counted for each layer
    units_planned: int
    data: float  # share of the utterances whose states were read
    findings: list[StoreFinding]
    mended: list[Repaired] = field(default_factory=list)  # with --repair: what was repaired before this check
    unchecked: list[str] = field(default_factory=list)  # what has no checksums, because it was written before them
    behind: dict[str, int] = field(default_factory=dict)  # {teacher: utterances}, as of views
    work_items: int = 0  # committed, as `extract --status` counts them
    work_items_planned: int = 0
    renewed: list[str] = field(default_factory=list)  # objects whose copies in the cache were damaged: fetched again


def verified(store: Store, data: float = 0.0, on_progress: Callable[[WorkItem], None] | None = None) -> Verified:
    """Check a store; `data` is the share of the utterances whose states are read. Raises StoreError without a plan."""
    problems = list(findings(store, data, on_progress))
    try:
        views, late = view_facts(store, store.planned_views), behind(store)
    except StoreError:
        if not problems:
            raise
        views, late = [], {}  # The index of utterances cannot be read, which is one of the findings.
    items = store.plan.work_items()
    return Verified(
        path=store.address,
        complete=bool(views) and all(v.complete for v in views),
        units=sum(v.units for v in views),
        units_planned=sum(v.units_planned for v in views),
        data=data,
        findings=problems,
        unchecked=unchecked(store),
        behind=late,
        work_items=sum(_committed(store, item) for item in items),
        work_items_planned=len(items),
        renewed=list(store.paths.files.renewed),
    )


def _committed(store: Store, item: WorkItem) -> bool:
    return store.commits(item.teacher, item.context).has(item.shard.number, item.layers, item.generation.number)


def unopened(path: Path, error: StoreError) -> Verified:
    """Return the damaged records that explain why a store does not open. Raises the error if there are none."""
    files = open_files(path)
    if not (damaged := damaged_records(Paths(files))):
        if "inspect verify" in (error.remedy or "") or "damaged" in error.what:  # `verify` does not advise itself.
            remedy = "restore this file from a backup, or extract into a new store"
            raise type(error)(error.what, where=error.where, expected=error.expected, remedy=remedy) from error
        raise error
    return Verified(files.address, complete=False, units=0, units_planned=0, data=0.0, findings=damaged)


def _teacher_facts(store: Store, name: str, views: list[ViewFacts]) -> TeacherFacts:
    t, items = store.plan.teachers[name], store.plan.work_items(name)

    def largest(key: str) -> float | None:
        return max((e for v in views if (e := getattr(v, key)) is not None), default=None)

    recorded = {f.name: getattr(t, f.name) for f in fields(TeacherFacts) if hasattr(t, f.name)}
    return TeacherFacts(
        **recorded | {"leading_space": t.space_choice},
        vocabulary=0 if t.is_speech else RawArray(store.paths, name, "vocab_id").shape[0],
        tokens=store.teacher(name).tokens,
        units=sum(v.units for v in views),
        units_planned=sum(v.units_planned for v in views),
        views=sum(v.complete for v in views),
        views_planned=len(views),
        hidden_bytes=sum(v.bytes for v in views),
        int8_error=largest("int8_error"),
        pq_error=largest("pq_error"),
        pq_error_standardised=largest("pq_error_standardised"),
        behind=max((v.behind for v in views), default=0),
        work_items=sum(_committed(store, item) for item in items),
        work_items_planned=len(items),
        compared=store.plan.is_compared(name),
    )


def view_facts(store: Store, views: Sequence[View]) -> list[ViewFacts]:
    """Return the facts of each view."""
    complete, late = set(store.views), behind(store)
    return [_view_facts(store, view, view in complete, late.get(view.teacher, 0)) for view in views]


def _view_facts(store: Store, view: View, complete: bool, late: int) -> ViewFacts:
    teacher, commits = store.plan.teachers[view.teacher], store.commits(view.teacher, view.context)
    planned = [u for u in store.plan.work_items(view.teacher) if u.context == view.context and view.layer in u.layers]
    # A later generation may extract a shard again. The shard counts once.
    shards = {u.shard.number: u.shard for u in planned}
    need = {u.shard.number: u.generation.number for u in planned}
    done = [s for s in shards.values() if commits.has(s.number, [view.layer], need[s.number])]
    records = [commits.of[s.number, view.layer] for s in done]
    live, lengths = store.index_of(view.teacher).live, store.lengths(view.teacher)

    def total(counts: np.ndarray, of: Iterable[Shard]) -> int:
        return sum(int(counts[s.first : s.last].sum()) for s in of)

    return ViewFacts(
        view=view.address,
        **asdict(view),
        complete=complete,
        units=len(done),
        units_planned=len(shards),
        utterances=total(live, done),
        utterances_planned=total(live, shards.values()),
        tokens=total(lengths, done),
        tokens_planned=total(lengths, shards.values()),
        bytes=sum(r.files.get(str(view.layer), 0) for r in records),
        fingerprint=teacher.fingerprints.get(f"{view.context}/{view.layer}"),
        **quantisation_errors(store, view),
        behind=late,
        axis=teacher.axis,
    )


def utterance_facts(store: Store, patterns: Sequence[str] = ()) -> Iterator[UtteranceFacts]:
    """Yield the utterances that match one of the globs, or all, in the store's order. Raises NoStoreError for none."""
    views = store.planned_views
    chosen = [i for i in store.utterance_ids if not patterns or any(fnmatch.fnmatchcase(i, p) for p in patterns)]
    if patterns and not chosen:
        what = f"no utterance matches {' or '.join(patterns)}"
        raise NoStoreError(what, where=store.address, remedy="stillhouse inspect ls --utterances")
    # A teacher that has not been refreshed has nothing of a changed utterance.
    current = {name: is_newest(store, name, chosen) for name in store.plan.teachers}
    lengths = {}
    for name, same in current.items():
        own = np.maximum(store.index_of(name).rows(chosen), 0)
        lengths[name] = np.where(same, store.lengths(name)[own] if len(own) else 0, 0).tolist()
    held = (store.has(chosen, view) & current[view.teacher] for view in views)
    committed = sum(held, np.zeros(len(chosen), np.int64)).tolist()
    for n, (utterance, row) in enumerate(zip(chosen, store.rows(chosen).tolist())):
        counts = {name: length[n] for name, length in lengths.items()}
        frames = {name: counts.pop(name) for name, t in store.plan.teachers.items() if t.is_speech}
        yield UtteranceFacts(utterance, row, int(store.index.session[row]), counts, committed[n], len(views), frames)

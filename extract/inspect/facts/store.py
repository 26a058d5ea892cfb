"""What a store is, how much of it is there, and whether it is whole: `info`, `ls`, `verify`.

Invariant: nothing is said to exist that is not committed; only `verify --data` reads states.
Exercised by: `stillhouse inspect info STORE`, `stillhouse inspect ls STORE`.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import NoStoreError, StoreError
from ...maintain.repair import Repaired
from ...store import Store, View
from ...store.disk.layout import VERSION, Paths
from ...store.format.arrays import RawArray
from ...store.format.plan import WorkItem
from ...store.remote.paths import address_of, local_copy, mirror_of
from ...store.verify.sums import unchecked
from ...store.verify.verify import StoreFinding, damaged_records, findings


def as_json(fact: Any, kind: str) -> dict[str, Any]:
    """A fact with the name and version of its schema first; the schemas (docs/reference/inspect.md) only grow."""
    return {"schema": f"stillhouse.inspect.{kind}/1", **asdict(fact)}


@dataclass(frozen=True)
class ViewFacts:
    """One view. `units` are units of work (shards); `tokens` and `utterances` count what is committed."""

    view: str
    teacher: str
    context: str
    layer: int
    complete: bool
    units: int
    units_planned: int
    utterances: int
    utterances_planned: int
    tokens: int
    tokens_planned: int
    bytes: int
    fingerprint: str | None
    int8_error: float | None  # of int8: root mean square error over root mean square, of all states
    int8_error_standardised: float | None  # the same of the standardised states


@dataclass(frozen=True)
class TeacherFacts:
    name: str
    kind: str
    model: str
    architecture: str
    revision: str | None
    weights_hash: str
    tokenizer_hash: str
    transform: str
    join: str
    window: int
    width: int
    depth: int
    dtype: str
    model_dtype: str
    contexts: list[str]
    layers: list[int]
    vocabulary: int
    tokens: int
    units: int
    units_planned: int
    views: int
    views_planned: int
    hidden_bytes: int
    about: str  # what the model's folder says of itself; "" where it says nothing
    int8_error: float | None  # of its worst view


@dataclass(frozen=True)
class StoreFacts:
    path: str
    version: int
    created: str
    complete: bool
    utterances: int
    sessions: int
    tokens: int
    bytes: int
    hidden_bytes: int
    generations: int
    teachers: list[TeacherFacts]
    versions: dict[str, str]


@dataclass(frozen=True)
class UtteranceFacts:
    """One utterance; `views` are the views in which it is committed, `tokens` its length by teacher."""

    utterance: str
    row: int
    session: int
    tokens: dict[str, int]
    views: int
    views_planned: int


def store_facts(store: Store) -> StoreFacts:
    """Errors: StoreError where the plan or an array is damaged."""
    views = view_facts(store, store.planned_views)
    teachers = [_teacher_facts(store, name, [v for v in views if v.teacher == name]) for name in store.plan.teachers]
    session = store.index.session
    return StoreFacts(
        path=store.address,
        version=VERSION,
        created=store.plan.created,
        complete=all(v.complete for v in views),
        utterances=len(store.utterance_ids),
        sessions=int(session.max(initial=-1)) + 1,
        tokens=sum(t.tokens for t in teachers),
        bytes=sum(n for _, n in files(store.paths.root)),
        hidden_bytes=sum(t.hidden_bytes for t in teachers),
        generations=len(store.plan.generations),
        teachers=teachers,
        versions=store.plan.versions,
    )


@dataclass(frozen=True)
class Verified:
    """What `verify` looked at and found; `data` is the share of the utterances whose states were read."""

    path: str
    complete: bool
    units: int  # committed, counted for each layer
    units_planned: int
    data: float
    findings: list[StoreFinding]
    mended: list[Repaired] = field(default_factory=list)  # with --repair: what was put right before this look
    unchecked: list[str] = field(default_factory=list)  # what was written before it had checksums


def verified(store: Store, data: float = 0.0, report: Callable[[WorkItem], None] | None = None) -> Verified:
    """Errors: StoreError where the plan itself cannot be read."""
    found = list(findings(store, data, report))
    try:
        views = view_facts(store, store.planned_views)
    except StoreError:
        if not found:
            raise
        views = []  # its index of utterances cannot be read, which is among what was found
    return Verified(
        path=store.address,
        complete=bool(views) and all(v.complete for v in views),
        units=sum(v.units for v in views),
        units_planned=sum(v.units_planned for v in views),
        data=data,
        findings=found,
        unchecked=unchecked(store),
    )


def unopened(path: Path, error: StoreError) -> Verified:
    """A store that does not open, whose damaged records say why. Errors: the error, where they do not."""
    root = local_copy(path)
    found = damaged_records(Paths(root))
    if not found:
        raise error
    return Verified(str(address_of(root)), complete=False, units=0, units_planned=0, data=0.0, findings=found)


def _teacher_facts(store: Store, name: str, views: list[ViewFacts]) -> TeacherFacts:
    t, info = store.plan.teachers[name], store.teacher(name)
    return TeacherFacts(
        name=name,
        kind=t.kind,
        model=t.model,
        architecture=t.architecture,
        revision=t.revision,
        weights_hash=t.weights_hash,
        tokenizer_hash=t.tokenizer_hash,
        transform=t.transform,
        join=t.join,
        window=t.window,
        width=t.width,
        depth=t.depth,
        dtype=t.dtype,
        model_dtype=t.model_dtype,
        contexts=t.contexts,
        layers=t.layers,
        vocabulary=RawArray(store.paths.array(name, "vocab_id")).shape[0],
        tokens=info.tokens,
        units=sum(v.units for v in views),
        units_planned=sum(v.units_planned for v in views),
        views=sum(v.complete for v in views),
        views_planned=len(views),
        hidden_bytes=sum(v.bytes for v in views),
        about=t.about,
        int8_error=max((v.int8_error for v in views if v.int8_error is not None), default=None),
    )


def view_facts(store: Store, views: Sequence[View]) -> list[ViewFacts]:
    complete = set(store.views)
    return [_view_facts(store, view, view in complete) for view in views]


def _view_facts(store: Store, view: View, complete: bool) -> ViewFacts:
    teacher, commits = store.plan.teachers[view.teacher], store.commits(view.teacher, view.context)
    planned = [u for u in store.plan.work_items(view.teacher) if u.context == view.context and view.layer in u.layers]
    # A later generation may make a shard anew; the shard counts once
    shards = {u.shard.number: u.shard for u in planned}
    need = {u.shard.number: u.generation.number for u in planned}
    done = [s for s in shards.values() if commits.has(s.number, [view.layer], need[s.number])]
    records = [commits.of[s.number, view.layer] for s in done]
    live, lengths = store.index_of(view.teacher).live, store.lengths(view.teacher)
    loss = store.loss(view)
    return ViewFacts(
        view=view.address,
        teacher=view.teacher,
        context=view.context,
        layer=view.layer,
        complete=complete,
        units=len(done),
        units_planned=len(shards),
        utterances=sum(int(live[s.first : s.last].sum()) for s in done),
        utterances_planned=sum(int(live[s.first : s.last].sum()) for s in shards.values()),
        tokens=sum(int(lengths[s.first : s.last].sum()) for s in done),
        tokens_planned=sum(int(lengths[s.first : s.last].sum()) for s in shards.values()),
        bytes=sum(r.files.get(str(view.layer), 0) for r in records),
        fingerprint=teacher.fingerprints.get(f"{view.context}/{view.layer}"),
        int8_error=loss.relative if loss else None,
        int8_error_standardised=loss.standardised if loss else None,
    )


def utterance_facts(store: Store, patterns: Sequence[str] = ()) -> Iterator[UtteranceFacts]:
    """Utterances whose id matches one of the globs (none: all), in the order of the store.

    Errors: NoStoreError where patterns are given and nothing matches.
    """
    ids, views = store.utterance_ids, store.planned_views
    chosen = [i for i in ids if not patterns or any(fnmatch.fnmatchcase(i, p) for p in patterns)]
    if patterns and not chosen:
        raise NoStoreError(
            f"no utterance matches {' or '.join(patterns)}",
            where=store.address,
            remedy="stillhouse inspect ls --utterances",
        )
    rows = store.rows(chosen).tolist()
    lengths = {name: store.lengths(name) for name in store.plan.teachers}
    held = np.zeros(len(rows), np.int64)
    for view in views:
        held += store.has(chosen, view)
    for number, row in enumerate(rows):
        tokens = {name: int(length[row]) for name, length in lengths.items()}
        yield UtteranceFacts(chosen[number], row, int(store.index.session[row]), tokens, int(held[number]), len(views))


def files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file under a folder with its size in bytes; what vanishes meanwhile (a writer's) is left out."""
    mirror = mirror_of(folder)
    if mirror is not None:
        yield from mirror.sizes(folder).items()
        return
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        yield Path(entry.path), entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue

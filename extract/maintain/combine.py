"""Make a new store out of others: some of their views, some of their utterances, or two stores together.

Guarantees: readable utterances have the bytes that they have in the sources. Neighbours that contexts saw are copied as
text, so no context becomes stale. The new store is complete or does not exist. Sources and new store may be URLs.
Try: `stillhouse store subset STORE OUT --utterances FILE`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import UsageError
from ..pipeline.extract import share_arrays
from ..pipeline.generation import first_generation, utc_now
from ..pipeline.layout import Layout, NewRows, cut_shards
from ..pipeline.new_store import write_groups, write_new_rows, write_teacher
from ..pipeline.norms import commit_norms, write_norms
from ..pipeline.progress import folder_bytes, split_committed
from ..pipeline.reuse import by_store, copy_item
from ..speech.sounds import Sounds
from ..store.disk.layout import dtype_of, shard_rows
from ..store.disk.locks import Scratch
from ..store.disk.paths import Paths
from ..store.format import plan as plans
from ..store.format.arrays import ArrayWriter
from ..store.format.index import write_index
from ..store.format.plan import Generation, Plan, PlannedWork, Shard, TeacherRecord
from ..store.read.rows import TeacherRows
from ..store.reader import Store
from ..store.storage import address_of, new_files
from ..store.verify.sums import check_sound
from ..store.views import View
from ..store.writer import versions
from ..teacher.tokenizer import Tokens
from .members import Included, check_compatible, choose_utterances, complete_views, only_in_second

Sources = list[tuple[Store, int]]  # (store, its row) of each row of the new store


@dataclass(frozen=True)
class Combined:
    """The new store."""

    store: str
    views: list[str]
    utterances: int
    context_only: int  # utterances of which only the text was copied, as context of their neighbours
    bytes: int


def copy(source: Path | str, out: Path | str, patterns: Sequence[str] = ()) -> Combined:
    """Copy views of a store with all utterances; without patterns, all views. Raises as `combine`."""
    store = Store.open(source, checksums=True)
    included = choose_utterances(store, lambda _: True)
    return combine(out, [store], included, complete_views(store, patterns), store.plan.corpus)


def subset(source: Path | str, out: Path | str, ids: Sequence[str], patterns: Sequence[str] = ()) -> Combined:
    """Copy some utterances of a store. Raises NoStoreError for ids that it does not have, and as `combine`."""
    store = Store.open(source, checksums=True)
    if not len(ids):
        raise UsageError("no utterances to keep", where=source)
    store.rows(ids)
    included = choose_utterances(store, set(ids).__contains__)
    return combine(out, [store], included, complete_views(store, patterns), store.plan.corpus)


def merge(a: Path | str, b: Path | str, out: Path | str, patterns: Sequence[str] = ()) -> Combined:
    """Copy all utterances of two stores with the same settings and views.

    Raises StaleError, with the setting, view or utterance in which the stores differ, and as `combine`.
    """
    stores = [Store.open(a, checksums=True), Store.open(b, checksums=True)]
    views = [complete_views(s, patterns) for s in stores]
    check_compatible(stores, views)
    included = choose_utterances(stores[0], lambda _: True)
    included += only_in_second(stores, included, views[0])
    corpus = {k: v for k, v in stores[0].plan.corpus.items() if k != "split"}
    return combine(out, stores, included, views[0], corpus)


def combine(
    out: Path | str, stores: list[Store], included: list[Included], views: list[View], corpus: dict[str, Any]
) -> Combined:
    """Write the new store, with the `included` utterances in their order. `corpus` is recorded in its store.json.

    Raises UsageError if something is at `out` already, and StoreError if a source is damaged.
    """
    for store in stores:
        check_sound(store)
    rows = sorted(included, key=lambda m: not m.served)  # the shards of readable rows come first
    row_of = {(m.source, m.id): r for r, m in enumerate(rows)}
    order = np.array([row_of[m.source, m.id] for m in included])
    session = np.array([m.session for m in included], dtype=np.int32)
    served = np.array([m.served for m in included])
    count = int(served.sum())
    fingerprint = _fingerprint(stores, rows, views)
    names = list(dict.fromkeys(v.teacher for v in views))
    sources = {name: _sources(stores, rows, name) for name in names}
    with new_files(out, fingerprint) as files:
        paths, edition = Paths(files), 0 if served.all() else 1
        writer = ArrayWriter(paths)
        by_row = np.zeros(len(rows), np.int32)
        by_row[order] = session
        hashes = np.zeros(len(rows), np.uint64)
        texts_of = next((n for n in names if not stores[0].plan.teachers[n].is_speech), names[0])
        for store, where, source_rows in by_store(sources[texts_of]):
            hashes[where] = store.index_of(texts_of).text_hash[source_rows]
        write_index(writer, [m.id for m in rows], hashes, by_row)
        if edition:
            write_new_rows(writer, NewRows(edition, len(rows), order, session, served))
        facts = corpus | {"utterances": count, "sessions": int(session.max()) + 1}
        compared = [n for n in names if all(s.plan.is_compared(n) for s in stores)]
        plan = Plan(paths, utc_now(), facts, versions(), {}, [], compared)
        for number, name in enumerate(names, start=edition):
            layout, record, generation = _draft_teacher(rows, count, sources[name], views, name, number, edition)
            known = dict.fromkeys(s for s, _ in sources[name])
            vocabulary = None if record.is_speech else _CopiedVocabulary(known, name)
            write_teacher(writer, record, vocabulary, layout)
            teachers = plan.teachers | {name: record}
            plan = replace(plan, teachers=teachers, generations=[*plan.generations, generation])
        write_groups(writer, plan)
        for generation in plan.generations:
            plans.write_generation(replace(plan, generations=[]), generation, writer.sums)
        plans.write_head(plan, publish=False)
        with Scratch(paths) as scratch:
            for name in names:
                # An earlier attempt may have put some of them under this URL.
                for item in split_committed(plan, plan.work_items(name))[1]:
                    first, last = item.shard.first, item.shard.last
                    copy_item(plan, scratch.folder, item, sources[name][first:last], [m.id for m in rows[first:last]])
                for context in plan.views(name):
                    if len(stores) == 1 or dtype_of(plan.teachers[name].dtype).quantised:
                        _copy_norms(plan, stores[0], name, context, scratch.folder)
                    else:
                        write_norms(plan, name, context, scratch.folder)
        for name in names:
            share_arrays(plan, name)
        files.publish_plan(by=fingerprint)
        size = folder_bytes(files, files.root)
    return Combined(address_of(out), [v.address for v in views], count, len(rows) - count, size)


def _fingerprint(stores: list[Store], rows: list[Included], views: list[View]) -> str:
    """A hash of all that decides what the new store will be."""
    digest = hashlib.blake2b(digest_size=16)
    for store in stores:
        p = store.plan
        prints = {name: t.fingerprints for name, t in p.teachers.items()}
        digest.update(repr((p.created, [g.number for g in p.generations], p.corpus, prints)).encode())
    digest.update(repr([v.address for v in views]).encode())
    for m in rows:
        digest.update(repr((m.source, m.id, m.session, m.served)).encode())
    return digest.hexdigest()


def _sources(stores: list[Store], rows: list[Included], name: str) -> Sources:
    known = []
    for store in stores:
        index = store.index_of(name)
        known.append({index.id(r): r for r in index.order.tolist()})
    return [(stores[m.source], known[m.source][m.id]) for m in rows]


def _draft_teacher(
    rows: list[Included], count: int, sources: Sources, views: list[View], name: str, number: int, edition: int
) -> tuple[Layout, TeacherRecord, Generation]:
    """A teacher of the new store: its rows, of which the first `count` have states, its record and its generation."""
    store = sources[0][0]
    old, latest = store.plan.teachers[name], store.plan.latest(name)
    own = [v for v in views if v.teacher == name]
    record = replace(
        old,
        contexts=[c for c in old.contexts if any(v.context == c for v in own)],
        layers=[k for k in old.layers if any(v.layer == k for v in own)],
        fingerprints={f"{v.context}/{v.layer}": old.fingerprints[f"{v.context}/{v.layer}"] for v in own},
    )
    tokens = _tokens(sources, name)
    lengths = tokens.length.astype(np.int64)
    size = shard_rows(int(lengths[:count].sum()), int(lengths.max()), record.width, dtype_of(record.dtype))
    shards, start = cut_shards(lengths[:count], size)
    with_states = len(shards)
    if count < len(rows):  # rows that are context alone have tokens and no states
        more, later = cut_shards(lengths[count:], size)
        shards += [Shard(with_states + s.number, count + s.first, count + s.last, s.rows) for s in more]
        start = np.concatenate([start, with_states * size + later])
    layout = Layout([m.id for m in rows], tokens, start, size, shards)
    batch = latest.batch_tokens, latest.batch_overhead_tokens
    generation = replace(
        first_generation(number, record, layout, batch, latest.core_tokens, latest.seed, edition),
        work=[
            PlannedWork(c, [k for k in record.layers if View(name, c, k) in own], list(range(with_states)))
            for c in record.contexts
        ],
        dropped_shards=list(range(with_states, len(shards))),
    )
    return layout, record, generation


def _tokens(sources: Sources, name: str) -> Tokens | Sounds:
    """The tokens of all rows in their order, or the sources of their audio."""
    if sources[0][0].plan.teachers[name].is_speech:
        length, source = np.zeros(len(sources), np.int32), np.zeros((len(sources), 4), np.int64)
        for store, where, rows in by_store(sources):
            of_store = TeacherRows(store.plan, name)
            length[where], source[where] = of_store.length[rows], of_store.audio_source(rows)
        return Sounds(length, source)
    parts = []
    for store, run in groupby(sources, key=lambda source: source[0]):
        parts.append(store.tokens_of_rows(np.array([row for _, row in run]), name))
    length, token_id, span = (np.concatenate(arrays) for arrays in zip(*parts))
    return Tokens(token_id, length.astype(np.int32), span)


class _CopiedVocabulary:
    """Input embeddings and spellings out of stores, as `write_teacher` asks a teacher for them."""

    def __init__(self, stores: Iterable[Store], name: str) -> None:
        self._rows: dict[int, np.ndarray] = {}
        self._pieces: dict[int, str] = {}
        for store in stores:
            vocabulary, table = store.embedding(name)
            self._rows |= dict(zip(np.asarray(vocabulary).tolist(), np.asarray(table)))
            self._pieces |= dict(zip(np.asarray(vocabulary).tolist(), store.pieces(name)))

    @property
    def tokeniser(self) -> _CopiedVocabulary:
        return self

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([self._rows[i] for i in ids.tolist()])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._pieces[i] for i in ids]


def _copy_norms(plan: Plan, source: Store, name: str, context: str, scratch: Path) -> None:
    """Copy norms: they never change, so a part of a store has those of the whole store."""
    norms = {k: source.norms_stored(View(name, context, k)) for k in plan.views(name)[context]}
    commit_norms(plan, name, context, plan.latest(name).number, norms, scratch)

"""A new store out of others: some of their views, some of their utterances, or two of them together.

Invariant: what is served has the bytes that its sources serve; neighbours that contexts saw come along as text, so that
nothing is stale that was not. A store of that name is whole or not there (place.py). Sources and new store may be URLs.
Run: `stillhouse store subset STORE OUT --utterances FILE`, `store cp STORE OUT --views V`, `store merge A B OUT`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ...data.errors import UsageError
from ..pipeline.layout import Layout, cut_shards
from ..pipeline.new_store import write_teacher
from ..pipeline.norms import commit_norms, fix_norms
from ..pipeline.progress import folder_bytes
from ..store.disk.durable import Scratch, crash_point, write_json
from ..store.disk.layout import Paths, dtype_of, group_json, shard_rows
from ..store.format import plan as plans
from ..store.format.block_sums import recording_sums
from ..store.format.commits import Commits
from ..store.format.index import write_edition, write_index
from ..store.format.plan import Generation, Plan, PlannedWork, Shard
from ..store.reader import Store
from ..store.verify.sums import check_sound
from ..store.views import View
from ..store.writer import versions
from ..teacher.tokenizer import Tokens
from .copy_item import copy_item
from .members import Included, check_settings, choose_utterances, complete_views, only_in_second
from .staging import publish_store, staging_folder


@dataclass(frozen=True)
class Combined:
    """The new store."""

    store: str
    views: list[str]
    utterances: int
    context_only: int  # utterances whose text alone came along, as their neighbours' context
    bytes: int


def copy(source: Path | str, out: Path | str, patterns: Sequence[str] = ()) -> Combined:
    """Some views of a store (none named: all) with all utterances. Errors: as `build`."""
    store = Store.open(source, checksums=True)
    return combine(
        out, [store], choose_utterances(store, lambda _: True), complete_views(store, patterns), store.plan.corpus
    )


def subset(source: Path | str, out: Path | str, ids: Sequence[str], patterns: Sequence[str] = ()) -> Combined:
    """Some utterances of a store. Errors: NoStoreError naming those that it does not have; as `build`."""
    store = Store.open(source, checksums=True)
    if not len(ids):
        raise UsageError("no utterances to keep", where=source)
    store.rows(ids)
    wanted = set(ids)
    return combine(
        out, [store], choose_utterances(store, wanted.__contains__), complete_views(store, patterns), store.plan.corpus
    )


def merge(a: Path | str, b: Path | str, out: Path | str, patterns: Sequence[str] = ()) -> Combined:
    """All utterances of two stores with the same settings and views. One that both have must be the same in both.

    Errors: StaleError naming the setting, view or utterance in which they differ; as `build`.
    """
    stores = [Store.open(a, checksums=True), Store.open(b, checksums=True)]
    both = [complete_views(s, patterns) for s in stores]
    check_settings(stores, both)
    found = choose_utterances(stores[0], lambda _: True)
    found += only_in_second(stores, found, both[0])
    corpus = {k: v for k, v in stores[0].plan.corpus.items() if k != "split"}
    return combine(out, stores, found, both[0], corpus)


def combine(out: Path | str, stores: list[Store], members: list[Included], views: list[View], corpus: dict) -> Combined:
    """Write the new store. Errors: UsageError where `out` is there; StoreError where a source is damaged."""
    for store in stores:
        check_sound(store)
    told = [m for m in members if m.served] + [m for m in members if not m.served]
    row_of = {(m.source, m.id): r for r, m in enumerate(told)}
    order = np.array([row_of[m.source, m.id] for m in members])
    session = np.array([m.session for m in members], dtype=np.int32)
    served = np.array([m.served for m in members])
    count = int(served.sum())
    made_of = _undertaking(stores, told, views)
    with staging_folder(out, made_of) as root, recording_sums() as made:
        paths, base = Paths(root), 0 if served.all() else 1
        name_of = next(iter(dict.fromkeys(v.teacher for v in views)))
        texts = _texts(stores, told, name_of)
        if base:
            by_row = np.zeros(len(told), np.int32)
            by_row[order] = session
            write_index(paths, [m.id for m in told], texts, by_row)
            nothing = np.zeros(0, np.int32)
            write_edition(paths, base, len(told), [], np.zeros(0, np.uint64), order, session, served, nothing)
        else:
            write_index(paths, [m.id for m in told], texts, session)
        plan = Plan(
            paths, _now(), corpus | {"utterances": count, "sessions": int(session.max()) + 1}, versions(), {}, []
        )
        sources: dict[str, list[tuple[Store, int]]] = {}
        for number, name in enumerate(dict.fromkeys(v.teacher for v in views), start=base):
            sources[name] = _rows(stores, told, name)
            plan = _add_teacher(plan, name, number, base, sources[name], told, views, count)
        write_json(paths.data / "zarr.json", group_json({"stillhouse": {"teachers": list(plan.teachers)}}))
        for g in plan.generations:
            plans.write_generation(replace(plan, generations=[]), g, made)
        plans.write_head(plan, publish=False)
        with Scratch(paths) as scratch:
            there = {(t, c): Commits(paths, t, c) for t in plan.teachers for c in plan.views(t)}
            for item in plan.work_items():
                if there[item.teacher, item.context].has(item.shard.number, item.layers):
                    continue  # an earlier attempt put it under this URL
                first, last = item.shard.first, item.shard.last
                ids = [m.id for m in told[first:last]]
                copy_item(plan, scratch.folder, item, sources[item.teacher][first:last], ids)
                crash_point("item_copied")
            for name in plan.teachers:
                for context in plan.views(name):
                    if len(stores) == 1 or dtype_of(plan.teachers[name].dtype).scaled:
                        _copy_norms(plan, stores[0], name, context, scratch.folder)
                    else:
                        fix_norms(plan, name, context, scratch.folder)
        crash_point("built")
        publish_store(plan, made_of)
        size = folder_bytes(root)
    return Combined(str(out), [v.address for v in views], count, len(told) - count, size)


def _undertaking(stores: list[Store], told: list[Included], views: list[View]) -> str:
    """A hash of all that decides what the new store will be."""
    made = hashlib.blake2b(digest_size=16)
    for store in stores:
        p = store.plan
        prints = {name: t.fingerprints for name, t in p.teachers.items()}
        made.update(repr((p.created, [g.number for g in p.generations], p.corpus, prints)).encode())
    made.update(repr([v.address for v in views]).encode())
    for m in told:
        made.update(repr((m.source, m.id, m.session, m.served)).encode())
    return made.hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _rows(stores: list[Store], told: list[Included], name: str) -> list[tuple[Store, int]]:
    """(store, row) of every utterance, those that are context alone too."""
    known = []
    for store in stores:
        index = store.index_of(name)
        known.append({index.id(r): r for r in index.order.tolist()})
    return [(stores[m.source], known[m.source][m.id]) for m in told]


def _texts(stores: list[Store], told: list[Included], name: str) -> np.ndarray:
    return np.array([s.index_of(name).text_hash[r] for s, r in _rows(stores, told, name)], dtype=np.uint64)


def _add_teacher(
    plan: Plan,
    name: str,
    number: int,
    edition: int,
    sources: list[tuple[Store, int]],
    told: list[Included],
    views: list[View],
    count: int,
) -> Plan:
    """Write a teacher's tokens, vocabulary and metadata; its generation asks for the views."""
    first = sources[0][0]
    old, latest = first.plan.teachers[name], first.plan.latest(name)
    mine = [v for v in views if v.teacher == name]
    record = replace(
        old,
        contexts=[c for c in old.contexts if any(v.context == c for v in mine)],
        layers=[k for k in old.layers if any(v.layer == k for v in mine)],
        fingerprints={f"{v.context}/{v.layer}": old.fingerprints[f"{v.context}/{v.layer}"] for v in mine},
    )
    tokens = _tokens(sources, name)
    lengths = tokens.length.astype(np.int64)
    rows = shard_rows(int(lengths[:count].sum()), int(lengths.max()), record.width, dtype_of(record.dtype))
    shards, start = cut_shards(lengths[:count], rows)
    states = len(shards)
    if count < len(told):  # what is context alone has tokens, and no states
        more, later = cut_shards(lengths[count:], rows)
        shards += [Shard(states + s.number, count + s.first, count + s.last, s.rows) for s in more]
        start = np.concatenate([start, states * rows + later])
    layout = Layout([m.id for m in told], np.zeros(0, np.uint64), np.zeros(0, np.int32), tokens, start, rows, shards)
    write_teacher(plan.paths, record, _Vocabulary(dict.fromkeys(s for s, _ in sources), name), layout)  # type: ignore[arg-type]
    generation = Generation(
        number=number,
        teacher=name,
        work=[
            PlannedWork(c, [k for k in record.layers if View(name, c, k) in mine], list(range(states)))
            for c in record.contexts
        ],
        shard_rows=rows,
        shards=shards,
        batch_tokens=latest.batch_tokens,
        batch_overhead_tokens=latest.batch_overhead_tokens,
        core_tokens=latest.core_tokens,
        seed=latest.seed,
        created=_now(),
        edition=edition,
        dropped_shards=list(range(states, len(shards))),
    )
    write_json(plan.paths.data / name / "zarr.json", group_json({"stillhouse": asdict(record)}))
    return replace(plan, teachers=plan.teachers | {name: record}, generations=[*plan.generations, generation])


def _tokens(sources: list[tuple[Store, int]], name: str) -> Tokens:
    """Of all rows, in their order."""
    ids, spans, lengths = [], [], []
    at = 0
    while at < len(sources):
        store = sources[at][0]
        end = at
        while end < len(sources) and sources[end][0] is store:
            end += 1
        n, token_id, span = store.tokens_of_rows(np.array([r for _, r in sources[at:end]]), name)
        ids.append(token_id)
        spans.append(span)
        lengths.append(n)
        at = end
    return Tokens(np.concatenate(ids), np.concatenate(lengths).astype(np.int32), np.concatenate(spans))


class _Vocabulary:
    """Input embeddings and spellings out of stores, as `write_teacher` asks a teacher for them."""

    def __init__(self, stores: Sequence[Store] | dict[Store, None], name: str) -> None:
        self._rows: dict[int, np.ndarray] = {}
        self._pieces: dict[int, str] = {}
        for store in stores:
            vocabulary, table = store.embedding(name)
            self._rows |= dict(zip(np.asarray(vocabulary).tolist(), np.asarray(table)))
            self._pieces |= dict(zip(np.asarray(vocabulary).tolist(), store.pieces(name)))

    @property
    def tokeniser(self) -> _Vocabulary:
        return self

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([self._rows[i] for i in ids.tolist()])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._pieces[i] for i in ids]


def _copy_norms(plan: Plan, source: Store, name: str, context: str, scratch: Path) -> None:
    """Norms are never changed, so a part of a store is standardised as the whole of it is."""
    layers = plan.views(name)[context]
    norms = {k: source.norm(View(name, context, k)) for k in layers}
    commit_norms(plan, name, context, plan.latest(name).number, norms, scratch)

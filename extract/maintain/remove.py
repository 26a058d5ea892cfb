"""A store's life in place: views and utterances are taken out, and what is dead is cleared away.

Invariant: store.json is replaced once, when all that it will speak of is on disk; files go after that. Whoever is
killed in between leaves the store as it was or as it will be, with files that the next `store gc` removes.
Run: `stillhouse store rm STORE VIEWS`, `stillhouse store gc STORE`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ...data.errors import NoStoreError, UsageError
from ..pipeline.generation import NewRows, grow_teacher, next_generation, rows_after, write_new_rows, write_tokens
from ..pipeline.layout import compact
from ..store.disk.durable import Lock, crash_point, fsync_folder, write_json
from ..store.disk.exclusive import exclusive_access
from ..store.disk.layout import Paths, group_json
from ..store.format import plan as plans
from ..store.format.arrays import RawArray
from ..store.format.block_sums import RowSums, recording_sums
from ..store.format.commits import Commit, Commits, link_commit
from ..store.format.index import Index
from ..store.format.plan import Generation, Plan, PlannedWork, Shard
from ..store.read.rows import TeacherRows
from ..store.reader import Store
from ..store.verify.sums import check_sound
from ..store.views import View
from ..store.writer import versions
from ..teacher.tokenizer import Tokens
from .copy_unit import copy_item
from .garbage import remove, size_of, unreferenced_files


@dataclass(frozen=True)
class Removed:
    """What a command took out of a store, or would. `bytes` is the room that it gives back."""

    store: str
    views: list[str]
    utterances: int
    tokens: int  # dead ones, of all teachers
    moved_tokens: int  # that shared a shard with dead ones and lie elsewhere now
    files: int
    bytes: int
    done: bool


def remove_views(root: Path, patterns: Sequence[str], dry_run: bool = False) -> Removed:
    """Take views out of a store, files and all. Errors: NoStoreError where none matches, or none would be left."""
    with _alone(root) as (plan, scratch):
        store = Store.open(root)
        chosen = store.resolve(patterns, store.planned_views)
        left = [v for v in store.planned_views if v not in chosen]
        if not left:
            raise UsageError("this would take every view", where=root, remedy="remove the folder itself")
        after = _without_views(plan, chosen)
        gone = [p for p in _files_of(plan, chosen)]
        tokens = 0
        fact = Removed(str(root), [v.address for v in chosen], 0, tokens, 0, len(gone), size_of(gone), not dry_run)
        if dry_run:
            return fact
        _write_generations(plan, after, {})
        for name in after.teachers:
            group = after.paths.data / name
            write_json(group / "zarr.json", group_json({"stillhouse": asdict(after.teachers[name])}))
        write_json(after.paths.data / "zarr.json", group_json({"stillhouse": {"teachers": list(after.teachers)}}))
        crash_point("written")
        plans.write_head(after)
        fsync_folder(root)
        crash_point("switched")
        _renew_norms(after, chosen, scratch)
        remove([p for p in unreferenced_files(after) if _concerns(after.paths, p, chosen)] + gone)
        return fact


def remove_utterances(root: Path, ids: Sequence[str], dry_run: bool = False) -> Removed:
    """Serve these utterances no more. Their text stays what their neighbours' contexts saw; `clear` gives back room.

    Errors: NoStoreError naming those that the store does not know.
    """
    with _alone(root) as (plan, _):
        store = Store.open(root)
        check_sound(store)
        store.rows(ids)
        tokens, after = 0, plan
        growths = []
        for name in plan.teachers:
            index = store.index_of(name)
            rows = index.rows(ids)
            rows = rows[rows >= 0]
            if not len(rows):
                continue
            tokens += int(store.lengths(name)[rows].sum())
            served = index.live[index.order] & ~np.isin(index.order, rows)
            if not served.any():
                raise UsageError("this would take every utterance", where=root, remedy="remove the folder itself")
            after, growth = _new_edition(after, name, index, index.order, served)
            growths.append(growth)
        fact = Removed(str(root), [], len(set(ids)), tokens, 0, 0, 0, not dry_run)
        if not dry_run:
            with recording_sums() as made:
                for growth in growths:
                    write_new_rows(after, growth)
            _write_generations(plan, after, made)
            crash_point("written")
            plans.write_head(after)
            fsync_folder(root)
        return fact


def collect_garbage(root: Path, dry_run: bool = False) -> Removed:
    """Move what lives out of shards that have dead rows, then delete those, and all that nothing asks for.

    Errors: NoStoreError where the extraction is not finished; StoreError where what is to be moved is damaged;
    LockedError where somebody writes.
    """
    with _alone(root) as (plan, scratch):
        store = Store.open(root, checksums=True)
        check_sound(store)
        after, moves = plan, []
        dead = moved = 0
        for name in plan.teachers:
            index, t = store.index_of(name), TeacherRows(plan, name)
            go, packed = _emptied(plan, name, index, t)
            rows = _all(packed)
            dead += sum(s.rows for s in go) - int(t.length[rows].sum())
            if not go:
                continue
            unfinished = [v.address for v in store.planned_views if v.teacher == name and v not in store.views]
            if unfinished:
                raise NoStoreError(
                    f"not complete: {', '.join(unfinished)}", where=root, remedy="finish it: stillhouse extract"
                )
            moved += int(t.length[rows].sum())
            after, growth = _moved(after, name, index, t, packed, go)
            moves.append((name, growth, rows))
        fact = Removed(str(root), [], 0, dead, moved, 0, 0, not dry_run)
        if dry_run:
            after = replace(after, generations=_needed(after))
            doomed = unreferenced_files(after, {name: growth.order for name, growth, _ in moves})
            grows = sum(_bytes_of(after, name, growth) for name, growth, _ in moves)
            return replace(fact, files=len(doomed), bytes=size_of(doomed) - grows)
        size = size_of([root])
        with recording_sums() as made:
            for name, growth, rows in moves:
                _write_moved(after, name, growth, store, rows, scratch)
        after = replace(after, generations=_needed(after))
        _write_generations(plan, after, made)
        crash_point("copied")
        if after != plan:
            plans.write_head(after)
            fsync_folder(root)
        crash_point("switched")
        doomed = unreferenced_files(after)
        remove(doomed)
        return replace(fact, files=len(doomed), bytes=size - size_of([root]))


@contextmanager
def _alone(root: Path) -> Iterator[tuple[Plan, Path]]:
    """The plan, and a folder on the store's disk, while nobody else plans or writes."""
    if not Paths(root).store_json.exists():
        plans.read_plan(root)  # says what is wrong
    paths = Paths(root)
    with Lock(paths.lock("plan"), wait=True), exclusive_access(paths):
        scratch = paths.tmp / f"life-{os.getpid()}"
        with Lock(scratch / "lock", wait=True):
            try:
                yield plans.read_plan(root), scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_generations(before: Plan, after: Plan, made: dict[Path, list[RowSums]]) -> None:
    """Those that are new; `made`: sums of what was written for them."""
    there = {g.number for g in before.generations}
    for g in after.generations:
        if g.number not in there:
            plans.write_generation(replace(after, generations=before.generations), g, made)


def _without_views(plan: Plan, views: Sequence[View]) -> Plan:
    """A plan that no longer asks for views; a teacher without any goes."""
    teachers, generations = dict(plan.teachers), list(plan.generations)
    number = next_generation(plan)
    for name in plan.teachers:
        names = [f"{v.context}/{v.layer}" for v in views if v.teacher == name]
        if not names:
            continue
        left = {k: v for k, v in plan.teachers[name].fingerprints.items() if k not in names}
        if not left:
            del teachers[name]
            generations = [g for g in generations if g.teacher != name]
            continue
        teachers[name] = replace(teachers[name], fingerprints=left)
        nothing = {"work": [], "dropped_shards": [], "dropped_views": names}
        generations.append(replace(plan.latest(name), number=number, created=_now(), **nothing))  # type: ignore[arg-type]
        number += 1
    return replace(plan, teachers=teachers, generations=generations)


def _files_of(plan: Plan, views: Sequence[View]) -> Iterator[Path]:
    """The folders of `hidden` and `scale` in which a view's shards are."""
    for v in views:
        t = plan.teachers[v.teacher]
        for array in ("hidden", "scale"):
            path = plan.paths.chunk(v.teacher, array, t.contexts.index(v.context), t.layers.index(v.layer))
            if path.is_dir():
                yield path


def _concerns(paths: Paths, path: Path, views: Sequence[View]) -> bool:
    """Whether a path is of the teachers of these views."""
    names = {v.teacher for v in views}
    return any(path.is_relative_to(f) for n in names for f in (paths.data / n, paths.root / "commits" / n))


def _renew_norms(plan: Plan, views: Sequence[View], scratch: Path) -> None:
    """Records of norms that speak of views that are gone make room for ones that do not, so that a view that is
    extracted again gets norms of its own.
    """
    for name in dict.fromkeys(v.teacher for v in views if v.teacher in plan.teachers):
        kept = plan.views(name)
        for context in dict.fromkeys(v.context for v in views if v.teacher == name):
            commits = Commits(plan.paths, name, context)
            layers = [k for k in kept.get(context, []) if commits.has("norms", [k])]
            if layers:
                told: dict[str, int] = {}
                for k in layers:
                    of = commits.of["norms", k].checksums
                    told |= {key: of[key] for key in (f"norm_mean.{k}", f"norm_std.{k}") if key in of}
                number = plan.latest(name).number
                commit = Commit(name, context, "norms", number, layers, [], [], checksums=told, versions=versions())
                link_commit(plan.paths, scratch, commit)


def _new_edition(plan: Plan, name: str, index: Index, order: np.ndarray, served: np.ndarray) -> tuple[Plan, NewRows]:
    """The same rows, of which other ones are served."""
    number, latest = next_generation(plan), plan.latest(name)
    used = order[served]
    length, start = (RawArray(plan.paths.data / name / a).read() for a in ("length", "start"))
    used = used[length[used] > 0]
    shards = set((start[used] // latest.shard_rows).tolist())
    dropped = [s.number for s in plan.shards(name) if s.number not in shards]
    generation = replace(
        latest, number=number, work=[], created=_now(), edition=number, dropped_shards=dropped, dropped_views=[]
    )
    growth = NewRows(
        number=number,
        first=rows_after(plan),
        ids=[],
        text_hash=np.zeros(0, np.uint64),
        source=np.zeros(0, np.int32),
        order=order,
        session=index.session_of,
        served=served,
    )
    return replace(plan, generations=[*plan.generations, generation]), growth


def _emptied(plan: Plan, name: str, index: Index, t: TeacherRows) -> tuple[list[Shard], list[np.ndarray]]:
    """Shards that go, and the rows that live in them as they will lie together, by new shard."""
    rows = index.order[index.live[index.order]]
    rows = rows[t.length[rows] > 0]  # those without tokens are in no shard
    kept = {s.number: s for s in plan.shards(name)}
    lengths = t.length[rows].astype(np.int64)
    go, packed = compact(t.start[rows] // t.shard_rows, lengths, {n: s.rows for n, s in kept.items()}, t.shard_rows)
    return [kept[n] for n in go], [rows[p] for p in packed]


def _all(packed: Sequence[np.ndarray]) -> np.ndarray:
    """Rows in their new order."""
    return np.concatenate([np.zeros(0, np.int64), *packed])


def _moved(
    plan: Plan, name: str, index: Index, t: TeacherRows, packed: Sequence[np.ndarray], go: Sequence[Shard]
) -> tuple[Plan, NewRows]:
    """A generation in which these rows, by shard, lie in shards at the end, and those that they were in are dropped."""
    number, latest, rows = next_generation(plan), plan.latest(name), _all(packed)
    first, begin, lengths = rows_after(plan), len(latest.shards), t.length[rows].astype(np.int64)
    tail: list[Shard] = []
    starts = [np.zeros(0, np.int64)]
    for part in packed:
        into = np.cumsum(t.length[part], dtype=np.int64)
        at = tail[-1].last if tail else first
        starts.append((begin + len(tail)) * latest.shard_rows + into - t.length[part])
        tail.append(Shard(begin + len(tail), at, at + len(part), int(into[-1])))
    order = index.order.copy()
    order[index.position[rows]] = first + np.arange(len(rows))
    places = t.places(rows)
    tokens = Tokens(t.tokens(t.token_id, places), lengths.astype(np.int32), t.tokens(t.span, places))
    growth = NewRows(
        number=number,
        first=first,
        ids=[index.id(r) for r in rows.tolist()],
        text_hash=np.asarray(index.text_hash[rows]),
        source=rows.astype(np.int32),
        order=order,
        session=index.session_of,
        served=index.live[index.order],
        tokens=tokens,
        start=np.concatenate(starts),
        vocabulary=np.zeros(0, np.int32),
    )
    ends = [s.number for s in tail]
    generation = replace(
        latest,
        number=number,
        work=[PlannedWork(c, layers, ends) for c, layers in plan.views(name).items() if ends],
        shards=[*latest.shards, *tail],
        created=_now(),
        edition=number,
        # All that ever were: this generation may outlive those that dropped them
        dropped_shards=sorted(set(range(begin)) - {s.number for s in plan.shards(name) if s not in go}),
        dropped_views=[],
    )
    return replace(plan, generations=[*plan.generations, generation]), growth


def _write_moved(plan: Plan, name: str, growth: NewRows, store: Store, rows: np.ndarray, scratch: Path) -> None:
    """Rows, tokens and units of a moved generation; nothing counts before store.json names it."""
    mine = replace(plan, generations=[g for g in plan.generations if g.number <= growth.number])
    write_new_rows(mine, growth)
    only = replace(mine, generations=[g for g in mine.generations if g.teacher == name])
    grow_teacher(only, growth)
    write_tokens(only, growth, None)
    crash_point("grown")
    for item in only.work_items(name):
        if item.generation.number == growth.number:
            some = range(item.shard.first - growth.first, item.shard.last - growth.first)
            sources = [(store, int(rows[i])) for i in some]
            copy_item(mine, scratch, item, sources, [growth.ids[i] for i in some])
            crash_point("unit_copied")


def _needed(plan: Plan) -> list[Generation]:
    """Generations without those that ask for nothing any more and take nothing back."""
    asked = {u.generation.number for u in plan.work_items()}
    kept: list[Generation] = []
    for g in plan.generations:
        takes = bool(g.dropped_views) and any(k.teacher == g.teacher for k in kept)
        takes = takes or not set(g.dropped_shards) <= set(plan.latest(g.teacher).dropped_shards)
        if g.number in asked or takes or g is plan.latest(g.teacher):
            kept.append(g)
    return kept


def _bytes_of(plan: Plan, name: str, growth: NewRows) -> int:
    """What moved rows take: states, tokens, checksums and hashes."""
    from ..pipeline.estimate import view_bytes

    last, views = plan.latest(name), plan.views(name)
    items = [u for u in plan.work_items(name) if u.generation.number == last.number]
    shards = len({u.shard.number for u in items})
    a_row = 8 + 8 + 12 + 16 * len(views) + 4 * sum(len(layers) for layers in views.values())
    rows = len(growth.order) * 16 + len(growth.ids) * a_row
    return sum(view_bytes(plan.teachers[name], items).values()) + 12 * shards * last.shard_rows + rows

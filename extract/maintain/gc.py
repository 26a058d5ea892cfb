"""Free the disk space of deleted views and utterances (`stillhouse store gc`).

Guarantees: utterances that share a shard with deleted ones are copied byte for byte before the shard is deleted. A
killed command leaves the old or the new store, plus files that the next `store gc` deletes.
Try: `stillhouse store gc STORE --dry-run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...data.errors import NoStoreError
from ..pipeline.estimate import view_bytes
from ..pipeline.generation import later_generation, next_generation, rows_after
from ..pipeline.layout import NewRows, compact
from ..pipeline.new_store import grow_teacher, write_new_rows, write_tokens
from ..pipeline.reuse import copy_item
from ..speech.sounds import Sounds
from ..store.format.arrays import ArrayWriter
from ..store.format.index import Index
from ..store.format.plan import Generation, Plan, PlannedWork, Shard
from ..store.read.rows import TeacherRows
from ..store.reader import Store
from ..store.verify.sums import check_sound
from ..teacher.tokenizer import Tokens
from .exclusive import Removed, exclusive_plan, replace_plan
from .garbage import delete_files, delete_locks, size_of, unreferenced_files


def collect_garbage(root: Path, dry_run: bool = False) -> Removed:
    """Move readable utterances out of shards that hold deleted ones, then delete all files that the plan does not need.

    Raises NoStoreError if the extraction is not finished, StoreError if the store is damaged, and LockedError if
    another process writes to it.
    """
    with exclusive_plan(root) as (plan, scratch):
        store = Store.open(root, checksums=True)
        check_sound(store)
        after, moves = plan, []
        deleted_tokens = moved_tokens = 0
        for name in plan.teachers:
            index, teacher_rows = store.index_of(name), TeacherRows(plan, name)
            emptied, packed = _choose_shards(plan, name, index, teacher_rows)
            tokens = int(teacher_rows.length[_concatenate(packed)].sum())
            deleted_tokens += sum(s.rows for s in emptied) - tokens
            if not emptied:
                continue
            unfinished = [v.address for v in store.planned_views if v.teacher == name and v not in store.views]
            if unfinished:
                what = f"these views are not complete: {', '.join(unfinished)}"
                raise NoStoreError(what, where=root, remedy="finish them with stillhouse extract")
            moved_tokens += tokens
            after, moved = _plan_move(after, name, index, teacher_rows, packed, emptied)
            moves.append((name, moved))
        removed = Removed(str(root), tokens=deleted_tokens, moved_tokens=moved_tokens)
        if dry_run:
            after = replace(after, generations=_needed_generations(after))
            garbage = unreferenced_files(after, {name: moved.order for name, moved in moves})
            copied = sum(_bytes_of(after, name, moved) for name, moved in moves)
            return replace(removed, files=len(garbage), bytes=size_of(plan.paths.files, garbage) - copied, done=False)
        size = size_of(plan.paths.files, [root])
        writer = ArrayWriter(plan.paths)
        for name, moved in moves:
            _write_move(writer, after, name, moved, store, scratch)
        after = replace(after, generations=_needed_generations(after))
        replace_plan(plan, after, writer.sums)
        garbage = unreferenced_files(after)
        delete_files(garbage)
        delete_locks(plan)
        return replace(removed, files=len(garbage), bytes=size - size_of(plan.paths.files, [root]))


def _choose_shards(
    plan: Plan, name: str, index: Index, teacher_rows: TeacherRows
) -> tuple[list[Shard], list[np.ndarray]]:
    """Shards to empty, and the live rows in them as they will lie together: one array for each new shard."""
    rows = index.order[index.live[index.order]]
    rows = rows[teacher_rows.length[rows] > 0]  # utterances without tokens are in no shard
    shards = {s.number: s for s in plan.shards(name)}
    numbers, packed = compact(
        teacher_rows.start[rows] // teacher_rows.shard_rows,
        teacher_rows.length[rows].astype(np.int64),
        {n: s.rows for n, s in shards.items()},
        teacher_rows.shard_rows,
    )
    return [shards[n] for n in numbers], [rows[p] for p in packed]


def _concatenate(packed: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [n]: the rows in their new order."""
    return np.concatenate([np.zeros(0, np.int64), *packed])


def _plan_move(
    plan: Plan, name: str, index: Index, teacher_rows: TeacherRows, packed: list[np.ndarray], emptied: list[Shard]
) -> tuple[Plan, NewRows]:
    """A plan whose last generation has the `packed` rows in shards at the end, and drops the `emptied` shards."""
    number, latest, rows = next_generation(plan), plan.latest(name), _concatenate(packed)
    first, begin, lengths = rows_after(plan), len(latest.shards), teacher_rows.length[rows].astype(np.int64)
    tail: list[Shard] = []
    starts = [np.zeros(0, np.int64)]
    for part in packed:
        ends = np.cumsum(teacher_rows.length[part], dtype=np.int64)
        at = tail[-1].last if tail else first
        starts.append((begin + len(tail)) * latest.shard_rows + ends - teacher_rows.length[part])
        tail.append(Shard(begin + len(tail), at, at + len(part), int(ends[-1])))
    order = index.order.copy()
    order[index.position[rows]] = first + np.arange(len(rows))
    tokens: Tokens | Sounds
    if teacher_rows.record.is_speech:
        tokens = Sounds(lengths.astype(np.int32), teacher_rows.audio_source(rows))
    else:
        ranges = teacher_rows.ranges(rows)
        token_id, span = (teacher_rows.tokens(a, ranges) for a in (teacher_rows.token_id, teacher_rows.span))
        tokens = Tokens(token_id, lengths.astype(np.int32), span)
    moved = NewRows(
        number,
        first,
        order,
        index.session_of,
        served=index.live[index.order],
        ids=[index.id(r) for r in rows.tolist()],
        text_hash=np.asarray(index.text_hash[rows]),
        source=rows.astype(np.int32),
        tokens=tokens,
        start=np.concatenate(starts),
        vocabulary=np.zeros(0, np.int32),
    )
    numbers = [s.number for s in tail]
    generation = later_generation(
        plan,
        name,
        number,
        work=[PlannedWork(c, layers, numbers) for c, layers in plan.views(name).items() if numbers],
        shards=[*latest.shards, *tail],
        edition=number,
        # Every shard that was ever dropped: the generations that dropped them may be deleted before this one.
        dropped_shards=sorted(set(range(begin)) - {s.number for s in plan.shards(name) if s not in emptied}),
    )
    return replace(plan, generations=[*plan.generations, generation]), moved


def _write_move(writer: ArrayWriter, plan: Plan, name: str, moved: NewRows, store: Store, scratch: Path) -> None:
    """Write rows, tokens and work items of a move. They do not count before store.json names the generation."""
    until = replace(plan, generations=[g for g in plan.generations if g.number <= moved.number])
    write_new_rows(writer, moved)
    own = replace(until, generations=[g for g in until.generations if g.teacher == name])
    grow_teacher(writer, own, moved)
    write_tokens(writer, own, moved, None)
    for item in own.work_items(name):
        if item.generation.number == moved.number:
            inside = slice(item.shard.first - moved.first, item.shard.last - moved.first)
            sources = [(store, row) for row in moved.source[inside].tolist()]
            copy_item(until, scratch, item, sources, moved.ids[inside])


def _needed_generations(plan: Plan) -> list[Generation]:
    """The generations that ask for work or drop something that an earlier one still names."""
    asked = {item.generation.number for item in plan.work_items()}
    kept: list[Generation] = []
    for g in plan.generations:
        drops = bool(g.dropped_views) and any(k.teacher == g.teacher for k in kept)
        drops = drops or not set(g.dropped_shards) <= set(plan.latest(g.teacher).dropped_shards)
        if g.number in asked or drops or g is plan.latest(g.teacher):
            kept.append(g)
    return kept


def _bytes_of(plan: Plan, name: str, moved: NewRows) -> int:
    """Bytes that a move will write: states, tokens, checksums and hashes."""
    latest, views = plan.latest(name), plan.views(name)
    items = [item for item in plan.work_items(name) if item.generation.number == latest.number]
    shards = len({item.shard.number for item in items})
    per_row = 8 + 8 + 12 + 16 * len(views) + 4 * sum(len(layers) for layers in views.values())
    rows = len(moved.order) * 16 + len(moved.ids) * per_row
    return sum(view_bytes(plan.teachers[name], items).values()) + 12 * shards * latest.shard_rows + rows

"""Delete views or utterances of a store (`stillhouse store rm`).

Guarantees: a killed command leaves the old or the new store, plus files that the next `store gc` deletes.
Try: `stillhouse store rm STORE VIEWS --dry-run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...data.errors import UsageError
from ..pipeline.generation import later_generation, next_generation, rows_after
from ..pipeline.layout import NewRows
from ..pipeline.new_store import write_groups, write_new_rows
from ..store.format.arrays import ArrayWriter, RawArray
from ..store.format.commits import Commit, Commits, link_commit
from ..store.format.index import Index
from ..store.format.plan import Plan
from ..store.reader import Store
from ..store.verify.sums import check_sound
from ..store.views import View
from ..store.writer import versions
from .exclusive import Removed, exclusive_plan, replace_plan
from .garbage import delete_files, size_of, unreferenced_files


def remove_views(root: Path, patterns: Sequence[str], dry_run: bool = False) -> Removed:
    """Delete views and their files.

    Raises NoStoreError if a pattern matches no view, UsageError if no view would be left, and LockedError if another
    process writes to the store.
    """
    with exclusive_plan(root) as (plan, scratch):
        store = Store.open(root)
        chosen = store.resolve(patterns, store.planned_views)
        if len(chosen) == len(store.planned_views):
            raise UsageError("this would delete every view", where=root, remedy="delete the folder itself")
        after = _without_views(plan, chosen)
        files = _garbage_of(after, chosen)
        removed = Removed(
            str(root), [v.address for v in chosen], files=len(files), bytes=size_of(plan.paths.files, files)
        )
        if dry_run:
            return replace(removed, done=False)
        write_groups(ArrayWriter(after.paths), after)
        replace_plan(plan, after)
        _renew_norms(after, chosen, scratch)
        delete_files(_garbage_of(after, chosen))
        return removed


def remove_utterances(root: Path, ids: Sequence[str], dry_run: bool = False) -> Removed:
    """Hide utterances: they cannot be read any more, but their text stays part of their neighbours' context.

    `collect_garbage` frees their disk space. Raises NoStoreError for ids that the store does not have, UsageError if no
    utterance would be left, StoreError if the store is damaged, and LockedError if another process writes to it.
    """
    with exclusive_plan(root) as (plan, _):
        store = Store.open(root)
        check_sound(store)
        store.rows(ids)
        tokens, after = 0, plan
        tables: list[NewRows] = []
        for name in plan.teachers:
            index = store.index_of(name)
            rows = index.rows(ids)
            rows = rows[rows >= 0]
            if not len(rows):
                continue
            tokens += int(store.lengths(name)[rows].sum())
            served = index.live[index.order] & ~np.isin(index.order, rows)
            if not served.any():
                raise UsageError("this would delete every utterance", where=root, remedy="delete the folder itself")
            after, table = _hide(after, name, index, served)
            tables.append(table)
        removed = Removed(str(root), [], len(set(ids)), tokens)
        if dry_run:
            return replace(removed, done=False)
        writer = ArrayWriter(plan.paths)
        for table in tables:
            write_new_rows(writer, table)
        replace_plan(plan, after, writer.sums)
        return removed


def _without_views(plan: Plan, views: Sequence[View]) -> Plan:
    """The plan after these views are deleted. A teacher without any view is deleted, too."""
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
        generations.append(later_generation(plan, name, number, dropped_views=names))
        number += 1
    return replace(plan, teachers=teachers, generations=generations)


def _garbage_of(plan: Plan, views: Sequence[View]) -> list[Path]:
    """Files that a plan does not need, of the teachers of these views."""
    folders = [f / v.teacher for v in views for f in (plan.paths.data, plan.paths.root / "commits")]
    return [p for p in unreferenced_files(plan) if any(p.is_relative_to(f) for f in folders)]


def _renew_norms(plan: Plan, views: Sequence[View], scratch: Path) -> None:
    """Replace commit records of norms that name deleted views, or a view that comes back would get its old norms."""
    for name, context in dict.fromkeys((v.teacher, v.context) for v in views if v.teacher in plan.teachers):
        commits = Commits(plan.paths, name, context)
        layers = [k for k in plan.views(name).get(context, []) if commits.has("norms", [k])]
        if layers:
            sums: dict[str, int] = {}
            for k in layers:
                recorded = commits.of["norms", k].checksums
                sums |= {key: crc for key, crc in recorded.items() if key.partition(".")[2] == str(k)}
            number = plan.latest(name).number
            commit = Commit(name, context, "norms", number, layers, [], [], checksums=sums, versions=versions())
            link_commit(plan.paths, scratch, commit)


def _hide(plan: Plan, name: str, index: Index, served: np.ndarray) -> tuple[Plan, NewRows]:
    """A plan that serves only the utterances `served`, bool [n] in the order of the corpus, and its table of them."""
    number, latest = next_generation(plan), plan.latest(name)
    rows = index.order[served]
    length, start = (RawArray(plan.paths, name, a).read() for a in ("length", "start"))
    rows = rows[length[rows] > 0]
    shards = set((start[rows] // latest.shard_rows).tolist())
    dropped = [s.number for s in plan.shards(name) if s.number not in shards]
    generation = later_generation(plan, name, number, edition=number, dropped_shards=dropped)
    table = NewRows(number, rows_after(plan), index.order, index.session_of, served)
    return replace(plan, generations=[*plan.generations, generation]), table

"""Delete views or utterances of a store (`stillhouse store rm`).

Guarantees: a killed command leaves the old or the new store, plus files that the next `store gc` deletes.
Try: `stillhouse store rm STORE VIEWS --dry-run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ...data.errors import UsageError
from ..pipeline.generation import NewRows, next_generation, rows_after, utc_now
from ..pipeline.new_store import write_new_rows
from ..store.disk.durable import write_json
from ..store.disk.layout import Paths, group_json
from ..store.format.arrays import RawArray
from ..store.format.block_sums import recording_sums
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

    Raises:
        NoStoreError: a pattern matches no view.
        UsageError: no view would be left.
        LockedError: another process writes to the store.
    """
    with exclusive_plan(root) as (plan, scratch):
        store = Store.open(root)
        chosen = store.resolve(patterns, store.planned_views)
        if len(chosen) == len(store.planned_views):
            raise UsageError("this would delete every view", where=root, remedy="delete the folder itself")
        after = _without_views(plan, chosen)
        files = list(_files_of(plan, chosen))
        removed = Removed(str(root), [v.address for v in chosen], files=len(files), bytes=size_of(files))
        if dry_run:
            return replace(removed, done=False)
        for name, record in after.teachers.items():
            write_json(after.paths.data / name / "zarr.json", group_json({"stillhouse": asdict(record)}))
        write_json(after.paths.data / "zarr.json", group_json({"stillhouse": {"teachers": list(after.teachers)}}))
        replace_plan(plan, after)
        _renew_norms(after, chosen, scratch)
        delete_files([p for p in unreferenced_files(after) if _belongs_to(after.paths, p, chosen)] + files)
        return removed


def remove_utterances(root: Path, ids: Sequence[str], dry_run: bool = False) -> Removed:
    """Hide utterances: they cannot be read any more, but their text stays part of their neighbours' context.

    `collect_garbage` frees their disk space.

    Raises:
        NoStoreError: names ids that the store does not have.
        UsageError: no utterance would be left.
        StoreError: stored bytes are damaged.
        LockedError: another process writes to the store.
    """
    with exclusive_plan(root) as (plan, _):
        store = Store.open(root)
        check_sound(store)
        store.rows(ids)
        tokens, after = 0, plan
        editions: list[NewRows] = []
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
            after, edition = _new_edition(after, name, index, served)
            editions.append(edition)
        removed = Removed(str(root), [], len(set(ids)), tokens)
        if dry_run:
            return replace(removed, done=False)
        with recording_sums() as sums:
            for edition in editions:
                write_new_rows(after, edition)
        replace_plan(plan, after, sums)
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
        latest = replace(plan.latest(name), number=number, created=utc_now())
        generations.append(replace(latest, work=[], dropped_shards=[], dropped_views=names))
        number += 1
    return replace(plan, teachers=teachers, generations=generations)


def _files_of(plan: Plan, views: Sequence[View]) -> Iterator[Path]:
    """The folders of `hidden` and `scale` that hold the shards of these views."""
    for v in views:
        t = plan.teachers[v.teacher]
        for array in ("hidden", "scale"):
            path = plan.paths.chunk(v.teacher, array, t.contexts.index(v.context), t.layers.index(v.layer))
            if path.is_dir():
                yield path


def _belongs_to(paths: Paths, path: Path, views: Sequence[View]) -> bool:
    """Whether a path belongs to a teacher of these views."""
    names = {v.teacher for v in views}
    return any(path.is_relative_to(f) for n in names for f in (paths.data / n, paths.root / "commits" / n))


def _renew_norms(plan: Plan, views: Sequence[View], scratch: Path) -> None:
    """Replace commit records of norms that name deleted views.

    Without that, a view that is extracted again would get the norms of the deleted one.
    """
    for name in dict.fromkeys(v.teacher for v in views if v.teacher in plan.teachers):
        kept = plan.views(name)
        for context in dict.fromkeys(v.context for v in views if v.teacher == name):
            commits = Commits(plan.paths, name, context)
            layers = [k for k in kept.get(context, []) if commits.has("norms", [k])]
            if layers:
                sums: dict[str, int] = {}
                for k in layers:
                    recorded = commits.of["norms", k].checksums
                    sums |= {key: recorded[key] for key in (f"norm_mean.{k}", f"norm_std.{k}") if key in recorded}
                number = plan.latest(name).number
                commit = Commit(name, context, "norms", number, layers, [], [], checksums=sums, versions=versions())
                link_commit(plan.paths, scratch, commit)


def _new_edition(plan: Plan, name: str, index: Index, served: np.ndarray) -> tuple[Plan, NewRows]:
    """A plan whose last generation serves only the utterances `served`, bool [n] in the order of the corpus."""
    number, latest = next_generation(plan), plan.latest(name)
    rows = index.order[served]
    length, start = (RawArray(plan.paths.data / name / a).read() for a in ("length", "start"))
    rows = rows[length[rows] > 0]
    shards = set((start[rows] // latest.shard_rows).tolist())
    generation = replace(
        latest,
        number=number,
        work=[],
        created=utc_now(),
        edition=number,
        dropped_shards=[s.number for s in plan.shards(name) if s.number not in shards],
        dropped_views=[],
    )
    edition = NewRows(
        number=number,
        first=rows_after(plan),
        ids=[],
        text_hash=np.zeros(0, np.uint64),
        source=np.zeros(0, np.int32),
        order=index.order,
        session=index.session_of,
        served=served,
    )
    return replace(plan, generations=[*plan.generations, generation]), edition

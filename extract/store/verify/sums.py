"""Verify what is small: JSON records by their own checksums, arrays by the checksums of plans and commits.

Guarantees: nothing is written. Damage is named by where it lies. What was written before there were checksums is listed
by `unchecked` and otherwise left alone.
Try: `pytest tests/extract/store/test_damage.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from ....data.errors import StillhouseError, StoreError, first_few
from ..disk.checksums import checksum_error, has_checksum
from ..disk.layout import crc32c
from ..disk.paths import Paths
from ..format.arrays import RawArray
from ..format.block_sums import Sums, read_sums
from ..format.commits import Commit
from ..format.plan import WorkItem, read_plan
from ..reader import Store
from ..views import View

INPUT_ARRAYS = ("input_hash", "context_left", "context_right")
TABLES = ("id_offset", "id_bytes", "id_hash", "id_row", "text_hash", "session")
Arrays = dict[tuple[str, ...], np.ndarray]  # arrays that were read: each read of an object store is a request
NORMS_AGAIN = "stillhouse inspect verify STORE --repair computes it again, unless the corpus has changed since"
NORMS = ("norm_mean", "norm_std", "codebook")  # the last one is pq's
_COMMIT = re.compile(r"(norms|\d+)\.\d+\.json")
_UNREADABLE = (StillhouseError, OSError, ValueError)  # Such a file is a finding where the files themselves are checked.


@dataclass(frozen=True)
class Damage:
    """Rows of an array that are not what was written. `where` names them for people."""

    array: str
    where: str
    remedy: str = "restore the file from a backup, or extract into a new store"


def record_files(paths: Paths) -> list[Path]:
    """Return every JSON file of a store."""
    groups = ("zarr.json", "*/zarr.json", "*/*/zarr.json", "utterances/editions/*/zarr.json")
    files = sorted([*paths.root.glob("store.json"), *paths.root.glob("plan/*/*.json")])
    files += [p for p in sorted((paths.root / "commits").glob("*/*/*.json")) if _COMMIT.fullmatch(p.name)]
    for pattern in (*groups, "utterances/editions/*/*/zarr.json"):
        files += sorted(paths.data.glob(pattern))
    return files


def record_damage(paths: Paths) -> Iterator[tuple[str, Path]]:
    """Yield (what, file) of JSON files that cannot be read or differ from their checksum, and of sums that are gone."""
    try:
        summed = {paths.sums(number) for number in read_plan(paths.files).summed()}
    except _UNREADABLE:
        summed = set()
    for path in record_files(paths):
        try:
            value = paths.files.read_json(path)
            damage = checksum_error(value, path.name)
            sums = path.with_name("sums.json")
            needed = path.name == "plan.json" and sums in summed and has_checksum(value, path.name)
            if needed and not paths.files.local(sums).exists():
                yield "is missing", sums
        except _UNREADABLE as e:
            damage = str(e) if not isinstance(e, StillhouseError) else e.what
        if damage is not None:
            yield damage, path


def table_damage(store: Store) -> Iterator[Damage]:
    """Yield the damage of the tables of utterances."""
    newest = store.plan.generations[-1]
    editions = {store.plan.edition(name) for name in store.plan.teachers}
    yield from _planned(store, newest.number, *(f"utterances/{name}" for name in TABLES))
    for edition in sorted(editions - {0}):
        number = max(g.number for g in store.plan.generations if g.edition == edition)
        yield from _planned(store, number, f"utterances/editions/{edition}/")


def token_damage(store: Store, teacher: str) -> Iterator[Damage]:
    """Yield the damage of a teacher's tokens and vocabulary."""
    yield from _planned(store, store.plan.latest(teacher).number, f"{teacher}/")


def _planned(store: Store, number: int, *prefixes: str) -> Iterator[Damage]:
    """Yield the damage of arrays that a generation wrote, and whose names begin with one of `prefixes`."""
    for name, parts in read_sums(store.paths, number).items():
        if not name.startswith(prefixes):
            continue
        try:
            array = RawArray(store.paths, *name.split("/"))
            values = np.ascontiguousarray(array.read())
        except _UNREADABLE:
            continue
        rows, last_name = array.chunks[0] or 1, array.path.name
        by_shard = array.plain and last_name in ("token_id", "span")  # Chunks of dropped shards may be gone.
        trailing = (0,) * (len(array.shape) - 1)
        chunks = {n for n in range(-(-len(values) // rows)) if not by_shard or array.file(n, *trailing).is_file()}
        for part in parts:
            for first, last, crc in part.blocks():
                if first // rows in chunks and crc32c(values[first:last]) != crc:
                    yield Damage(last_name, _rows_for_people(store, name, first, last))


def _rows_for_people(store: Store, name: str, first: int, last: int) -> str:
    """Name rows of a planned array by their utterances, where they have any."""
    group, _, array = name.partition("/")
    rows: list[int] = []
    try:
        if array in ("token_id", "span"):
            start, length = (np.asarray(RawArray(store.paths, group, a).read()) for a in ("start", "length"))
            rows = np.flatnonzero((start < last) & (start + length > first)).tolist()
        elif array in ("start", "length", "audio_source", "text_hash", "session"):
            rows = list(range(first, last))
        index = store.index if group == "utterances" else store.index_of(group)
        return f"{name} utterance {first_few([index.id(r) for r in rows])}" if rows else f"{name} row {first}"
    except (*_UNREADABLE, IndexError):
        return f"{name} row {first}"


def committed_layers(store: Store, item: WorkItem) -> Iterator[tuple[int, Commit]]:
    """Yield (layer, commit) of the layers of a work item that are extracted."""
    commits = store.commits(item.teacher, item.context)
    for layer in item.layers:
        commit = commits.of.get((item.shard.number, layer))
        if commit is not None and commit.generation >= item.generation.number:
            yield layer, commit


def item_damage(store: Store, item: WorkItem, arrays: Arrays) -> Iterator[Damage]:
    """Yield the damage of what a committed work item says about its passes, and of its utterances' checksums."""
    commits, shard, name = store.commits(item.teacher, item.context), item.shard, item.teacher
    record = store.plan.teachers[name]
    c = record.contexts.index(item.context)
    # Layers share the input, and a later writer leaves out what is dead by then: any of them may have been last.
    counted = [commit for (number, _), commit in commits.of.items() if number == shard.number]
    sums_of = [c.checksums for c in sorted(counted, key=lambda c: -c.generation)]
    seen: set[tuple[str, int]] = set()
    for layer, commit in committed_layers(store, item):
        for array in (*INPUT_ARRAYS, "crc32c"):
            inputs = array in INPUT_ARRAYS
            key, lead = (array, (c,)) if inputs else (str(layer), (c, record.layers.index(layer)))
            crc = sums_of[0].get(key) if inputs else commit.checksums.get(key)
            if crc is None or (key, crc) in seen:
                continue
            seen.add((key, crc))
            allowed = {s.get(key) for s in sums_of} if inputs else {crc}
            view = f"{name}/{item.context}" if inputs else f"{name}/{item.context}/{layer}"
            if _range_sum(store.paths, arrays, (name, array), lead, shard.first, shard.last) not in {None, *allowed}:
                yield Damage(array, f"{view} shard {shard.number} {array}")


def _range_sum(
    paths: Paths, arrays: Arrays, name: tuple[str, ...], lead: tuple[int, ...], first: int, last: int
) -> int | None:
    """The crc32c of rows [first, last) behind the leading indices; None where they cannot be read."""
    key = (*name, *map(str, lead))
    try:
        if key not in arrays:
            arrays[key] = RawArray(paths, *name).read(*lead)
        return crc32c(np.ascontiguousarray(arrays[key][first:last]).tobytes())
    except _UNREADABLE:
        return None


def norm_damage(store: Store, view: View) -> Iterator[Damage]:
    """Yield the damage of a complete view's norms."""
    commit = store.commits(view.teacher, view.context).of["norms", view.layer]
    record = store.plan.teachers[view.teacher]
    lead = record.contexts.index(view.context), record.layers.index(view.layer)
    for name in NORMS:
        crc = commit.checksums.get(f"{name}.{view.layer}")
        if crc is not None and _range_sum(store.paths, {}, (view.teacher, name), lead, 0, record.width) not in (
            None,
            crc,
        ):
            yield Damage(name, f"{view.address} {name}", NORMS_AGAIN)


def check_sound(store: Store) -> None:
    """Raise StoreError, naming what is damaged, before what is small is copied and summed again."""
    arrays: Arrays = {}
    damage = [table_damage(store)]
    for name in store.plan.teachers:
        damage.append(token_damage(store, name))
        damage += [item_damage(store, item, arrays) for item in store.plan.work_items(name)]
    damage += [norm_damage(store, view) for view in store.views]
    for d in chain.from_iterable(damage):
        remedy = "stillhouse inspect verify STORE --repair"
        raise StoreError(f"stored bytes differ from their checksum: {d.where}", where=store.address, remedy=remedy)


def unchecked(store: Store) -> list[str]:
    """Return what was written before it had checksums."""
    plan, names = store.plan, []
    if not has_checksum(store.paths.files.read_json(store.paths.store_json), "store.json"):
        names.append("records")
    tables = read_sums(store.paths, plan.generations[-1].number)
    if not _from_the_first(tables, "utterances/id_bytes"):
        names.append("utterances")
    for name in plan.teachers:
        if not _from_the_first(read_sums(store.paths, plan.latest(name).number), f"{name}/length"):
            names.append(f"{name}: tokens")
        for context in plan.views(name):
            counted = store.commits(name, context).of
            if any(shard != "norms" and "input_hash" not in c.checksums for (shard, _), c in counted.items()):
                names.append(f"{name}/{context}: input_hash, context_left, context_right")
            if any(shard == "norms" and f"norm_std.{k}" not in c.checksums for (shard, k), c in counted.items()):
                names.append(f"{name}/{context}: norms")
    return names


def _from_the_first(sums: Sums, name: str) -> bool:
    return name in sums and sums[name][0].first == 0

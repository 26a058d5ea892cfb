"""Verifying what is small: JSON records by their seals, arrays by the checksums of plans and commits.

Invariant: read only; what is found says where it lies, and which bit it is where it is one bit alone. What was written
before there were such checksums is told by `unchecked` and otherwise left alone. Run: `pytest
tests/extract/store/test_damage.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ....data.errors import StillhouseError, StoreError, first_few
from ..disk.checksums import checksum_error, flipped_bit, has_checksum
from ..disk.durable import read_json
from ..disk.layout import Paths, crc32c
from ..format.arrays import RawArray
from ..format.block_sums import Sums, read_sums
from ..format.plan import Shard, WorkItem
from ..reader import Store
from ..remote.paths import local
from ..views import View

FED = ("input_hash", "context_left", "context_right")
TABLES = ("id_offset", "id_bytes", "id_hash", "id_row", "text_hash", "session")
NORMS = ("norm_mean", "norm_std")
_COMMIT = re.compile(r"(norms|\d+)\.\d+\.json")


@dataclass(frozen=True)
class Damage:
    """Rows [first, last) of an array behind the leading indices `lead`, which are not what was written; `bit`: (byte
    from the first row's on, bit) that alone is wrong, None where that is not all. `where`, for people.
    """

    array: Path
    lead: tuple[int, ...]
    first: int
    last: int
    bit: tuple[int, int] | None
    where: str

    @property
    def remedy(self) -> str:
        right = "stillhouse inspect verify STORE --repair puts the one bit right that is wrong"
        return right if self.bit is not None else "extract into a new store"


def record_files(paths: Paths) -> list[Path]:
    """Every JSON file of a store that is there."""
    groups = ("zarr.json", "*/zarr.json", "*/*/zarr.json", "utterances/editions/*/zarr.json")
    found = sorted([*paths.root.glob("store.json"), *paths.root.glob("plan/*/*.json")])
    found += [p for p in sorted((paths.root / "commits").glob("*/*/*.json")) if _COMMIT.fullmatch(p.name)]
    for pattern in (*groups, "utterances/editions/*/*/zarr.json"):
        found += sorted(paths.data.glob(pattern))
    return found


def record_damage(paths: Paths) -> Iterator[tuple[str, Path]]:
    """(what, file) of JSON files that cannot be read or whose seal is broken, and of sums that have gone."""
    for path in record_files(paths):
        try:
            value = read_json(path)
            damage = checksum_error(value, path.name)
            beside = path.with_name("sums.json")
            if path.name == "plan.json" and has_checksum(value, path.name) and not local(beside).exists():
                yield "is missing", beside
        except (StillhouseError, OSError, ValueError) as e:
            damage = str(e) if not isinstance(e, StillhouseError) else e.what
        if damage is not None:
            yield damage, path


def table_damage(store: Store) -> Iterator[Damage]:
    """Of the tables of utterances."""
    newest = store.plan.generations[-1]
    editions = {store.plan.edition(name) for name in store.plan.teachers}
    base = {f"utterances/{name}" for name in TABLES}
    yield from _planned(store, newest.number, base.__contains__)
    for edition in sorted(editions - {0}):
        number = max(g.number for g in store.plan.generations if g.edition == edition)
        yield from _planned(store, number, partial(_within, f"utterances/editions/{edition}/"))


def token_damage(store: Store, teacher: str) -> Iterator[Damage]:
    """Of a teacher's tokens and vocabulary."""
    number = store.plan.latest(teacher).number
    yield from _planned(store, number, partial(_within, f"{teacher}/"))


def _within(folder: str, name: str) -> bool:
    return name.startswith(folder)


def _planned(store: Store, number: int, chosen: Callable[[str], bool]) -> Iterator[Damage]:
    for name, parts in read_sums(store.paths, number).items():
        if not chosen(name):
            continue
        path = store.paths.data / name
        try:
            array = RawArray(path)
            values = array.read()
        except (StillhouseError, OSError, ValueError):
            continue  # which is told where the files themselves are looked at
        whole = np.ascontiguousarray(values)
        rows = array.chunks[0] or 1
        by_chunk = array.plain and path.name in ("token_id", "span")  # whose chunks may have gone, with their shards
        trailing = (0,) * (len(array.shape) - 1)
        there = {n for n in range(-(-len(whole) // rows)) if not by_chunk or array.file(n, *trailing).is_file()}
        for part in parts:
            for first, last, crc in part.blocks():
                if first // rows in there and crc32c(whole[first:last]) != crc:
                    data = whole[first:last].tobytes()
                    bit = flipped_bit(data, crc) if last <= len(whole) else None
                    yield Damage(path, (), first, last, bit, _row_place(store, name, first, last, bit, len(data)))


def _row_place(store: Store, name: str, first: int, last: int, bit: tuple[int, int] | None, size: int) -> str:
    """Whose rows of a planned array these are."""
    group, _, array = name.partition("/")
    if bit is not None and size:
        first += bit[0] // (size // (last - first))
        last = first + 1
    try:
        if array in ("token_id", "span"):
            start, length = (np.asarray(RawArray(store.paths.data / group / a).read()) for a in ("start", "length"))
            rows = np.flatnonzero((start < last) & (start + length > first)).tolist()
        elif array in ("start", "length", "text_hash", "session"):
            rows = list(range(first, last))
        else:
            return f"{name} row {first}"
        index = store.index if group == "utterances" else store.index_of(group)
        return f"{name} utterance {first_few([index.id(r) for r in rows])}" if rows else f"{name} row {first}"
    except (StillhouseError, OSError, ValueError, IndexError):
        return f"{name} row {first}"


Arrays = dict[tuple[Path, tuple[int, ...]], np.ndarray]  # that were read: an object store is asked for each anew


def item_damage(store: Store, item: WorkItem, arrays: Arrays) -> Iterator[Damage]:
    """Of what a committed unit of work says of its passes, and of the checksums of its utterances."""
    commits, shard = store.commits(item.teacher, item.context), item.shard
    record, group = store.plan.teachers[item.teacher], store.paths.data / item.teacher
    c = record.contexts.index(item.context)
    seen: set[tuple[str, int]] = set()
    # Layers share what was fed, and whoever came later left out what was dead by then: any of them may have been last
    counted = [commit for (number, _), commit in commits.of.items() if number == shard.number]
    told = [c.checksums for c in sorted(counted, key=lambda c: -c.generation)]
    for layer in item.layers:
        commit = commits.of.get((shard.number, layer))
        if commit is None or commit.generation < item.generation.number:
            continue
        lead = (c, record.layers.index(layer))
        view = f"{item.teacher}/{item.context}"
        parts: list[tuple[str, tuple[int, ...], str, str]] = [(name, (c,), name, view) for name in FED]
        for name, axes, key, whose in [*parts, ("crc32c", lead, str(layer), f"{view}/{layer}")]:
            crc = told[0].get(key) if name in FED else commit.checksums.get(key)
            if crc is None or (key, crc) in seen:
                continue
            seen.add((key, crc))
            if name in FED and _is_one_of(arrays, group / name, axes, shard, {t.get(key) for t in told}):
                continue
            rot = _range(group / name, axes, shard.first, shard.last, crc, f"{whose} shard {shard.number}", arrays)
            if rot is not None:
                yield replace(rot, where=f"{rot.where}{_utterance(store, item.teacher, rot)} {name}")


def _bytes(arrays: Arrays, path: Path, lead: tuple[int, ...], first: int, last: int) -> bytes:
    """Rows [first, last) behind `lead`, of an array that is read once."""
    if (path, lead) not in arrays:
        arrays[path, lead] = RawArray(path).read(*lead)
    return np.ascontiguousarray(arrays[path, lead][first:last]).tobytes()


def _is_one_of(arrays: Arrays, path: Path, lead: tuple[int, ...], shard: Shard, sums: set[int | None]) -> bool:
    """Whether a shard's rows of an array have one of these checksums."""
    try:
        return crc32c(_bytes(arrays, path, lead, shard.first, shard.last)) in sums
    except (StillhouseError, OSError, ValueError):
        return True  # which is told where the files themselves are looked at


def _utterance(store: Store, teacher: str, rot: Damage) -> str:
    """Whose row it is that a single bit is wrong in."""
    if rot.bit is None:
        return ""
    try:
        size = RawArray(rot.array).dtype.itemsize
        return f" utterance {store.index_of(teacher).id(rot.first + rot.bit[0] // size)}"
    except (StillhouseError, OSError, ValueError, IndexError):
        return ""


def _range(
    path: Path, lead: tuple[int, ...], first: int, last: int, crc: int, where: str, arrays: Arrays
) -> Damage | None:
    try:
        data = _bytes(arrays, path, lead, first, last)
    except (StillhouseError, OSError, ValueError):
        return None  # which is told where the files themselves are looked at
    return None if crc32c(data) == crc else Damage(path, lead, first, last, flipped_bit(data, crc), where)


def norm_damage(store: Store, view: View) -> Iterator[Damage]:
    """Of a complete view's norms."""
    commit = store.commits(view.teacher, view.context).of["norms", view.layer]
    record = store.plan.teachers[view.teacher]
    lead = record.contexts.index(view.context), record.layers.index(view.layer)
    for name in NORMS:
        key, path = f"{name}.{view.layer}", store.paths.data / view.teacher / name
        if key in commit.checksums:
            rot = _range(path, lead, 0, record.width, commit.checksums[key], f"{view.address} {name}", {})
            if rot is not None:
                yield rot


def all_damage(store: Store) -> list[Damage]:
    """Of everything that is small; states are not read."""
    found = list(table_damage(store))
    arrays: Arrays = {}
    for name in store.plan.teachers:
        found += token_damage(store, name)
        for item in store.plan.work_items(name):
            found += item_damage(store, item, arrays)
    for view in store.views:
        found += norm_damage(store, view)
    return found


def check_sound(store: Store) -> None:
    """Before any of it is copied, and summed anew. Errors: StoreError naming what is damaged."""
    for rot in all_damage(store):
        remedy = "stillhouse inspect verify STORE --repair"
        raise StoreError(f"stored bytes differ from their checksum: {rot.where}", where=store.address, remedy=remedy)


def unchecked(store: Store) -> list[str]:
    """What was written before it had checksums."""
    plan, found = store.plan, []
    if not has_checksum(read_json(store.paths.store_json), "store.json"):
        found.append("records")
    tables = read_sums(store.paths, plan.generations[-1].number)
    if not _from_the_first(tables, "utterances/id_bytes"):
        found.append("utterances")
    for name in plan.teachers:
        if not _from_the_first(read_sums(store.paths, plan.latest(name).number), f"{name}/length"):
            found.append(f"{name}: tokens")
        for context in plan.views(name):
            counted = store.commits(name, context).of
            if any(shard != "norms" and "input_hash" not in c.checksums for (shard, _), c in counted.items()):
                found.append(f"{name}/{context}: input_hash, context_left, context_right")
            if any(shard == "norms" and f"norm_std.{k}" not in c.checksums for (shard, k), c in counted.items()):
                found.append(f"{name}/{context}: norms")
    return found


def _from_the_first(sums: Sums, name: str) -> bool:
    return name in sums and sums[name][0].first == 0

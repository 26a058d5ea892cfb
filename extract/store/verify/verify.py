"""Verifying a store: does it hold what its commits say, bit for bit?

Invariant: read only; every finding names a place (view, shard, utterance) and what mends it. An intact store, also
one whose extraction is not finished, has no findings. Run: `stillhouse inspect verify STORE`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....data.errors import StillhouseError, StoreError
from ..disk.durable import Lock
from ..disk.layout import INNER_ROWS, Paths, crc32c, dtype_of, footer_bytes, identity_rows
from ..format.arrays import RawArray
from ..format.commits import Commit
from ..format.int8 import SCALE_BYTES
from ..format.plan import Unit
from ..reader import Store
from ..remote.block_cache import descriptor
from ..remote.paths import mirror_of
from ..views import View
from .arrays import array_damage, table_damage
from .sums import Arrays, Rot, norm_rot, record_rot, table_rot, token_rot, unit_rot


@dataclass(frozen=True)
class Finding:
    """Something wrong: what, where ("VIEW shard S utterance U" or a path), and what to do about it."""

    what: str
    where: str
    remedy: str


_REPAIR = "stillhouse inspect verify STORE --data --repair extracts just this again"
_RECORD = "stillhouse inspect verify STORE --repair, which can put one wrong bit right; else a backup's file"
_PLACES = ("start", "length", "token_id", "span")  # while these are damaged nobody knows which bytes are whose


def _rotten(rot: Rot, remedy: str | None = None) -> Finding:
    return Finding("stored bytes differ from their checksum", rot.where, remedy or rot.remedy)


def verify(store: Store, data: float = True) -> list[Finding]:
    """All findings. With `data`, every stored byte is read and compared with its checksum; without, all but the
    states; with a share, as 0.05, that share of each shard's utterances, the same at every call.
    """
    return list(findings(store, data))


def findings(store: Store, data: float = True, report: Callable[[Unit], None] | None = None) -> Iterator[Finding]:
    """The same as they are found. `report` is called with each unit before it is looked at."""
    arrays: Arrays = {}
    yield from damaged_records(store.paths)
    rotten = [_rotten(r) for r in table_rot(store)]
    yield from rotten or _check_index(store)
    for name in store.plan.teachers:
        rot = list(token_rot(store, name))
        yield from (_rotten(r) for r in rot)
        damage = [_rotten(r) for r in rot if r.array.name in _PLACES]
        if not damage:
            yield from (damage := list(_check_tokens(store, name)))
        yield from _check_arrays(store, name)
        if not damage:  # else nobody knows which bytes are whose
            yield from _check_units(store, name, data, report, arrays)
    yield from _check_litter(store)


def damaged_records(paths: Paths) -> list[Finding]:
    """JSON files that are not what was written; the store need not open."""
    return [Finding(what, str(path), _RECORD) for what, path in record_rot(paths)]


def damaged_units(store: Store, data: float = True) -> list[tuple[Unit, list[Finding]]]:
    """Committed units with something wrong in their files: what a repair makes anew."""
    out: list[tuple[Unit, list[Finding]]] = []
    arrays: Arrays = {}
    for name in store.plan.teachers:
        for unit in store.plan.units(name):
            found = list(_check_unit(store, unit, data, arrays))
            if found:
                out.append((unit, found))
    return out


def _check_index(store: Store) -> Iterator[Finding]:
    where = str(store.paths.data / "utterances")
    for teacher in store.plan.teachers:
        try:
            index = store.index_of(teacher)
            rows = index.rows(index.ids())
        except (StillhouseError, OSError, ValueError, IndexError) as e:
            yield Finding(f"the index of utterances cannot be read: {e}", where, "extract into a new store")
            return
        if not np.array_equal(rows, index.order[index.live[index.order]]):
            yield Finding("ids do not lead to their own rows", where, "extract into a new store")
            return
    editions = {store.plan.edition(teacher) for teacher in store.plan.teachers}
    try:
        for what, file in table_damage(store.paths.data / "utterances", editions, len(store.index)):
            yield Finding(what, str(file), "extract into a new store")
    except (StillhouseError, OSError, ValueError, IndexError) as e:
        yield Finding(f"the index of utterances cannot be read: {e}", where, "extract into a new store")


def _check_tokens(store: Store, name: str) -> Iterator[Finding]:
    group = store.paths.data / name
    try:
        length, start = RawArray(group / "length").read(), RawArray(group / "start").read()
        token_id, latest = RawArray(group / "token_id").read(), store.plan.latest(name)
        live = np.flatnonzero(store.lengths(name) > 0)
    except (StillhouseError, OSError, ValueError) as e:
        yield Finding(f"the tokens cannot be read: {e}", str(group), "extract into a new store")
        return
    for shard in store.plan.shards(name):
        rows = length[shard.first : shard.last].astype(np.int64)
        begins = shard.number * latest.shard_rows + np.cumsum(rows) - rows
        if int(rows.sum()) != shard.rows or not np.array_equal(start[shard.first : shard.last], begins):
            yield Finding("start and length contradict the plan", f"{name} shard {shard.number}", "a new store")
    for first, n in zip(start[live].tolist(), length[live].tolist()):
        if (token_id[first : first + n] < 0).any():
            yield Finding("an utterance has rows without token ids", f"{name} row {first}", "a new store")
            return


def _check_arrays(store: Store, name: str) -> Iterator[Finding]:
    group = store.paths.data / name
    if mirror_of(group) is not None:
        return  # object stores give a file whole or not at all
    whole = {v.context for v in store.views if v.teacher == name}
    try:
        contexts = {store.plan.teachers[name].contexts.index(c) for c in whole}
        rows, shards = np.asarray(store.index_of(name).row), {s.number for s in store.plan.shards(name)}
        for what, where in array_damage(group, contexts, rows, shards):
            yield Finding(what, str(where), "extract into a new store")
    except StoreError:
        return  # its index of utterances cannot be read, which has been said
    except OSError as e:
        yield Finding(f"cannot be read: {e.strerror}", str(group), "extract into a new store")


def _check_units(
    store: Store, name: str, data: float, report: Callable[[Unit], None] | None, arrays: Arrays
) -> Iterator[Finding]:
    for unit in store.plan.units(name):
        if report is not None:
            report(unit)
        yield from _check_unit(store, unit, data, arrays)
    for view in store.views:
        if view.teacher == name:
            mean, std = store.norm(view)
            if not (np.isfinite(mean).all() and (std > 0).all()):
                yield Finding("norm_mean or norm_std is not finite", view.address, "extract into a new store")
            yield from (_rotten(r) for r in norm_rot(store, view))


def _check_unit(store: Store, unit: Unit, data: float, arrays: Arrays) -> Iterator[Finding]:
    commits = store.commits(unit.teacher, unit.context)
    yield from (_rotten(r, _REPAIR) for r in unit_rot(store, unit, arrays))
    for layer in unit.layers:
        commit = commits.of.get((unit.shard.number, layer))
        if commit is None or commit.generation < unit.generation.number:
            continue  # not extracted yet: no finding
        view = View(unit.teacher, unit.context, layer)
        place = f"{view.address} shard {unit.shard.number}"
        c, axis = store._axes(view)
        path = store.paths.hidden(unit.teacher, c, axis, unit.shard.number)
        try:
            fd = descriptor(path, whole=bool(data))
        except OSError as e:
            yield Finding(f"its file cannot be opened: {e.strerror}", f"{place}: {path}", _REPAIR)
            continue
        try:
            yield from _check_file(store, unit, view, commit, fd, place, data)
        except OSError as e:
            yield Finding(f"its file cannot be read: {e.strerror}", f"{place}: {path}", _REPAIR)
        finally:
            os.close(fd)


def _check_file(
    store: Store, unit: Unit, view: View, commit: Commit, fd: int, place: str, data: float
) -> Iterator[Finding]:
    record, shard = store.teacher(view.teacher).settings, unit.shard
    dtype = dtype_of(record.dtype)
    row_bytes, rows = record.width * dtype.bytes, unit.generation.shard_rows
    size, tail = os.fstat(fd).st_size, footer_bytes(rows)
    try:
        held = identity_rows(os.pread(fd, tail, max(0, size - tail)), rows, row_bytes)
    except (StillhouseError, ValueError):
        yield Finding("the index at the end of its file is damaged", place, _REPAIR)
        return
    if held is None:
        return  # a copy in another layout: zarr reads it, and its own checksums, if any, are zarr's business
    if size != commit.files[str(view.layer)]:
        yield Finding(f"its file has {size:,} bytes, committed {commit.files[str(view.layer)]:,}", place, _REPAIR)
        return
    c, axis = store._axes(view)
    stored = np.asarray(RawArray(store.paths.data / view.teacher / "crc32c").read(c, axis))[shard.first : shard.last]
    if crc32c(stored.astype("<u4").tobytes()) != commit.checksums[str(view.layer)]:
        return  # the checksums of its utterances are damaged themselves, which has been said
    scale = None
    if dtype.scaled:
        try:
            scale = _scales(store, view, unit, bool(data))
        except (StillhouseError, OSError, ValueError) as e:
            yield Finding(f"its scales cannot be read: {e}", place, _REPAIR)
            return
    if not data:
        return
    group = store.paths.data / view.teacher
    start = np.asarray(RawArray(group / "start").read())[shard.first : shard.last] - shard.number * rows
    length = np.asarray(RawArray(group / "length").read())[shard.first : shard.last]
    drawn = np.random.default_rng([shard.number, c, axis]).random(len(start)) < data
    for u, (at, n, want, read) in enumerate(zip(start.tolist(), length.tolist(), stored.tolist(), drawn.tolist())):
        if not (n and read):
            continue
        got = crc32c(os.pread(fd, n * row_bytes, at * row_bytes))
        if scale is not None:
            got = crc32c(scale[at : at + n], got)
        if got != want:
            name = store.index.id(shard.first + u)
            yield Finding("stored bytes differ from their checksum", f"{place} utterance {name}", _REPAIR)
    padding = np.frombuffer(os.pread(fd, (held - shard.rows) * row_bytes, shard.rows * row_bytes), dtype=dtype.stored)
    if held - shard.rows >= INNER_ROWS or padding.tobytes() != dtype.fill_rows(len(padding), 1).tobytes():
        yield Finding("rows behind its last utterance are not the fill value", place, _REPAIR)


def _scales(store: Store, view: View, unit: Unit, data: bool) -> np.ndarray | None:
    """float16 of every row that a shard file of `scale` holds; without `data` only its size and index are looked at.

    Errors: StoreError, OSError, ValueError for damage.
    """
    path, rows = store.paths.scale(view.teacher, *store._axes(view), unit.shard.number), unit.generation.shard_rows
    tail = footer_bytes(rows)
    with open(descriptor(path, whole=data), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        held = identity_rows(os.pread(f.fileno(), tail, max(0, size - tail)), rows, SCALE_BYTES)
        used = unit.shard.rows + -unit.shard.rows % INNER_ROWS
        if held != used or size != held * SCALE_BYTES + tail:
            raise StoreError("its file has the wrong size", where=path)
        if not data:
            return None
        f.seek(0)
        found = np.frombuffer(f.read(held * SCALE_BYTES), np.float16)
    behind = found[unit.shard.rows :]
    if behind.tobytes() != np.full(len(behind), np.nan, np.float16).tobytes():
        raise StoreError("rows behind its last utterance are not the fill value", where=path)
    return found


def _check_litter(store: Store) -> Iterator[Finding]:
    tmp = store.paths.tmp
    for folder in sorted(tmp.iterdir()) if tmp.is_dir() else []:
        if _is_dead(folder):
            yield Finding("left by a writer that died", str(folder), "the next `stillhouse extract` removes it")


def _is_dead(folder: Path) -> bool:
    if not (folder / "lock").exists():
        return True
    lock = Lock(folder / "lock")
    free = lock.acquire()
    lock.release()
    return free

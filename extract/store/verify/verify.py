"""Verify a store: does it hold what its commits say, bit for bit?

Guarantees: nothing is written. Every finding names a place (view, shard, utterance) and what to do about it. An intact
store has no findings, also while its extraction is not finished.
Try: `stillhouse inspect verify STORE`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from ....data.errors import StillhouseError, StoreError
from ....data.files.lock import FileLock
from ..disk.layout import INNER_ROWS, crc32c, dtype_of, footer_bytes, identity_rows, shard_bytes
from ..disk.paths import Paths
from ..format.arrays import RawArray
from ..format.commits import Commit
from ..format.int8 import SCALE_BYTES
from ..format.plan import WorkItem
from ..read.handles import RENEWALS
from ..reader import Store
from ..views import View
from .arrays import array_damage, table_chunk_damage
from .numbers import corpus_numbers, teacher_numbers
from .sums import (
    NORMS_AGAIN,
    Arrays,
    Damage,
    committed_layers,
    item_damage,
    norm_damage,
    record_damage,
    table_damage,
    token_damage,
)


@dataclass(frozen=True)
class StoreFinding:
    """Something that is wrong: what, where ("VIEW shard S utterance U" or a path), and what to do about it."""

    what: str
    where: str
    remedy: str


_ANEW = "extract into a new store"
_REPAIR = "stillhouse inspect verify STORE --data --repair extracts just this again"
_RECORD = "restore this file from a backup, or extract into a new store"
_UNREADABLE = (StillhouseError, OSError, ValueError)
_ROW_ARRAYS = (
    "start",
    "length",
    "audio_source",
    "token_id",
    "span",
)  # While these are damaged, rows lead to no utterance.


def _said(error: Exception) -> str:
    """Return what an error says, without its remedy: that would be this check."""
    return error.what if isinstance(error, StillhouseError) else str(error)


def _finding(damage: Damage, remedy: str | None = None) -> StoreFinding:
    return StoreFinding("stored bytes differ from their checksum", damage.where, remedy or damage.remedy)


def verify(store: Store, data: float = True) -> list[StoreFinding]:
    """Return all findings.

    `data` is the share of each shard's utterances whose states are compared with their checksums, the same at every
    call. Everything else is always compared.
    """
    return list(findings(store, data))


def findings(
    store: Store, data: float = True, on_progress: Callable[[WorkItem], None] | None = None
) -> Iterator[StoreFinding]:
    """Yield findings as `verify` returns them; `on_progress` is called with each work item before it is checked."""
    arrays: Arrays = {}
    store.paths.files.revalidate()
    yield from damaged_records(store.paths)
    tables = [_finding(d) for d in _rechecked(store, "utterances", lambda: table_damage(store))]
    yield from tables or _check_index(store)
    wrong = plan_findings(store)
    yield from chain(*wrong.values())
    for name in store.plan.teachers:
        if wrong[name]:
            continue  # Rows and states would be looked for in wrong places.
        damage = _rechecked(store, name, lambda name=name: token_damage(store, name))  # type: ignore[misc]
        yield from (_finding(d) for d in damage)
        unusable: list[StoreFinding] = [_finding(d) for d in damage if d.array in _ROW_ARRAYS]
        if not unusable:
            unusable = list(_check_tokens(store, name))
            yield from unusable
        yield from _check_arrays(store, name)
        if not unusable:
            yield from _check_items(store, name, data, on_progress, arrays)
    yield from _check_leftovers(store)


def _rechecked(store: Store, group: str, check: Callable[[], Iterable[Damage]]) -> list[Damage]:
    """Return the damage of a group's arrays that is still there where their copies on this disk are fetched again."""
    found, files, folder = list(check()), store.paths.files, store.paths.data / group
    if found and files.forget(folder):
        again = list(check())
        if len(again) < len(found):
            files.note_renewed(folder)
        return again
    return found


def damaged_records(paths: Paths) -> list[StoreFinding]:
    """Return findings for JSON files that are not what was written. The store need not open."""
    return [StoreFinding(what, paths.files.place(path), _RECORD) for what, path in record_damage(paths)]


def plan_findings(store: Store) -> dict[str, list[StoreFinding]]:
    """Return findings for numbers of store.json that do not fit the arrays, by teacher, and of the corpus by "".

    Arrays whose metadata is damaged are other findings.
    """
    found: dict[str, list[StoreFinding]] = {}
    for name in ("", *store.plan.teachers):
        found[name] = []
        with suppress(*_UNREADABLE, LookupError):
            for what in teacher_numbers(store, name) if name else corpus_numbers(store):
                found[name].append(StoreFinding(what, store.paths.files.place(store.paths.store_json), _RECORD))
    return found


def damaged_items(
    store: Store, data: float = True, teachers: Sequence[str] | None = None
) -> list[tuple[WorkItem, list[StoreFinding]]]:
    """Return committed work items with damaged files, which a repair extracts again, and their findings.

    With `data`, `teachers` must be those whose tokens are intact, or rows lead to no utterance. None: all.
    """
    arrays: Arrays = {}
    items = [
        item for name in (store.plan.teachers if teachers is None else teachers) for item in store.plan.work_items(name)
    ]
    checked = ((item, list(_check_item(store, item, data, arrays))) for item in items)
    return [(item, damage) for item, damage in checked if damage]


def _check_index(store: Store) -> Iterator[StoreFinding]:
    where = store.paths.files.place(store.paths.data / "utterances")
    try:
        for teacher in store.plan.teachers:
            index = store.index_of(teacher)
            if not np.array_equal(index.rows(index.ids()), index.order[index.live[index.order]]):
                yield StoreFinding("ids do not lead to their own rows", where, _ANEW)
                return
        editions = {store.plan.edition(teacher) for teacher in store.plan.teachers}
        for what, file in table_chunk_damage(store.paths, editions, len(store.index)):
            yield StoreFinding(what, store.paths.files.place(file), _ANEW)
    except (*_UNREADABLE, IndexError) as e:
        yield StoreFinding(f"the index of utterances cannot be read: {_said(e)}", where, _ANEW)


def _check_tokens(store: Store, name: str) -> Iterator[StoreFinding]:
    latest, has_tokens = store.plan.latest(name), not store.plan.teachers[name].is_speech
    arrays = ("length", "start", *(["token_id"] if has_tokens else []))
    try:
        length, start, *token_ids = (RawArray(store.paths, name, a).read() for a in arrays)
        live = np.flatnonzero(store.lengths(name) > 0)
    except _UNREADABLE as e:
        where = store.paths.files.place(store.paths.data / name)
        yield StoreFinding(f"the {'tokens' if has_tokens else 'frames'} cannot be read: {_said(e)}", where, _ANEW)
        return
    for shard in store.plan.shards(name):
        rows = length[shard.first : shard.last].astype(np.int64)
        begins = shard.number * latest.shard_rows + np.cumsum(rows) - rows
        if int(rows.sum()) != shard.rows or not np.array_equal(start[shard.first : shard.last], begins):
            yield StoreFinding("start and length contradict the plan", f"{name} shard {shard.number}", "a new store")
    for first, n in zip(start[live].tolist(), length[live].tolist()):
        if has_tokens and (token_ids[0][first : first + n] < 0).any():
            yield StoreFinding("an utterance has rows without token ids", f"{name} row {first}", "a new store")
            return


def _check_arrays(store: Store, name: str) -> Iterator[StoreFinding]:
    if not store.paths.files.can_be_torn:
        return
    whole = {v.context for v in store.views if v.teacher == name}
    try:
        contexts = {store.plan.teachers[name].contexts.index(c) for c in whole}
        rows, shards = np.asarray(store.index_of(name).row), {s.number for s in store.plan.shards(name)}
        for what, where in array_damage(store.paths, store.plan.teachers[name], contexts, rows, shards):
            yield StoreFinding(what, store.paths.files.place(where), _ANEW)
    except StoreError:
        return  # The index of utterances cannot be read, which is a finding already.
    except OSError as e:
        yield StoreFinding(f"cannot be read: {e.strerror}", store.paths.files.place(store.paths.data / name), _ANEW)


def _check_items(
    store: Store, name: str, data: float, on_progress: Callable[[WorkItem], None] | None, arrays: Arrays
) -> Iterator[StoreFinding]:
    for item in store.plan.work_items(name):
        if on_progress is not None:
            on_progress(item)
        yield from _check_item(store, item, data, arrays)
    for view in store.views:
        if view.teacher != name:
            continue
        try:
            mean, std = store.norm(view)
        except StoreError as e:
            yield StoreFinding(e.what, str(e.where), NORMS_AGAIN)
            continue
        if not (np.isfinite(mean).all() and (std > 0).all()):
            yield StoreFinding("norm_mean or norm_std is not finite", view.address, _ANEW)
        yield from (_finding(d) for d in norm_damage(store, view))


def _check_item(store: Store, item: WorkItem, data: float, arrays: Arrays) -> Iterator[StoreFinding]:
    def damage() -> Iterator[Damage]:
        arrays.clear()
        return item_damage(store, item, arrays)

    first = list(item_damage(store, item, arrays))
    yield from (_finding(d, _REPAIR) for d in (_rechecked(store, item.teacher, damage) if first else []))
    for layer, commit in committed_layers(store, item):
        view = View(item.teacher, item.context, layer)
        yield from _states_damage(store, item, view, commit, data)


def _states_damage(store: Store, item: WorkItem, view: View, commit: Commit, data: float) -> list[StoreFinding]:
    """Return findings of one layer of a work item, of an object store those that are still there when it is read again.

    Its files are fetched again as long as other bytes come than the cache had.
    """
    files, axes = store.paths.files, (item.teacher, *store.axes(view), item.shard.number)
    dtype = dtype_of(store.plan.teachers[item.teacher].dtype)
    paths = [store.paths.shard_file(dtype.array, *axes)]
    paths += [store.paths.scale(*axes)] if dtype.scaled else []
    place = f"{view.address} shard {item.shard.number}"
    found = first = _check_states(store, item, view, commit, place, data)
    for _ in range(RENEWALS if files.is_copied else 0):
        if not found or not any([files.renew(path, whole=bool(data)) for path in paths]):
            break
        found = _check_states(store, item, view, commit, place, data)
    if len(found) < len(first):
        files.note_renewed(paths[0])
    if files.is_copied:
        found = [replace(f, what=f"{f.what}, in the object store itself: {files.place(paths[0])}") for f in found]
    return found


def _check_states(
    store: Store, item: WorkItem, view: View, commit: Commit, place: str, data: float
) -> list[StoreFinding]:
    array = dtype_of(store.plan.teachers[item.teacher].dtype).array
    path = store.paths.shard_file(array, item.teacher, *store.axes(view), item.shard.number)
    where = f"{place}: {store.paths.files.place(path)}"
    try:
        fd = store.paths.files.descriptor(path, whole=bool(data))
    except OSError as e:
        return [StoreFinding(f"its file cannot be opened: {e.strerror}", where, _REPAIR)]
    try:
        return list(_check_file(store, item, view, commit, fd, place, data))
    except OSError as e:
        return [StoreFinding(f"its file cannot be read: {e.strerror}", where, _REPAIR)]
    finally:
        os.close(fd)


def _check_file(
    store: Store, item: WorkItem, view: View, commit: Commit, fd: int, place: str, data: float
) -> Iterator[StoreFinding]:
    record, shard = store.teacher(view.teacher).settings, item.shard
    dtype = dtype_of(record.dtype)
    row_bytes, rows = dtype.row_bytes(record.width), item.generation.shard_rows
    try:
        size, held = _size_and_rows(fd, rows, row_bytes)
    except (StillhouseError, ValueError):
        yield StoreFinding("the index at the end of its file is damaged", place, _REPAIR)
        return
    if held is None:
        return  # A copy in another layout, whose own checksums zarr checks.
    if size != commit.files[str(view.layer)]:
        yield StoreFinding(f"its file has {size:,} bytes, committed {commit.files[str(view.layer)]:,}", place, _REPAIR)
        return
    axes = store.axes(view)

    def rows_of(name: str, *lead: int) -> np.ndarray:
        return np.asarray(RawArray(store.paths, view.teacher, name).read(*lead))[shard.first : shard.last]

    stored = rows_of("crc32c", *axes)
    if crc32c(stored.astype("<u4").tobytes()) != commit.checksums[str(view.layer)]:
        return  # The checksums of its utterances are damaged, which is a finding already.
    scale = None
    if dtype.scaled:
        try:
            scale = _scales(store, view, item, bool(data))
        except _UNREADABLE as e:
            yield StoreFinding(f"its scales cannot be read: {_said(e)}", place, _REPAIR)
            return
    if not data:
        return
    start, length = rows_of("start") - shard.number * rows, rows_of("length")
    drawn = np.random.default_rng([shard.number, *axes]).random(len(start)) < data
    for u, (at, n, expected, read) in enumerate(zip(start.tolist(), length.tolist(), stored.tolist(), drawn.tolist())):
        if not (n and read):
            continue
        actual = crc32c(os.pread(fd, n * row_bytes, at * row_bytes))
        if scale is not None:
            actual = crc32c(scale[at : at + n], actual)
        if actual != expected:
            name = store.index.id(shard.first + u)
            yield StoreFinding("stored bytes differ from their checksum", f"{place} utterance {name}", _REPAIR)
    padding = np.frombuffer(os.pread(fd, (held - shard.rows) * row_bytes, shard.rows * row_bytes), dtype=dtype.stored)
    columns = dtype.columns(record.width)
    fill = dtype.fill_rows(len(padding) // columns, record.width)
    if held - shard.rows >= INNER_ROWS or padding.tobytes() != fill.tobytes():
        yield StoreFinding("rows behind its last utterance are not the fill value", place, _REPAIR)


def _size_and_rows(fd: int, rows: int, row_bytes: int) -> tuple[int, int | None]:
    """Return the size of a shard file, and its rows as `identity_rows` does."""
    size, tail = os.fstat(fd).st_size, footer_bytes(rows)
    return size, identity_rows(os.pread(fd, tail, max(0, size - tail)), rows, row_bytes)


def _scales(store: Store, view: View, item: WorkItem, data: bool) -> np.ndarray | None:
    """Return the float16 scales of a shard, or None without `data`, where only the file's size and index are checked.

    Raises StoreError, OSError or ValueError for damage.
    """
    path, rows = store.paths.scale(view.teacher, *store.axes(view), item.shard.number), item.generation.shard_rows
    with open(store.paths.files.descriptor(path, whole=data), "rb") as f:
        size, held = _size_and_rows(f.fileno(), rows, SCALE_BYTES)
        used = item.shard.rows + -item.shard.rows % INNER_ROWS
        if held != used or size != shard_bytes(item.shard.rows, rows, SCALE_BYTES):
            raise StoreError("its file has the wrong size", where=path)
        if not data:
            return None
        f.seek(0)
        found = np.frombuffer(f.read(held * SCALE_BYTES), np.float16)
    behind = found[item.shard.rows :]
    if behind.tobytes() != np.full(len(behind), np.nan, np.float16).tobytes():
        raise StoreError("rows behind its last utterance are not the fill value", where=path)
    return found


def _check_leftovers(store: Store) -> Iterator[StoreFinding]:
    tmp = store.paths.tmp
    for folder in sorted(tmp.iterdir()) if tmp.is_dir() else []:
        if _is_dead(folder):
            yield StoreFinding("left by a writer that died", str(folder), "the next `stillhouse extract` removes it")


def _is_dead(folder: Path) -> bool:
    lock = FileLock(folder / "lock")
    free = not lock.path.exists() or lock.acquire()
    lock.release()
    return free

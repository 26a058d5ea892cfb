"""List and delete files of a store that no generation asks for.

These are files of dropped shards and views, superseded commit records, old plans and drafts of killed writers.

Guarantees: a file is deleted only when the store.json on disk does not need it. A reader that opened the store before
either has the file open, or gets an error that says the store has changed.
Try: `stillhouse store gc STORE --dry-run`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ...data.files.atomic import sync
from ...data.files.lock import FileLock
from ..pipeline.progress import folder_bytes
from ..store.disk.files import StoreFiles
from ..store.format.arrays import RawArray
from ..store.format.commits import Commits
from ..store.format.index import Index
from ..store.format.plan import Plan


def unreferenced_files(plan: Plan, orders: Mapping[str, np.ndarray] | None = None) -> list[Path]:
    """Return files and folders of a store that its plan does not need.

    `orders` are rows of the corpus in its order, by teacher, for editions that are not on disk yet.
    """
    root, data, orders = plan.paths.root, plan.paths.data, orders or {}
    generations = {str(g.number) for g in plan.generations}
    editions = {str(plan.edition(name)) for name in plan.teachers} | {"zarr.json"}
    paths = [p for p in _entries(root / "plan") if p.name not in generations]
    paths += [p for p in _entries(data / "utterances" / "editions") if p.name not in editions]
    paths += [p for folder in (root / "plan", data) for p in folder.rglob(".*.tmp")]  # drafts of killed writers
    for folder in (data, root / "commits"):
        paths += [p for p in _entries(folder) if p.is_dir() and p.name not in {"utterances", *plan.teachers}]
    for name in plan.teachers:
        paths += [*_states(plan, name), *_tokens(plan, name, orders.get(name)), *_commits(plan, name)]
    return sorted(paths)


def size_of(files: StoreFiles, paths: list[Path]) -> int:
    """Return the bytes of files and folders."""
    return sum(folder_bytes(files, p) if p.is_dir() else p.stat().st_size for p in paths)


def delete_files(paths: list[Path]) -> None:
    """Delete files and folders, and sync the folders that held them."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for folder in {p.parent for p in paths}:
        if folder.is_dir():
            sync(folder)


def delete_locks(plan: Plan) -> None:
    """Delete the locks of work items. The caller has the store for itself, so a free one is nobody's."""
    for path in _entries(plan.paths.locks):
        lock = FileLock(path)
        if path.name not in (plan.paths.lock("plan").name, plan.paths.lock("tmp").name) and lock.acquire():
            path.unlink()
            lock.release()


def _entries(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _states(plan: Plan, name: str) -> Iterator[Path]:
    """Files of `hidden`, `code` and `scale` for which there is no work item, and codebooks of deleted views."""
    record = plan.teachers[name]
    needed = {
        (record.contexts.index(item.context), record.layers.index(k), item.shard.number)
        for item in plan.work_items(name)
        for k in item.layers
    }
    for array in ("hidden", "code", "scale", "codebook"):
        chunks = plan.paths.array(name, array) / "c"
        for context in _entries(chunks):
            for layer in _entries(context):
                shards = {s for c, k, s in needed if str(c) == context.name and str(k) == layer.name}
                if not shards:
                    yield layer
                    continue
                if array != "codebook":
                    yield from (p for p in _entries(layer) if p.name.isdigit() and int(p.name) not in shards)


def _tokens(plan: Plan, name: str, order: np.ndarray | None) -> Iterator[Path]:
    """Token chunks of dropped shards that hold no readable utterance and no neighbour of one."""
    if plan.teachers[name].is_speech:
        return  # Frames have none.
    start, length = (RawArray(plan.paths, name, a).read() for a in ("start", "length"))
    if order is None:
        order = Index(plan.paths, plan.edition(name)).order
    order = order[order < len(start)]  # later rows are not written yet
    used = set((start[order[length[order] > 0]] // plan.latest(name).shard_rows).tolist())
    used |= {s.number for s in plan.shards(name)}
    for array in ("token_id", "span"):
        chunks = _entries(plan.paths.array(name, array) / "c")
        yield from (p for p in chunks if p.name.isdigit() and int(p.name) not in used)


def _commits(plan: Plan, name: str) -> Iterator[Path]:
    """Commit records of which every layer is dropped or has a later record."""
    views = plan.views(name)
    asked: set[tuple[str, int | str, int]]
    asked = {(item.context, item.shard.number, k) for item in plan.work_items(name) for k in item.layers}
    asked |= {(c, "norms", k) for c, layers in views.items() for k in layers}
    kept = {plan.paths.commits(name, c): c for c in views}
    for folder in _entries(plan.paths.root / "commits" / name):
        context = kept.get(folder)
        if context is None:
            yield folder
            continue
        counts = {id(c): c for (s, k), c in Commits(plan.paths, name, context).of.items() if (context, s, k) in asked}
        names = {f"{c.shard}.{c.generation}.json" for c in counts.values()}
        yield from (p for p in _entries(folder) if p.name.endswith(".json") and p.name not in names)

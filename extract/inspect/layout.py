"""What lies where in a store's folder: `tree`.

Invariant: Zarr nodes are told by their own zarr.json, so foreign arrays show, too; files are counted, not read.
Exercised by: `stillhouse inspect tree STORE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..store import Store
from ..store.files import read_json
from .facts import files

WHAT = {
    "store.json": "teachers, settings, fingerprints, versions",
    "data.zarr": "plain Zarr v3: anything opens it",
    "plan": "tokenisation, order and shards, one folder a generation",
    "commits": "one record a unit of work: the only proof that it exists",
    "locks": "held by writers",
    "tmp": "of writers; swept by the next one",
}


@dataclass(frozen=True)
class Node:
    """A file, folder, Zarr group or array. `shape`, `dtype` and `dimensions` are an array's."""

    path: str  # relative to the store
    depth: int
    kind: str  # "file", "folder", "group" or "array"
    files: int
    bytes: int
    shape: list[int] | None = None
    dtype: str | None = None
    dimensions: list[str] | None = None
    about: str | None = None


def tree(store: Store) -> list[Node]:
    """Nodes in the order in which a tree is drawn. Errors: StoreError where a zarr.json cannot be read."""
    root = store.path
    entries = sorted(root.iterdir(), key=lambda p: (list(WHAT).index(p.name) if p.name in WHAT else 99, p.name))
    return [node for entry in entries for node in _nodes(root, entry, 0)]


def _nodes(root: Path, path: Path, depth: int) -> Iterator[Node]:
    if path.is_file():
        yield _node(root, path, depth, "file", about=WHAT.get(path.name))
        return
    meta_path = path / "zarr.json"
    if not meta_path.is_file():
        yield _node(root, path, depth, "folder", about=WHAT.get(path.name))
        return
    meta = read_json(meta_path)
    if meta["node_type"] == "array":
        dtype = meta.get("attributes", {}).get("logical_dtype", meta["data_type"])
        names = meta.get("dimension_names")
        yield _node(root, path, depth, "array", shape=meta["shape"], dtype=dtype, dimensions=names)
        return
    yield _node(root, path, depth, "group", about=WHAT.get(path.name))
    for child in sorted(p for p in path.iterdir() if p.is_dir()):
        yield from _nodes(root, child, depth + 1)


def _node(root: Path, path: Path, depth: int, kind: str, **more) -> Node:
    sizes = [path.stat().st_size] if path.is_file() else [n for _, n in files(path)]
    return Node(str(path.relative_to(root)), depth, kind, len(sizes), sum(sizes), **more)

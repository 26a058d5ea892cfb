"""The files, folders and arrays of a store: `stillhouse inspect tree`.

Guarantees: Zarr nodes are found by their zarr.json, so arrays of other programs show, too. Files are not read.
Try: `stillhouse inspect tree STORE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ....data.errors import StoreError
from ...store import Store
from ...store.disk.files import StoreFiles
from ...store.disk.json_records import matches_type

WHAT = {
    "store.json": "teachers, settings, fingerprints, versions",
    "data.zarr": "plain Zarr v3 for any reader",
    "plan": "tokenisation, order and shards, one folder a generation",
    "commits": "one record for each finished work item",
    "locks": "locks of writers",
    "tmp": "drafts of writers; the next writer deletes them",
}


@dataclass(frozen=True)
class Node:
    path: str  # relative to the store
    depth: int
    kind: str  # "file", "folder", "group" or "array"
    files: int
    bytes: int
    shape: list[int] | None = None  # of an array, as the next two
    dtype: str | None = None
    dimensions: list[str] | None = None
    about: str | None = None


def tree(store: Store) -> list[Node]:
    """Return all nodes in the order of a drawn tree. Raises StoreError if a zarr.json cannot be read."""
    root = store.paths.root
    sizes = {path.relative_to(root).parts: size for path, size in store.paths.files.sizes(root)}
    sizes |= {(p.name, ""): 0 for p in store.paths.files.empty_folders()}
    names = sorted({parts[0] for parts in sizes}, key=lambda n: (list(WHAT).index(n) if n in WHAT else 99, n))
    return [node for name in names for node in _nodes(store.paths.files, (name,), _under(sizes, name))]


Sizes = dict[tuple[str, ...], int]  # of the files below a place, by the rest of their paths


def _under(sizes: Sizes, name: str) -> Sizes:
    return {parts[1:]: size for parts, size in sizes.items() if parts[0] == name and parts[1:] != ("",)}


def _nodes(files: StoreFiles, place: tuple[str, ...], sizes: Sizes) -> Iterator[Node]:
    facts = "/".join(place), len(place) - 1
    count, total, about = len(sizes), sum(sizes.values()), WHAT.get(place[-1])
    if ("zarr.json",) not in sizes:
        yield Node(*facts, "file" if () in sizes else "folder", count, total, about=about)
        return
    file = files.root.joinpath(*place, "zarr.json")
    try:
        meta = files.read_json(file)
    except FileNotFoundError as e:
        raise StoreError("this link is broken, or the file has just been deleted", where=file) from e
    if not matches_type(meta, dict[str, Any]) or meta.get("node_type") not in ("array", "group"):
        raise StoreError("damaged", where=file, expected="the metadata of a Zarr array or group")
    if meta["node_type"] == "array":
        shape, attributes, names = meta.get("shape"), meta.get("attributes", {}), meta.get("dimension_names")
        types = ((shape, list[int]), (attributes, dict[str, Any]), (names, list[str | None] | None))
        if not all(matches_type(value, kind) for value, kind in types):
            raise StoreError("damaged: shape, attributes or dimension_names", where=file)
        dtype = str(attributes.get("logical_dtype", meta.get("data_type")))
        names = [n or "?" for n in names] if names else None
        yield Node(*facts, "array", count, total, shape=shape, dtype=dtype, dimensions=names)
        return
    yield Node(*facts, "group", count, total, about=about)
    for name in sorted({parts[0] for parts in sizes if len(parts) > 1}):
        yield from _nodes(files, (*place, name), _under(sizes, name))

"""Where everything lies in a store.

Guarantees: a path depends on names and numbers alone, so every process finds the same files.
Try: `stillhouse inspect tree STORE`.
"""

from __future__ import annotations

from pathlib import Path

from .files import StoreFiles


class Paths:
    """Where everything lies in one store, and the store's files themselves, given as such or as a folder on a disk."""

    def __init__(self, files: StoreFiles | Path) -> None:
        self.files = files if isinstance(files, StoreFiles) else StoreFiles(files)
        self.root = self.files.root

    @property
    def store_json(self) -> Path:
        return self.root / "store.json"

    @property
    def data(self) -> Path:
        return self.root / "data.zarr"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def array(self, group: str, name: str) -> Path:
        return self.data / group / name

    def chunk(self, group: str, name: str, *index: int) -> Path:
        return self.array(group, name).joinpath("c", *map(str, index))

    def hidden(self, teacher: str, context: int, layer: int, shard: int) -> Path:
        """The shard file of `hidden` at positions on the axes C, L and N (positions, not layer numbers)."""
        return self.shard_file("hidden", teacher, context, layer, shard)

    def scale(self, teacher: str, context: int, layer: int, shard: int) -> Path:
        """The same of `scale`, which int8 stores alone have."""
        return self.shard_file("scale", teacher, context, layer, shard)

    def shard_file(self, array: str, teacher: str, context: int, layer: int, shard: int) -> Path:
        """The shard file of `hidden`, of `code`, which pq stores have instead, or of `scale`."""
        last = () if array == "scale" else (0,)
        return self.chunk(teacher, array, context, layer, shard, *last)

    def plan(self, generation: int) -> Path:
        return self.root / "plan" / str(generation) / "plan.json"

    def sums(self, generation: int) -> Path:
        return self.root / "plan" / str(generation) / "sums.json"

    def commits(self, teacher: str, context: str) -> Path:
        return self.root / "commits" / teacher / context.replace(":", "-")

    def commit(self, teacher: str, context: str, shard: int | str, generation: int) -> Path:
        return self.commits(teacher, context) / f"{shard}.{generation}.json"

    def lock(self, *parts: object) -> Path:
        return self.locks / (".".join(str(p) for p in parts).replace(":", "-") + ".lock")

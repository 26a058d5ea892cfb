"""Commit records: the only proof that something in a store exists.

Guarantees: a record appears by link(2) after everything that it speaks of is on disk, so it is whole or absent. The
first writer of a record wins. Of a layer's records, the highest generation counts.
Try: `pytest tests/extract/pipeline/test_crash.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ....data.errors import StoreError
from ....data.files.atomic import sync
from ..disk.checksums import with_checksum, without_checksum
from ..disk.durable import explain_full_disk
from ..disk.json_records import as_record
from ..disk.paths import Paths
from .arrays import RawArray

_NAME = re.compile(r"(norms|\d+)\.(\d+)\.json")


@dataclass(frozen=True)
class Commit:
    """One work item that is done, or the norms of a context's layers.

    `files` gives each layer's bytes. `checksums` gives the crc32c of each layer's row of `crc32c`, and of the item's
    part of `input_hash`, `context_left` and `context_right`; for norms, of "norm_mean.LAYER", "norm_std.LAYER" and
    "codebook.LAYER", which pq alone has.
    """

    teacher: str
    context: str
    shard: int | str  # "norms": norm_mean, norm_std and codebook of these layers are on disk.
    generation: int
    layers: list[int]
    utterances: list[int]  # [first, last)
    rows: list[int]  # [first, last)
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)  # int8 and pq, by layer: sums of `Quantised.loss`


def link_commit(paths: Paths, scratch: Path, commit: Commit) -> bool:
    """Make a record exist and return True, or False where another writer has made it before."""
    target = paths.commit(commit.teacher, commit.context, commit.shard, commit.generation)
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = scratch / target.name
    with explain_full_disk(target):
        tmp.write_bytes(with_checksum(asdict(commit), target.name))
        sync(tmp)
    try:
        os.link(tmp, target)
    except FileExistsError:
        return False
    finally:
        tmp.unlink()
    sync(target.parent)
    return publish(paths, target, commit)


def publish(paths: Paths, record: Path, commit: Commit) -> bool:
    """Put a commit and its data into the object store of a store that is in one. False: another writer was first."""
    about = paths.files.read_json(paths.data / commit.teacher / "zarr.json")["attributes"]["stillhouse"]
    c = about["contexts"].index(commit.context)
    axes = {layer: about["layers"].index(layer) for layer in commit.layers}

    def array(name: str) -> RawArray:
        return RawArray(paths, commit.teacher, name)

    if commit.shard == "norms":
        names = {key.partition(".")[0] for key in commit.checksums}
        norms = [a.file(c, k, *(0 for _ in a.shape[2:])) for a in map(array, sorted(names)) for k in axes.values()]
        return paths.files.publish_commit(record, norms, None, overwrite=True)
    shard, (first, last) = int(commit.shard), commit.utterances
    arrays = ("hidden", "code", "scale")
    data = [paths.shard_file(name, commit.teacher, c, k, shard) for k in axes.values() for name in arrays]
    values: dict[str, Any] = {"first": first}
    for name in ("input_hash", "context_left", "context_right"):
        values[name] = array(name).read(c)[first:last]
    for layer, k in axes.items():
        values[f"crc32c.{layer}"] = array("crc32c").read(c, k)[first:last]
    before = Commits(paths, commit.teacher, commit.context, below=commit.generation)
    overwrite = any((commit.shard, layer) in before.of for layer in commit.layers)
    return paths.files.publish_commit(record, [p for p in data if p.exists()], values, overwrite)


def _read(paths: Paths, path: Path, shard: str, generation: int) -> Commit:
    """Read a record. Raises StoreError where it is damaged, or another's."""
    where = paths.files.place(path)
    try:
        commit = as_record(Commit, without_checksum(paths.files.read_json(path), path.name), where)
    except FileNotFoundError as e:
        raise StoreError("a commit record leads nowhere, or was deleted just now", where=where) from e
    layers = {str(layer) for layer in commit.layers}
    pairs = [] if shard == "norms" else [commit.utterances, commit.rows]
    sums = shard == "norms" or (layers <= commit.files.keys() and layers <= commit.checksums.keys())
    if (str(commit.shard), commit.generation) != (shard, generation) or not sums or not all(len(p) == 2 for p in pairs):
        raise StoreError("a damaged commit record", where=where, remedy="stillhouse inspect verify STORE")
    if not all(len(loss) == 4 for loss in commit.losses.values()):
        raise StoreError("a damaged commit record: losses", where=where)
    return commit


class Commits:
    """All records of a (teacher, context), or those of generations `below` one: which layers of which shards exist."""

    def __init__(self, paths: Paths, teacher: str, context: str, below: int | None = None) -> None:
        self.folder = paths.commits(teacher, context)
        self.of: dict[tuple[int | str, int], Commit] = {}
        for name in paths.files.record_names(self.folder):
            match = _NAME.fullmatch(name)
            if match is None or (below is not None and int(match[2]) >= below):
                continue
            commit = _read(paths, self.folder / name, match[1], int(match[2]))
            for layer in commit.layers:
                before = self.of.get((commit.shard, layer))
                if before is None or before.generation < commit.generation:
                    self.of[commit.shard, layer] = commit

    def has(self, shard: int | str, layers: tuple[int, ...] | list[int], generation: int = 0) -> bool:
        """Return whether all of `layers` are committed, by this generation or a later one."""
        commits = (self.of.get((shard, layer)) for layer in layers)
        return all(c is not None and c.generation >= generation for c in commits)

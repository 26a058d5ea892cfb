"""Commit records: the only proof that something in a store exists.

Invariant: a record appears by link(2) after everything that it speaks of is on disk, so it is whole or absent, and
the first writer wins. The highest generation of a layer counts. Run: `pytest tests/extract/test_crash.py`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.data.errors import StoreError

from .files import fsync_folder, phase, read_json, room
from .layout import Paths

_NAME = re.compile(r"(norms|\d+)\.(\d+)\.json")


@dataclass(frozen=True)
class Commit:
    """One unit of work, done. `files` gives each layer's bytes; `checksums` the crc32c of its row of `crc32c`."""

    teacher: str
    context: str
    shard: int | str  # "norms": norm_mean and norm_std of these layers are on disk, the view is complete
    generation: int
    layers: list[int]
    utterances: list[int]  # [first, last)
    rows: list[int]  # [first, last)
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)  # of int8, by layer: sums of `Quantised.loss`


def link_commit(paths: Paths, scratch: Path, commit: Commit) -> bool:
    """Make a record exist. False where another writer has made it before."""
    target = paths.commit(commit.teacher, commit.context, commit.shard, commit.generation)
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = scratch / target.name
    with room(target), open(tmp, "w") as f:
        json.dump(asdict(commit), f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    phase("before_link")
    try:
        os.link(tmp, target)
    except FileExistsError:
        return False
    finally:
        tmp.unlink()
    fsync_folder(target.parent)
    phase("after_link")
    return True


class Commits:
    """All records of a (teacher, context): which layers of which shards exist, and of which generation."""

    def __init__(self, paths: Paths, teacher: str, context: str) -> None:
        self.folder = paths.commits(teacher, context)
        self.of: dict[tuple[int | str, int], Commit] = {}
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        for name in names:
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            try:
                commit = Commit(**read_json(self.folder / name))
            except TypeError as e:
                raise StoreError(f"a damaged commit record: {e}", where=self.folder / name) from e
            for layer in commit.layers:
                before = self.of.get((commit.shard, layer))
                if before is None or before.generation < commit.generation:
                    self.of[commit.shard, layer] = commit

    def has(self, shard: int | str, layers: tuple[int, ...] | list[int], generation: int = 0) -> bool:
        """Whether every one of `layers` is committed, by this generation or a later one."""
        found = (self.of.get((shard, layer)) for layer in layers)
        return all(c is not None and c.generation >= generation for c in found)

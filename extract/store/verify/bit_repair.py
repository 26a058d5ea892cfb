"""Putting single bits right: where the checksum of something small says which bit is wrong, it is turned in place.

Invariant: what is written has the checksum that was recorded when it was first written; everything else stays as it is.
Run: `stillhouse inspect verify STORE --repair`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ....data.errors import StillhouseError
from ..disk.checksums import mended
from ..disk.durable import Lock, fsync_all, write_bytes
from ..disk.layout import Paths
from ..format.arrays import RawArray
from ..reader import Store
from .sums import Damage, all_damage, record_damage

_ROUNDS = 3  # what could not be looked at for the damage of something else is looked at again


def mend_records(root: Path) -> Iterator[tuple[str, str]]:
    """(file, what was wrong) of JSON files in which one bit was wrong and is right now. The store need not open."""
    paths = Paths(root)
    with Lock(paths.lock("plan"), wait=True):  # or a planner's new store.json would be lost
        for what, path in list(record_damage(paths)):
            try:
                right = mended(path.read_bytes(), path.name)
            except OSError:
                continue
            if right is not None:
                write_bytes(path, right)
                yield str(path.relative_to(root)), what


def mend_arrays(root: Path) -> Iterator[str]:
    """Where one bit of an array was wrong and is right now. Errors: as `Store.open`."""
    for _ in range(_ROUNDS):
        try:
            found = [r for r in all_damage(Store.open(root)) if r.bit is not None]
        except (ValueError, IndexError):
            return
        done = 0
        for rot in found:
            try:
                turned = turn(rot)
            except (StillhouseError, OSError):
                continue
            if turned:
                done += 1
                yield rot.where
        if not done:
            return


def turn(rot: Damage) -> bool:
    """Turn the bit. In place: writers of other units may have the file open. False where its array is not raw bytes."""
    array = RawArray(rot.array)
    if rot.bit is None or not array.plain:
        return False
    axis = len(rot.lead)
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[axis + 1 :], dtype=np.int64))
    row, byte = divmod(rot.bit[0], row_bytes)
    number, inside = divmod(rot.first + row, array.chunks[axis])
    path = array.file(*rot.lead, number, *(0 for _ in array.shape[axis + 1 :]))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        at = inside * row_bytes + byte
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1 << rot.bit[1]]), at)
    finally:
        os.close(fd)
    fsync_all([path])
    return True

"""Paths in manifests: relative to the manifest's folder, and inside a folder that they must not leave, if one is set.

Invariant: a path that `confined` returns for a root is, with all links followed, below that root.
Exercised by `stillhouse corpus features CORPUS FEATURES --root DIR`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AudioError


def relative_audio(audio: Path, manifest: Path) -> str:
    """The path of an audio file as the manifest holds it: relative to the manifest's folder."""
    return os.path.relpath(audio, os.path.dirname(os.path.abspath(manifest))).replace(os.sep, "/")


def below(folder: Path, suffix: str) -> list[Path]:
    """The files below a folder whose names end so, sorted; links to folders are followed, each folder once."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # of two ways to a folder, always the same counts
        found += [Path(place, name) for name in files if name.endswith(suffix)]
    return sorted(found)


def confined(path: Path, root: Path | None, where: object = None) -> Path:
    """The same path, or AudioError where it is not below root; without a root any path will do."""
    if root is None:
        return path
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as e:
        raise AudioError(f"not a path: {e}", where=where or repr(str(path))) from e
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise AudioError(
            f"{path} leads out of the root, to {real}" if where else f"the path leads out of the root, to {real}",
            where=where or path,
            expected=f"a file below {root}",
            remedy="copy the file there, or give a --root that holds it",
        )
    return path

"""Audio paths: relative to the folder of the manifest, and below a root if one is set.

Guarantees: a path that `confined` returns for a root is below it, with all links followed.
Try: `stillhouse corpus features corpus.jsonl features.h5 --root .`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AudioError


def relative_audio(audio: Path, manifest: Path) -> str:
    """Return the path of an audio file relative to the folder of the manifest."""
    return os.path.relpath(audio, os.path.dirname(os.path.abspath(manifest))).replace(os.sep, "/")


def below(folder: Path, suffix: str) -> list[Path]:
    """Return the files below a folder whose names end with `suffix`, sorted. Links to folders are followed once."""
    paths, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # If two paths lead to a folder, the same one counts each time.
        paths += [Path(place, name) for name in files if name.endswith(suffix)]
    return sorted(paths)


def confined(path: Path, root: Path | None, where: object = None) -> Path:
    """Return the same path. Raises AudioError if there is a root and the path is not below it."""
    if root is None:
        return path
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as e:
        raise AudioError(f"not a path: {e}", where=where or repr(str(path))) from e
    if not Path(real).is_relative_to(os.path.realpath(root)):
        what = f"{path if where else 'the path'} leads out of the root, to {real}"
        remedy = "copy the file there, or give another --root"
        raise AudioError(what, where=where or path, expected=f"a file below {root}", remedy=remedy)
    return path

"""Ids of utterances that have none of their own, from the names of their audio files.

Guarantees: an id depends on all files of an import together, never on their order. Files of one name in several folders
get ids from their paths, with suffixes if only these differ. Rows that share a file get ids from times and channels.
Try: `stillhouse corpus import nemo train_manifest.json corpus.jsonl`.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path


def stem(path: str) -> str:
    """Return the name of a file without its folder and suffix."""
    return os.path.splitext(os.path.basename(path))[0]


class AudioNames:
    """Ids from file names. `see` all rows of an import first, then ask for the `id` of each.

    A file is the path that a source gives, relative to a folder. The folder may be the name of a split, for audio that
    is embedded and has no path on disk.
    """

    def __init__(self) -> None:
        self._given: dict[str, str] = {}  # {file: its path as the source gives it}
        self._uses: Counter[str] = Counter()
        self._places: Counter[tuple[str, float | None]] = Counter()
        self._names: dict[str, str] = {}

    def see(self, folder: Path | str, path: str, start_s: float | None = None) -> None:
        """Count a row: the path of its audio, and where it starts."""
        file = _file(folder, path)
        self._given[file] = min(self._given.get(file, path), path)
        self._uses[file] += 1
        self._places[file, start_s] += 1
        self._names.clear()

    def shared(self, folder: Path | str, path: str) -> bool:
        """Return whether several rows name the file."""
        return self._uses[_file(folder, path)] > 1

    def name(self, folder: Path | str, path: str) -> str:
        """Return the stem of a file, or its path if another file has that stem."""
        if not self._names:
            self._names = self._all_names()
        return self._names.get(_file(folder, path)) or stem(path)

    def id(
        self,
        folder: Path | str,
        path: str,
        start_s: float | None = None,
        channel: str | None = None,
        content: str | None = None,
    ) -> str:
        """Return the id of a row. Rows of one file differ in the start in milliseconds, and in the channel if need be.

        `content` is a name of embedded audio, which tells files apart that have one path.
        """
        parts = [self.name(folder, path)]
        if self.shared(folder, path):
            parts += [content] if content is not None else []
            parts += [f"{round(start_s * 1000):08d}"] if start_s is not None else []
            if channel is not None and self._places[_file(folder, path), start_s] > 1:
                parts.append(channel)
        return "-".join(parts)

    def _all_names(self) -> dict[str, str]:
        stems = Counter(map(stem, self._given))
        paths = {file: _without_suffix(os.path.normpath(given)) for file, given in self._given.items()}
        twice = Counter(paths.values())
        folder = os.path.commonpath(map(os.path.dirname, self._given)) if len(self._given) > 1 else ""
        names = {}
        for file in self._given:
            name = stem(file)
            if stems[name] > 1:
                name = paths[file] if twice[paths[file]] == 1 else _without_suffix(os.path.relpath(file, folder))
            names[file] = name
        uses = Counter(names.values())  # Files of one path may differ in the suffix alone.
        return {file: n if uses[n] == 1 else n + os.path.splitext(self._given[file])[1] for file, n in names.items()}


def _file(folder: Path | str, path: str) -> str:
    return os.path.normpath(os.path.join("/", folder, path))


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0].strip("./")

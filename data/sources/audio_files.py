"""Where the audio files are that a list names, and audio that has to be written out before it can be named.

Invariant: a file that this finds exists and is below the root, if one is set; a file that it writes is whole or not
there. Exercised by `stillhouse corpus import kaldi|nemo|lhotse|huggingface`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from ..audio.read import open_audio
from ..errors import AudioError
from ..files.atomic import draft_of
from ..files.paths import confined

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class AudioFiles:
    """Files by the paths that a list has.

    folders: where a relative path may begin; the one where the first was found is tried first from then on.
    """

    def __init__(self, folders: Sequence[Path], root: Path | None) -> None:
        self._folders, self._root = list(dict.fromkeys(f.absolute() for f in folders)), root
        self._seconds: dict[Path, tuple[float, int]] = {}

    def find(self, text: str) -> Path:
        """The file of that path; AudioError where there is none or where it is outside the root."""
        try:
            for k, folder in enumerate(self._folders):
                path = folder / text
                if os.path.isfile(path):
                    if k:
                        self._folders.insert(0, self._folders.pop(k))
                    return confined(path, self._root)
                if os.path.isabs(text):
                    break
        except ValueError as e:  # a NUL, or half of a surrogate pair
            raise AudioError(f"not a path: {e}", where=repr(text[:80])) from e
        confined(self._folders[0] / text, self._root)
        raise AudioError(
            "no such audio file",
            where=text[:1000],
            expected=None if os.path.isabs(text) else f"a path relative to {self._folders[0]}",
            remedy="restore it, or say where it is with --audio-root",
        )

    def length(self, path: Path) -> tuple[float, int]:
        """(seconds, channels) of a file, by its header; each file is looked at once in a row of many."""
        found = self._seconds.get(path)
        if found is None:
            with open_audio(path) as file:
                found = file.frames / file.samplerate, file.channels
            if len(self._seconds) > 10_000:
                self._seconds.clear()
            self._seconds[path] = found
        return found


def above(folder: Path, steps: int = 4) -> list[Path]:
    """The folder, those above it and the working folder: where recipes mean their relative paths to begin."""
    folder = folder.absolute()
    return [Path.cwd(), folder, *list(folder.parents)[:steps]]


class Unpacked:
    """Audio that had no file of its own, written beside the manifest: corpus.jsonl has corpus.audio/."""

    def __init__(self, manifest: Path) -> None:
        self.folder = manifest.absolute().with_suffix(".audio")
        self.written = 0

    def path(self, name: str, source: str | bytes, suffix: str) -> Path:
        """A name of its own for the audio of utterance or recording `name` made from `source`."""
        data = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        digest = blake2b(name.encode("utf-8", "surrogatepass") + b"\0" + data, digest_size=6).hexdigest()
        plain = name if PLAIN_NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:60].lstrip(".-")
        return self.folder / f"{plain}-{digest}{suffix}"

    def write(self, path: Path, fill: Callable[[Path], object]) -> Path:
        """Have `fill` write a temporary file and put it at `path`; one that is there already stays."""
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with draft_of(path) as draft:
                    fill(draft)
            except OSError as e:
                raise AudioError(f"cannot write: {e.strerror or e}", where=path, remedy="make room") from e
            finally:
                with suppress(OSError):  # it holds something
                    self.folder.rmdir()
            self.written += 1
        return path

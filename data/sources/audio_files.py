"""The audio files that a list names, and audio that must be written to a file before a manifest can name it.

Guarantees: a file that `find` returns exists, below the root if one is set. A file is written whole or not at all.
Try: `stillhouse corpus import nemo manifest.json corpus.jsonl`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from ..audio.read import open_audio
from ..audio.whole import flaw_of
from ..errors import AudioError
from ..files.atomic import draft_of
from ..files.paths import confined

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".sph")  # of names that a list has without them
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class AudioLength(NamedTuple):
    """The length of a file, and what is wrong with its end, or None. See `audio.whole`."""

    seconds: float
    channels: int
    flaw: str | None = None


class AudioFiles:
    """Find files by the paths of a list. Relative ones start in one of `folders`, and none may leave `root`.

    The folder of the last file is tried first.
    """

    def __init__(self, folders: Sequence[Path], root: Path | None) -> None:
        self._folders, self._root = list(dict.fromkeys(f.absolute() for f in folders)), root
        self._lengths: dict[Path, AudioLength] = {}

    def find(self, text: str) -> Path:
        """Return the file of a path, which may lack its suffix if one file alone has that name.

        Raises AudioError if it is missing or outside the root.
        """
        try:
            for suffixes in (("",), SUFFIXES):
                for k, folder in enumerate(self._folders):
                    found = [path for s in suffixes if os.path.isfile(path := Path(f"{folder / text}{s}"))]
                    if len(found) > 1:
                        raise AudioError(f"{len(found)} files have this name", where=text[:1000], expected="a suffix")
                    if found:
                        self._folders.insert(0, self._folders.pop(k))
                        return confined(found[0], self._root)
        except ValueError as e:  # The text holds a NUL or half of a surrogate pair.
            raise AudioError(f"not a path: {e}", where=repr(text[:80])) from e
        confined(self._folders[0] / text, self._root)
        expected = None if os.path.isabs(text) else f"a path relative to {self._folders[0]}"
        remedy = "restore it, or name its folder with --audio-root"
        raise AudioError("no such audio file", where=text[:1000], expected=expected, remedy=remedy)

    def length(self, path: Path) -> AudioLength:
        """Return the length of a file by its header, which is read once for many lines."""
        if path not in self._lengths:
            with open_audio(path) as file:
                length = AudioLength(file.frames / file.samplerate, file.channels, flaw_of(path, file))
            if len(self._lengths) > 10_000:
                self._lengths.clear()
            self._lengths[path] = length
        return self._lengths[path]


class UnpackedAudio:
    """Audio that had no file of its own, in a folder beside the manifest: corpus.jsonl has corpus.audio/."""

    def __init__(self, manifest: Path) -> None:
        self.folder = manifest.absolute().with_suffix(".audio")
        self.written = 0

    def write(self, name: str, source: str | bytes, suffix: str, fill: Callable[[Path], object]) -> Path:
        """Write the audio of utterance or recording `name` with `fill`, which gets the path of a draft.

        Return its path, which is unique for the name and the `source`. An existing file stays.
        """
        data = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        digest = blake2b(name.encode("utf-8", "surrogatepass") + b"\0" + data, digest_size=6).hexdigest()
        plain = name if PLAIN_NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:60].lstrip(".-")
        path = self.folder / f"{plain}-{digest}{suffix}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with draft_of(path) as draft:
                    fill(draft)
            except OSError as e:
                raise AudioError(f"cannot write: {e.strerror or e}", where=path, remedy="free disk space") from e
            finally:
                with suppress(OSError):  # The folder is not empty.
                    self.folder.rmdir()
            self.written += 1
        return path

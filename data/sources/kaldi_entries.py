"""What an entry of wav.scp means: a file, a pipe, a place in an archive.

Invariant: no command runs unless allowed; whatever is found or written is below the root, if one is set.
Exercised by `stillhouse corpus import kaldi`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import AudioError
from ..files.paths import confined
from .audio_files import AudioFiles, Unpacked
from .common import Imported
from .kaldi_archives import audio_in_archive, copy_stretch
from .kaldi_pipes import decoded_file, run_command

ARCHIVE = re.compile(r"(?P<path>.*\S):(?P<offset>\d{1,20})")
ALLOW = "--allow-pipes runs such commands, if you trust the list"


class Entries:
    """The files behind the entries of wav.scp."""

    def __init__(
        self, result: Imported, places: AudioFiles, unpacked: Unpacked, root: Path | None, allow_pipes: bool
    ) -> None:
        self.result, self.places, self.unpacked = result, places, unpacked
        self.root, self.allow_pipes = root, allow_pipes

    def find(self, recording: str, entry: str) -> tuple[Path, int | None]:
        """(file, channel or None) of an entry; AudioError where there is none."""
        if not entry:
            raise AudioError("no audio behind the name", expected="RECORDING FILE")
        if entry.endswith("|"):
            return self.pipe(recording, entry[:-1].strip())
        if entry.startswith("|"):
            raise AudioError("a pipe to write to")
        match = ARCHIVE.fullmatch(entry)
        if match is None:
            return self.places.find(entry), None
        archive = self.places.find(match["path"])
        status = archive.stat()  # another archive under the same name has other audio at the same place
        stretch = audio_in_archive(archive, int(match["offset"]))
        name = f"{entry} {status.st_size} {status.st_mtime_ns}"
        target = self.unpacked.path(recording, name, stretch.suffix)
        self.unpacked.write(target, lambda temporary: copy_stretch(archive, stretch, temporary))
        return confined(target, self.root), None

    def pipe(self, recording: str, command: str) -> tuple[Path, int | None]:
        plain = decoded_file(command)
        if plain is not None:
            path = self.places.find(plain.path)
            try:
                self.places.length(path)
            except AudioError as e:  # a format that the command knows and libsndfile does not
                if not self.allow_pipes:
                    raise AudioError(e.what, where=path, expected=e.expected, remedy=ALLOW) from None
            else:
                if plain.rate_hz is not None:
                    self.result.note(
                        f"pipes that resample, to {plain.rate_hz} Hz: read at the files' own rate, "
                        "which `corpus features` resamples"
                    )
                return path, plain.channel
        elif not self.allow_pipes:
            raise AudioError(
                f"a shell command, not run: {command[:200]}",
                expected="a file, or a pipe that only decodes one",
                remedy=ALLOW,
            )
        target = self.unpacked.path(recording, command, ".wav")
        return confined(self.unpacked.write(target, lambda temporary: run_command(command, temporary)), self.root), None

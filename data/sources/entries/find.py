"""One entry of wav.scp: a file, a pipe or a place in an archive.

Guarantees: no command runs unless it is allowed. Every file that is found or written is below the root, if one is set.
Try: `stillhouse corpus import kaldi data/train corpus.jsonl`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from ...errors import AudioError
from ...files.paths import confined
from ..audio_files import AudioFiles
from ..common import Imported
from .archives import audio_in_archive, copy_file
from .pipes import decoded_file, run_command

ARCHIVE = re.compile(r"(?P<path>.*\S):(?P<offset>\d{1,20})")
ALLOW = "use --allow-pipes if you trust the commands of the list"


class WavEntries:
    """The files behind the entries of wav.scp."""

    def __init__(self, result: Imported, files: AudioFiles) -> None:
        self.result, self.files = result, files

    def find(self, recording: str, entry: str) -> tuple[Path, int | None]:
        """Return (file, channel or None for all) of an entry. Raises AudioError if there is none."""
        if not entry:
            raise AudioError("no audio after the name", expected="RECORDING FILE")
        if entry.endswith("|"):
            return self.pipe(recording, entry[:-1].strip())
        if entry.startswith("|"):
            raise AudioError("a pipe to write to")
        match = ARCHIVE.fullmatch(entry)
        if match is None:
            return self.files.find(entry), None
        archive = self.files.find(match["path"])
        status = archive.stat()
        audio = audio_in_archive(archive, int(match["offset"]))
        # Another archive of the same name has other audio at the same place, so its size and time are part of the name.
        source = f"{entry} {status.st_size} {status.st_mtime_ns}"
        fill = partial(copy_file, archive, audio)
        target = self.result.unpacked.write(recording, source, audio.suffix, fill)
        return confined(target, self.result.root), None

    def pipe(self, recording: str, command: str) -> tuple[Path, int | None]:
        """Return (file, channel or None for all) of a command, without its last "|"."""
        decoded = decoded_file(command)
        if decoded is not None:
            path = self.files.find(decoded.path)
            try:
                self.files.length(path)
            except AudioError as e:  # The command may read formats that libsndfile does not.
                if not self.result.allow_pipes:
                    raise AudioError(e.what, where=path, expected=e.expected, remedy=ALLOW) from None
            else:
                if decoded.rate_hz is not None:
                    ignored = f"that pipes resample to {decoded.rate_hz} Hz"
                    self.result.note(f"the import ignores {ignored}. `corpus features` resamples")
                return path, decoded.channel
        elif not self.result.allow_pipes:
            what = f"a shell command, which did not run: {command[:200]}"
            raise AudioError(what, expected="a file, or a pipe that only decodes one", remedy=ALLOW)
        target = self.result.unpacked.write(recording, command, ".wav", partial(run_command, command))
        return confined(target, self.result.root), None

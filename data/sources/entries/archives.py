"""Audio inside Kaldi archives, FILE.ark:OFFSET: WAV as `wav-copy` writes it, any format as kaldiio's `soundfile` does.

Guarantees: an audio file at the offset is copied byte for byte. Anything else is an AudioError that names it.
Try: `stillhouse corpus import espnet dump/raw/train corpus.jsonl`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from ...errors import AudioError

UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # Programs that write to a pipe leave these in a WAV header.
SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg"}


@dataclass(frozen=True)
class ArchivedFile:
    """Where in the archive an audio file lies, in bytes, and the suffix of such files."""

    begin: int
    length: int
    suffix: str


def audio_in_archive(archive: Path, offset: int) -> ArchivedFile:
    """Return the audio file at `offset`. Raises AudioError if there is none, or if its length is unknown."""
    where = f"{archive}:{offset}"
    size = archive.stat().st_size
    with archive.open("rb") as source:
        source.seek(min(offset, size))
        head = source.read(16)
        if head[:5] == b"AUDIO":  # The size of the length, the length and the file follow.
            width = head[5] if len(head) > 5 else 0
            begin = offset + 6 + width
            length = int.from_bytes(head[6 : 6 + width], "little")
            source.seek(min(begin, size))
            suffix = SUFFIXES.get(source.read(4), ".audio")
            if not 0 < width <= 8 or length == 0:
                raise AudioError("audio in an archive, with a length of 0", where=where)
        elif head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            (length,) = struct.unpack("<I", head[4:8])
            if length in UNKNOWN_SIZES:
                raise AudioError("the length of the WAV in the archive is unknown", where=where)
            begin, length, suffix = offset, 8 + length, ".wav"
        elif head[:2] == b"\0B":
            raise AudioError("a Kaldi matrix and no audio", where=where, expected="the archive of the audio")
        else:
            what, remedy = "no audio at that place of the archive", "import the wav.scp that the archive was made from"
            raise AudioError(what, where=where, expected="WAV, or what kaldiio writes", remedy=remedy)
    if begin + length > size:
        raise AudioError("the archive ends before the audio does", where=where, remedy="restore the archive")
    return ArchivedFile(begin, length, suffix)


def copy_file(archive: Path, audio: ArchivedFile, target: Path) -> None:
    """Copy the bytes of an audio file to `target`."""
    left = audio.length
    with archive.open("rb") as source, target.open("wb") as sink:
        source.seek(audio.begin)
        while left:
            block = source.read(min(left, 1 << 20))
            if not block:
                raise AudioError("the archive has become shorter", where=archive)
            sink.write(block)
            left -= len(block)

"""Audio inside Kaldi archives, FILE.ark:OFFSET as `wav-copy` and ESPnet's dumps write it.

Invariant: what is at the offset is copied byte for byte, or it is an AudioError that says what is there instead.
Exercised by `stillhouse corpus import espnet dump/raw corpus.jsonl`.
"""

from __future__ import annotations

import struct
from pathlib import Path

from ..errors import AudioError

UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)


def wav_of_archive(archive: Path, offset: int, target: Path) -> None:
    """Copy the WAV file at `offset` of an archive to `target`."""
    where = f"{archive}:{offset}"
    size = archive.stat().st_size
    with archive.open("rb") as source:
        source.seek(min(offset, size))
        head = source.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            (length,) = struct.unpack("<I", head[4:8])
            if length in UNKNOWN_SIZES or offset + 8 + length > size:
                raise AudioError("the WAV in the archive does not say how long it is, or ends early", where=where)
            source.seek(offset)
            with target.open("wb") as sink:
                _copy(source, sink, 8 + length)
            return
    if head[:2] == b"\0B":
        raise AudioError("a Kaldi matrix, features and no audio", where=where, expected="the archive of the audio")
    kind = "FLAC" if b"fLaC" in head or head[:5] == b"AUDIO" else "no WAV"
    raise AudioError(
        f"{kind} in an archive", where=where, expected="a WAV", remedy="take the wav.scp that the archive was made from"
    )


def _copy(source, sink, length: int) -> None:  # type: ignore[no-untyped-def]
    while length:
        block = source.read(min(length, 1 << 20))
        if not block:
            raise AudioError("the archive ends early", where=source.name)
        sink.write(block)
        length -= len(block)

"""Whether an audio file holds what its container promises: files that are cut off, joined, or longer than their header.

Guarantees: only headers, page heads and frame heads are looked at, never samples. libsndfile reads such files to some
place without a word.
Try: `stillhouse corpus check corpus.jsonl --full`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import soundfile

SLACK_S = 0.02  # Times of a manifest are often rounded to hundredths, so a segment may end so much after its file.
REMEDY = "restore the file, or write what is there again with `ffmpeg -i FILE OUT.flac`"


@dataclass(frozen=True)
class _Chunks:
    """How a container of chunks is laid out, and how its chunk of samples is called."""

    first: int  # the place of the first chunk
    head: struct.Struct  # of a chunk: its name and its size
    samples: bytes
    align: int = 2
    own: int = 0  # what the size counts of the head


_CHUNKS = {
    b"RIFF": _Chunks(12, struct.Struct("<4sI"), b"data"),
    b"RF64": _Chunks(12, struct.Struct("<4sI"), b"data"),
    b"RIFX": _Chunks(12, struct.Struct(">4sI"), b"data"),
    b"FORM": _Chunks(12, struct.Struct(">4sI"), b"SSND"),
    b"caff": _Chunks(8, struct.Struct(">4sq"), b"data", 1),
    b"riff": _Chunks(40, struct.Struct("<4s12xQ"), b"data", 8, 24),  # W64
}
# Programs that write to a pipe cannot go back to the header, and leave one of these in the place of the size.
_UNKNOWN = (range(0x7FFFF000, 0x80000001), range(0xFFFFF000, 0x100000000), range(-1, 1))


def flaw_of(path: Path, file: soundfile.SoundFile, *, scan: bool = True) -> str | None:
    """Return what an open file lacks of what it promises, or what more it holds than is read. None: nothing.

    Without `scan`, only the beginning and the end of the file are looked at. With it, the frames of MP3 are counted,
    and FLAC and Ogg are searched for a second stream.
    """
    status = os.stat(path)
    key = (path, status.st_size, status.st_mtime_ns, file.format, file.frames, file.samplerate)
    return _flaw(*key, scan)


@lru_cache(maxsize=4096)
def _flaw(path: Path, size: int, _: int, kind: str, frames: int, rate_hz: int, scan: bool) -> str | None:
    read_s = frames / rate_hz
    with path.open("rb") as source:
        magic = source.read(4)
        if magic in _CHUNKS:
            return _chunk_flaw(source, _CHUNKS[magic], size, read_s)
        if magic == b"OggS":
            return _ogg_flaw(source, size, read_s, scan)
        if magic == b".snd":
            begin, promised = struct.unpack(">4xII", source.read(8).rjust(12, b"\0"))
            return _size_flaw(begin, promised, size, read_s)
        if magic == b"NIST":
            return _sphere_flaw(source, size, read_s)
        if kind == "MP3" and scan:
            return _mp3_flaw(source, read_s, rate_hz)
        if kind == "FLAC":
            return _flac_flaw(source, size, read_s, rate_hz, scan)
    return None


def _size_flaw(begin: int, promised: int, size: int, read_s: float) -> str | None:
    """Compare the bytes of sound that a header promises with those of the file."""
    there = max(0, size - begin)
    if any(promised in unknown for unknown in _UNKNOWN):
        if there and not read_s:
            return "its header promises no sound, as a program leaves it that writes to a pipe"
        return None
    if promised <= there or not there or not read_s:
        return None
    promised_s = read_s * promised / there
    return _cut(promised_s, read_s) if promised_s - read_s > SLACK_S else None


def _cut(promised_s: float, read_s: float) -> str:
    return f"the file is cut off: it promises {promised_s:.3f} s, and {read_s:.3f} s can be read"


def _longer(read_s: float, what: str) -> str:
    return f"only its first {read_s:.3f} s are read: {what}"


def _chunk_flaw(source: BinaryIO, layout: _Chunks, size: int, read_s: float) -> str | None:
    at, large = layout.first, 0
    while at + layout.head.size <= size:
        source.seek(at)
        name, length = layout.head.unpack(source.read(layout.head.size))
        begin, length = at + layout.head.size, length - layout.own
        if name == b"ds64":
            large = int.from_bytes(source.read(16)[8:], "little")
        if name == layout.samples:
            promised = large if large and length == 0xFFFFFFFF else length
            if flaw := _size_flaw(begin, promised, size, read_s):
                return flaw
            at = begin + promised + -(begin + promised) % layout.align
            return None if promised <= 0 or at >= size else _rest_flaw(source, layout, at, size, promised, read_s)
        at = begin + length + -(begin + length) % layout.align
        if length < 0:
            break
    return None


def _rest_flaw(source: BinaryIO, layout: _Chunks, at: int, size: int, promised: int, read_s: float) -> str | None:
    """Look at what stands behind the samples: other chunks, zeros, or sound that the header does not count."""
    while at + layout.head.size <= size:
        source.seek(at)
        name, length = layout.head.unpack(source.read(layout.head.size))
        length -= layout.own
        if not re.fullmatch(rb"[ -~]{4}", name) or name in _CHUNKS or not 0 <= length <= size - at:
            break
        at += layout.head.size + length
        at += -at % layout.align
    source.seek(min(at, size))
    more_s = read_s * max(0, size - at) / promised
    if more_s <= SLACK_S or not source.read().strip(b"\0"):
        return None
    return _longer(read_s, f"{size - at} bytes behind them are in the file, but not in its header")


def _sphere_flaw(source: BinaryIO, size: int, read_s: float) -> str | None:
    source.seek(0)
    words = source.read(1 << 14).split()
    fields = {name: value for name, kind, value in zip(words, words[1:], words[2:], strict=False) if kind == b"-i"}
    try:
        counts = [int(fields[name]) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
        begin = int(words[1])
    except (KeyError, ValueError, IndexError):
        return None
    return _size_flaw(begin, counts[0] * counts[1] * counts[2], size, read_s)


def _ogg_flaw(source: BinaryIO, size: int, read_s: float, scan: bool) -> str | None:
    """Look at the last page, which must be marked as the end of its stream, and for a page that begins another one."""
    source.seek(0 if scan else max(0, size - (1 << 17)))
    tail = source.read()
    pages = list(_pages(tail))
    last = pages[-1] if pages else None
    if last is None:
        return None
    segments = tail[last + 26]
    whole = last + 27 + segments + sum(tail[last + 27 : last + 27 + segments]) <= len(tail)
    if not whole or not tail[last + 5] & 4:
        return f"the file is cut off: its last page is {'not the end' if whole else 'incomplete'}, at {read_s:.3f} s"
    begins = [bool(tail[at + 5] & 2) for at in pages]
    if any(begin and not before for before, begin in pairwise(begins)):
        return _longer(read_s, "several streams stand one after the other")
    return None


def _pages(data: bytes) -> Iterator[int]:
    """Yield the places of the heads of Ogg pages."""
    for match in re.finditer(rb"OggS\0[\0-\7]", data):
        if match.start() + 27 <= len(data):
            yield match.start()


def _flac_flaw(source: BinaryIO, size: int, read_s: float, rate_hz: int, scan: bool) -> str | None:
    """Look where the last frame ends, and search for the head of a second stream."""
    source.seek(8)
    smallest, largest = struct.unpack(">HH", source.read(4).rjust(4, b"\0"))
    source.seek(max(0, size - (1 << 17)))
    end_s = _flac_end(source.read(), smallest if smallest == largest else 0) / rate_hz
    if 0 < end_s < read_s - SLACK_S:
        return _cut(read_s, end_s)
    if end_s > read_s + SLACK_S:
        return _longer(read_s, f"its frames hold {end_s:.3f} s")
    source.seek(4)
    before = b""
    while scan and (block := source.read(1 << 20)):
        if re.search(rb"fLaC[\0\x80]\0\0\x22", before + block):
            return _longer(read_s, "several streams stand one after the other")
        before = block[-7:]
    return None


def _crc8(byte: int) -> int:
    for _ in range(8):
        byte = (byte << 1 ^ (0x107 if byte & 0x80 else 0)) & 0xFF
    return byte


_CRC8 = [_crc8(byte) for byte in range(256)]


def _flac_end(data: bytes, block: int) -> int:
    """Return the sample behind the last frame, or 0 if that is unknown. `block` is the size of all blocks but the last.

    Sound can look like the head of a frame, so a head counts only if its frame follows on another one, or is the first.
    """
    heads = [
        head for match in re.finditer(rb"\xff[\xf8\xf9]", data) if (head := _flac_head(data, match.start(), block))
    ]
    ends = {end for _, end in heads}
    return max((end for begin, end in heads if begin in ends or begin == 0), default=0)


def _flac_head(data: bytes, at: int, block: int) -> tuple[int, int] | None:
    """Return (first sample, sample behind the last) of the frame whose head is there. None: there is none."""
    head = data[at : at + 16]
    if len(head) < 6 or head[2] >> 4 == 0 or head[2] & 15 == 15 or head[3] >> 4 > 10 or head[3] & 1:
        return None
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # The number is coded as in UTF-8, with up to 36 bits.
    width = max(1, ones)
    if ones in (1, 8) or any(byte >> 6 != 2 for byte in head[5 : 4 + width]):
        return None
    number = head[4] & (0x7F >> ones)
    for byte in head[5 : 4 + width]:
        number = number << 6 | byte & 0x3F
    code, more = head[2] >> 4, 4 + width
    if code in (6, 7):
        size = 1 + int.from_bytes(head[more : more + code - 5], "big")
        more += code - 5
    else:
        size = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    more += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    crc = 0
    for byte in head[:more]:
        crc = _CRC8[crc ^ byte]
    if more >= len(head) or crc != head[more]:
        return None
    begin = number if head[1] & 1 else number * block
    return (begin, begin + size) if head[1] & 1 or block else None


# MPEG audio: kbit/s by (version 1?, layer) and samples of a frame.
_BITRATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_BITRATES[False, 3] = _BITRATES[False, 2]
_SYNC = re.compile(rb"\xff[\xe2-\xff][\x10-\xeb]")
# Encoders add up to three frames of silence, and decoders may take them away again.
MP3_SLACK_FRAMES = 4


@lru_cache(maxsize=1024)
def _mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """Return (bytes, samples, Hz) of the frame that begins with these three bytes. None: no frame does."""
    version, layer, index, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if head[0] != 0xFF or head[1] < 0xE0 or version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    padding = head[2] >> 1 & 1
    bits = _BITRATES[version == 3, layer][index] * 1000
    size = (12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding
    return size, samples, hertz


def _mp3_flaw(source: BinaryIO, read_s: float, rate_hz: int) -> str | None:
    """Count the frames. Without a Xing header, libsndfile estimates their number from the first of them."""
    source.seek(0)
    data = source.read()
    at, count, samples, lost = _mp3_begin(data), 0, 1152, 0
    while at + 4 <= len(data):
        frame = _mp3_frame(data[at : at + 3])
        if frame is not None and frame[2] == rate_hz:
            count += at + frame[0] <= len(data)
            at, samples = at + frame[0], frame[1]
            continue
        if data[at : at + 3] == b"TAG" or data[at : at + 8] in (b"APETAGEX", b"LYRICSBE"):
            break
        following = _mp3_next(data, at + 1, rate_hz)
        if following is None:
            break
        lost += following - at if count and data[at : at + 3] != b"ID3" else 0
        at = following
    head = data[_mp3_begin(data) :][:200]
    count -= any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))
    there_s, slack_s = count * samples / rate_hz, MP3_SLACK_FRAMES * samples / rate_hz
    if there_s > read_s + slack_s:
        return _longer(read_s, f"its frames hold {there_s:.3f} s")
    if there_s < read_s - slack_s:
        return f"the file is cut off: it promises {read_s:.3f} s, and its frames hold {there_s:.3f} s"
    if lost > 1024:
        return f"{lost} bytes between its frames are no MP3"
    return None


def _mp3_begin(data: bytes) -> int:
    """Return the place behind the ID3 tags at the beginning."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        a, b, c, d = data[at + 6 : at + 10]
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if data[at + 5] & 0x10 else 0)
    return at


def _mp3_next(data: bytes, at: int, rate_hz: int) -> int | None:
    """Return the next place where two frames at this rate stand one after the other."""
    for match in _SYNC.finditer(data, at):
        frame = _mp3_frame(match[0])
        if frame is None or frame[2] != rate_hz:
            continue
        after = match.start() + frame[0]
        following = _mp3_frame(data[after : after + 3]) if after + 3 <= len(data) else None
        if after == len(data) or (following is not None and following[2] == rate_hz):
            return match.start()
    return None

"""Samples from a pipe: a WAV stream, or raw 16-bit PCM.

Guarantees: samples come out as soon as they come in, with the values that a file of them would give. Anything but mono
at the expected rate is refused.
Try: `sox talk.flac -t wav -r 16000 -c 1 - | stillhouse decode RUN -`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..errors import AudioError

READ_BYTES = 1 << 16
UNKNOWN_BYTES = 0x7FFFF000  # A header with this length or more comes from a pipe, and the stream ends the data.
LARGEST_CHUNK = 1 << 26
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
# {(format, bits): the dtype of a sample}. Samples of 24 bits have none.
KINDS = {(PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 24): "", (PCM, 32): "<i4", (FLOAT, 32): "<f4", (FLOAT, 64): "<f8"}


class PcmStream:
    """Mono float32 samples in [-1, 1] of a buffered binary stream. A `raw` one is 16-bit little-endian PCM.

    AudioError names the stream by `where`. It is raised if the header is wrong or samples are not numbers.
    """

    def __init__(self, source: Any, rate_hz: int, *, raw: bool = False, where: str = "stdin") -> None:
        self.source, self.rate_hz, self.where = source, rate_hz, where
        self.format, self.bits = PCM, 16
        self.left: int | None = None  # bytes; None if the stream ends the data
        self.cut_short = False
        if not raw:
            self._header()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield samples as they arrive. A sample that is cut off at the end is left out."""
        size, rest = self.bits // 8, b""
        while self.left is None or self.left > 0:
            data = self.source.read1(READ_BYTES if self.left is None else min(READ_BYTES, self.left))
            if not data:
                break
            if self.left is not None:
                self.left -= len(data)
            data = rest + data
            whole = len(data) // size * size
            rest = data[whole:]
            if whole:
                yield self._samples(data[:whole])
        self.cut_short = bool(self.left) or bool(rest)

    def _samples(self, data: bytes) -> np.ndarray:
        if self.bits == 24:
            padded = np.zeros((len(data) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
        values = np.frombuffer(data, KINDS[self.format, self.bits])
        if self.format == FLOAT:
            if not np.isfinite(values).all():
                raise AudioError("the audio holds samples that are not numbers", where=self.where)
            return values.astype(np.float32)
        if self.bits == 8:
            return (values.astype(np.float32) - 128) / 128
        return (values / 2.0 ** (self.bits - 1)).astype(np.float32)

    def _header(self) -> None:
        remedy = f"sox FILE -t wav -r {self.rate_hz} -c 1 - | stillhouse decode RUN -"
        error = partial(AudioError, where=self.where, remedy=remedy)
        head = self._read(12)
        if not head:
            raise error("the stream is empty")
        if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
            expected = "WAV, or --raw for 16-bit PCM without a header"
            raise error(f"not a WAV stream: it begins with {head!r}", expected=expected)
        fmt = b""
        while True:
            chunk = self._read(8)
            if len(chunk) < 8:
                raise error("the WAV header is cut off")
            name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if name == b"data":
                break
            body = self._read(size + size % 2) if size <= LARGEST_CHUNK else b""
            if len(body) < size:
                raise error(f"the WAV header's chunk {name!r} is cut off")
            if name == b"fmt ":
                fmt = body
        if len(fmt) < 16:
            raise error("the WAV header does not name the format")
        self.format, channels, rate, _, _, self.bits = struct.unpack("<HHIIHH", fmt[:16])
        if self.format == EXTENSIBLE and len(fmt) >= 26:
            self.format = struct.unpack("<H", fmt[24:26])[0]
        narrow = ", with nothing in the upper band of the model" if rate < self.rate_hz else ""
        wrong = [f"{rate} Hz{narrow}"] if rate != self.rate_hz else []
        wrong += [f"{channels} channels"] if channels != 1 else []
        wrong += [f"format {self.format} of {self.bits} bits"] if (self.format, self.bits) not in KINDS else []
        if wrong:
            raise error(f"the audio has {', '.join(wrong)}", expected=f"{self.rate_hz} Hz, 1 channel, PCM or float")
        self.left = size if 0 < size < UNKNOWN_BYTES else None

    def _read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the stream."""
        data = b""
        while len(data) < size and (more := self.source.read1(min(READ_BYTES, size - len(data)))):
            data += more
        return data

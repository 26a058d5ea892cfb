"""The samples of a pipe are those of a file."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.pcm import PcmStream
from stillhouse.data.errors import AudioError


def sound(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples)).astype(np.float32)


class Dribble(io.RawIOBase):
    """Bytes that come a few at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    def read1(self, size: int = -1, /) -> bytes:
        count = min(self.size, size if size >= 0 else self.size)
        found, self.data = self.data[:count], self.data[count:]
        return found


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("extensible", [False, True])
def test_a_wav_stream_has_the_samples_of_the_file(tmp_path: Path, subtype: str, extensible: bool) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(1_001), 16_000, subtype, format="WAVEX" if extensible else "WAV")
    expected, _ = soundfile.read(path, dtype="float32")
    for size in (1, 7, 100_000):
        stream = PcmStream(Dribble(path.read_bytes(), size), 16_000)
        assert np.array_equal(np.concatenate(list(stream)), expected)
        assert not stream.cut_short


def header(data: int = 0, *, kind: int = 1, channels: int = 1, rate: int = 16_000, bits: int = 16) -> bytes:
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits)
    return b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + fmt + b"LIST\x03\0\0\0abc\0data" + struct.pack("<I", data)


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_header_from_a_pipe_has_no_length(length: int) -> None:
    samples = np.arange(-5, 6, dtype="<i2")
    stream = PcmStream(io.BytesIO(header(length) + samples.tobytes() + b"\x01"), 16_000)
    assert np.concatenate(list(stream)).tolist() == [k / 32768 for k in range(-5, 6)]
    assert stream.cut_short  # half a sample


def test_what_follows_the_samples_is_none() -> None:
    samples = np.arange(10, dtype="<i2").tobytes()
    stream = PcmStream(io.BytesIO(header(len(samples)) + samples + b"LIST\x04\0\0\0abcd"), 16_000)
    assert len(np.concatenate(list(stream))) == 10 and not stream.cut_short
    short = PcmStream(io.BytesIO(header(len(samples)) + samples[:9]), 16_000)
    assert len(np.concatenate(list(short))) == 4 and short.cut_short


def test_raw_samples() -> None:
    stream = PcmStream(io.BytesIO(np.array([-32768, 0, 16384], "<i2").tobytes()), 16_000, raw=True)
    assert np.concatenate(list(stream)).tolist() == [-1.0, 0.0, 0.5]


REFUSED = {
    "nothing": (b"", "the stream is empty"),
    "flac": (b"fLaC" + bytes(40), "not a WAV stream"),
    "cut off": (header()[:20], "cut off"),
    "cut off later": (header()[:-2], "cut off"),
    "data first": (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "does not name the format"),
    "short format": (b"RIFF\0\0\0\0WAVEfmt \x02\0\0\0\x01\0data\0\0\0\0", "does not name the format"),
    "44.1 kHz": (header(rate=44_100), "44100 Hz"),
    "stereo": (header(channels=2), "2 channels"),
    "mu-law": (header(kind=7, bits=8), "format 7 of 8 bits"),
    "12 bits": (header(bits=12), "format 1 of 12 bits"),
    "a chunk without end": (b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\xff" + bytes(100), "'junk' is cut off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_stream_is_refused_in_words(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(AudioError, match=words) as e:
        PcmStream(io.BytesIO(data), 16_000)
    assert "sox" in str(e.value)


def test_samples_that_are_not_numbers() -> None:
    data = header(kind=3, bits=32) + np.array([0, np.nan], "<f4").tobytes()
    with pytest.raises(AudioError, match="not numbers"):
        list(PcmStream(io.BytesIO(data), 16_000))


def test_a_pipe_gives_what_is_there(tmp_path: Path) -> None:
    """Two samples were written and the pipe is still open: they come, without waiting for more."""
    out, into = os.pipe()
    with os.fdopen(out, "rb") as reader, os.fdopen(into, "wb", buffering=0) as writer:
        writer.write(header(0xFFFFFFFF) + b"\x00\x40\x00\x20")
        blocks = iter(PcmStream(reader, 16_000))
        assert next(blocks).tolist() == [0.5, 0.25]
        writer.write(b"\x00\xc0")
        assert next(blocks).tolist() == [-0.5]

"""Files that hold less or more than their containers promise. libsndfile reads all of them without an error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.read import open_audio, read_audio, read_channels
from stillhouse.data.audio.whole import flaw_of
from stillhouse.data.errors import AudioError
from stillhouse.data.sources.librispeech import import_librispeech
from stillhouse.data.sources.nemo import import_nemo
from stillhouse.data.sources.table import import_table

FORMATS = {
    "wav": {},
    "float.wav": {"subtype": "FLOAT"},
    "rf64": {"format": "RF64"},
    "w64": {},
    "aiff": {},
    "au": {},
    "caf": {},
    "flac": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {},
}
CUT = [name for name in FORMATS if name != "caf"]  # libsndfile refuses a CAF that is cut


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write 4 s of noise in one of FORMATS."""

    def make(name: str, seconds: float = 4.0, rate_hz: int = 16000, channels: int = 1) -> Path:
        noise = np.random.default_rng(0).standard_normal((round(seconds * rate_hz), channels)) * 0.1
        soundfile.write(tmp_path / f"a.{name}", noise.astype(np.float32), rate_hz, **FORMATS[name])
        return tmp_path / f"a.{name}"

    return make


def flaw(path: Path, *, scan: bool = True) -> str | None:
    with open_audio(path) as file:
        return flaw_of(path, file, scan=scan)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("seconds", "rate_hz", "channels"), [(4.0, 16000, 1), (0.7, 44100, 2), (1.3, 8000, 1)])
def test_whole_files_have_no_flaw(write: Callable, name: str, seconds: float, rate_hz: int, channels: int) -> None:
    path = write(name, seconds, 48000 if name == "opus" and rate_hz == 44100 else rate_hz, channels)
    assert flaw(path) is flaw(path, scan=False) is None


@pytest.mark.parametrize("name", CUT)
def test_half_a_file(write: Callable, name: str) -> None:
    path = write(name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "the file is cut off" in str(flaw(path))
    with pytest.raises(AudioError, match=r"the file is cut off|the audio ends early"):
        read_audio(path)
    # What lies before the cut is read.
    assert len(read_audio(path, 0.25, 0.5)) == 8000
    read_s = soundfile.info(path).duration
    if name not in ("mp3", "flac"):
        assert len(read_channels(path, whole=False)[0]) == round(read_s * 16000)
    if "promises" in str(flaw(path)):
        assert "promises 4.0" in str(flaw(path))


@pytest.mark.parametrize("name", ["ogg", "opus"])
def test_ogg_whose_last_page_is_missing(write: Callable, name: str) -> None:
    path = write(name)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])
    assert "its last page is not the end" in str(flaw(path, scan=False))


@pytest.mark.parametrize("name", ["flac", "ogg", "opus", "mp3", "rf64", "caf"])
def test_two_files_in_one(write: Callable, name: str) -> None:
    path = write(name)
    path.write_bytes(path.read_bytes() * 2)
    assert str(flaw(path)).startswith("only its first 4.0")
    with pytest.raises(AudioError, match="only its first"):
        read_audio(path)


def sized(path: Path, size: int) -> None:
    """Set the size of the data of a WAV file."""
    data = path.read_bytes()
    at = data.index(b"data") + 4
    path.write_bytes(data[:at] + struct.pack("<I", size) + data[at + 4 :])


def test_sizes_that_a_pipe_leaves(write: Callable) -> None:
    path = write("wav")
    for size in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000 + 36, 0x80000000):
        sized(path, size)
        assert flaw(path) is None
        assert len(read_audio(path)) == 64000
    sized(path, 0)
    assert flaw(path) == "its header promises no sound, as a program leaves it that writes to a pipe"


def test_sound_that_the_header_does_not_count(write: Callable) -> None:
    path = write("wav")
    whole = path.read_bytes()
    sized(path, 64000)
    assert str(flaw(path)).startswith("only its first 2.000 s are read: 64000 bytes behind them")
    for behind in (b"LIST\4\0\0\0abcd", b"LIST\4\0\0\0abcdid3 \5\0\0\0abcde\0", b"\0" * 4096, b"xx"):
        path.write_bytes(whole + behind)
        assert flaw(path) is None


def test_mp3_without_a_xing_header(write: Callable) -> None:
    """The bit rate of the first frames is not that of the rest, and libsndfile estimates the length from it."""
    path = write("mp3")
    data = path.read_bytes()
    loud = data[data.index(b"\xff", 200) :]
    noise = np.zeros(16000 * 4, np.float32)
    soundfile.write(path, noise, 16000, bitrate_mode="VARIABLE", compression_level=0.9)
    quiet = path.read_bytes()
    quiet = quiet[quiet.index(b"\xff", 200) :]
    path.write_bytes(loud + quiet)
    with open_audio(path) as file:
        read_s = file.frames / 16000
    assert "only its first" in str(flaw(path)) and read_s < 7
    assert flaw(path, scan=False) is None  # It takes all of the file to see that.
    with pytest.raises(AudioError, match="only its first"):
        read_audio(path)
    # Constant bit rates need no such header, and tags at both ends are none of the sound.
    rng = np.random.default_rng(0)
    soundfile.write(path, 0.1 * rng.standard_normal(64000), 16000, bitrate_mode="CONSTANT", compression_level=0.5)
    constant = path.read_bytes()
    constant = constant[constant.index(b"\xff", 200) :]
    path.write_bytes(b"ID3\4\0\0\0\0\0\x0a" + b"\0" * 10 + constant + b"TAG" + b"\xff\xfb\x90" * 41 + b"xx")
    assert flaw(path) is None


def test_mp3_with_foreign_bytes_in_it(write: Callable) -> None:
    path = write("mp3")
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + b"\x55" * 5000 + data[middle:])
    assert "bytes between its frames are no MP3" in str(flaw(path))


def test_flac_of_unknown_length(write: Callable) -> None:
    path = write("flac")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(AudioError, match="its header does not state its length"):
        read_audio(path)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100])
def test_flac_that_states_less_than_it_holds(write: Callable, rate_hz: int) -> None:
    path = write("flac", 4.0, rate_hz, 2)
    data = bytearray(path.read_bytes())
    data[22:26] = struct.pack(">I", 2 * rate_hz)
    path.write_bytes(data)
    assert str(flaw(path, scan=False)).startswith("only its first 2.000 s are read: its frames hold 4.000 s")


def test_heads_that_are_nonsense(write: Callable) -> None:
    """Bytes that are changed by chance give some answer or none, and no error."""
    rng = np.random.default_rng(0)
    for name in FORMATS:
        path = write(name, 0.5)
        data = path.read_bytes()
        for size in (13, 30, 60, 200, len(data)):
            for _ in range(20):
                changed = bytearray(data[:size])
                for k in rng.integers(4, max(5, min(size, 100)), 3):
                    changed[min(k, size - 1)] = rng.integers(256)
                path.write_bytes(changed)
                for frames in (0, 8000):
                    file = SimpleNamespace(format=name.upper(), frames=frames, samplerate=16000)
                    found = flaw_of(path, file)  # type: ignore[arg-type]
                    assert found is None or isinstance(found, str)


def test_imports_name_half_a_file(write: Callable, tmp_path: Path) -> None:
    path = write("wav")
    path.write_bytes(path.read_bytes()[:64044])
    (tmp_path / "t.csv").write_text("id,audio,text,end\nwhole,a.wav,x,\ninside,a.wav,x,1.5\n")
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav", "text": "x"}\n')
    (tmp_path / "1" / "2").mkdir(parents=True)
    (tmp_path / "1" / "2" / "1-2-0.wav").write_bytes(path.read_bytes())
    (tmp_path / "1" / "2" / "1-2.trans.txt").write_text("1-2-0 WORDS\n")
    table = import_table(tmp_path / "t.csv", tmp_path / "c.jsonl")
    assert [u.id for u in table.utterances] == ["inside"]
    nemo = import_nemo([(None, tmp_path / "m.json")], tmp_path / "c.jsonl")
    tree = import_librispeech(tmp_path / "1", tmp_path / "c.jsonl")
    for result in (table, nemo, tree):
        assert [(f.kind, "promises 4.000 s, and 2.000 s can be read" in f.what) for f in result.findings] == [
            ("audio", True)
        ]


@pytest.mark.parametrize("name", ["flac", "mp3", "ogg", "opus", "wav"])
def test_whole_files_of_any_length(tmp_path: Path, name: str) -> None:
    """Silence makes the smallest frames, and a few samples behind a frame the smallest last one."""
    rng = np.random.default_rng(0)
    for count in (400, 1152, 4096, 4097, 16001, 48000):
        for samples in (np.zeros(count), 0.1 * rng.standard_normal(count)):
            soundfile.write(tmp_path / f"a.{name}", samples, 16000, **FORMATS[name])
            assert flaw(tmp_path / f"a.{name}") is None


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_segments_of_mp3_are_those_of_the_whole(tmp_path: Path, mode: str) -> None:
    """A frame borrows bits from those before it. After a jump, the first frames would sound of something else."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(16000)
    samples = np.concatenate(
        [0 * noise, 0.3 * noise, 0 * noise, 0.1 * noise, np.sin(np.arange(16000) / 9) / 2, 0.2 * noise]
    )
    path = tmp_path / "a.mp3"
    soundfile.write(path, samples, 16000, bitrate_mode=mode, compression_level=0.5)
    whole = read_audio(path)
    for start_s in (0.0, 0.01, 0.5, 1.0, 1.3, 2.0, 3.05, 3.7, 4.9, 5.4):
        at = round(start_s * 16000)
        np.testing.assert_allclose(read_audio(path, start_s, 0.5), whole[at : at + 8000], atol=1e-5)

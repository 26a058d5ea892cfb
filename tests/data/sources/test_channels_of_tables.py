"""Channels of all importers: how a recording's sides are named, and the audio that is read for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.channels import ChannelNames
from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import AudioError
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.kaldi import import_kaldi
from stillhouse.data.sources.lhotse import import_lhotse

from .test_columns import Tone, csv_of, every, huggingface_of, nemo_of


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("A", "B"), (0, 1)),
        (("1", "2"), (0, 1)),
        (("0", "1"), (0, 1)),
        (("left", "Right"), (0, 1)),
        (("channel_1", "ch2"), (0, 1)),
        (("mix", ""), (None, None)),
    ],
)
def test_names_of_channels(names: tuple[str, str], expected: tuple) -> None:
    assert tuple(ChannelNames(names).channel(name, 2) for name in names) == expected
    assert {ChannelNames(names).channel(name, 1) for name in names} == {None}


def test_names_of_channels_that_cannot_be() -> None:
    with pytest.raises(AudioError, match="whether channels count from 0 or from 1"):
        ChannelNames(["1", "1"]).channel("1", 2)
    assert ChannelNames(["1", "1"], ones=1).channel("1", 2) == 0
    with pytest.raises(AudioError, match="no channel C: the audio has 2"):
        ChannelNames(["C"]).channel("C", 2)
    with pytest.raises(AudioError, match="no channel 0"):
        ChannelNames([], first=1).channel("0", 2)
    with pytest.raises(AudioError, match="the channel is 'BBC'"):
        ChannelNames(["BBC"]).channel("BBC", 2)
    assert not ChannelNames(["A", "BBC"]).known


@pytest.fixture
def call(tmp_path: Path) -> Path:
    """A call: the left side is at 0.25, the right one at -0.5."""
    soundfile.write(tmp_path / "call.wav", np.tile([0.25, -0.5], (16000, 1)), 8000)
    return tmp_path


def heard(folder: Path, result: Imported) -> dict[str, float]:
    """The level that each utterance is read with, at the place that the manifest gives."""
    assert result.findings == []
    levels = {}
    for u in result.utterances:
        samples = read_audio(folder / str(u.audio), u.start_s, u.duration_s, 8000, u.channel)
        levels[u.id] = float(samples.mean())
    return levels


@every
@pytest.mark.parametrize("names", [("A", "B"), ("left", "right"), (1, 2), (0, 1)])
def test_a_stereo_call_by_channel(call: Path, importer: Callable, names: tuple) -> None:
    if importer is huggingface_of and isinstance(names[0], int):
        names = tuple(map(int, names))
    rows = [{"id": f"u{k}", "audio": "call.wav", "channel": name, "text": "x"} for k, name in enumerate(names)]
    assert heard(call, importer(call, rows)) == {"u0": 0.25, "u1": -0.5}
    # Both sides of one segment get ids of their own from the file.
    own = [{name: value for name, value in row.items() if name != "id"} | {"start": 0.0, "end": 1.0} for row in rows]
    result = importer(call, own)
    assert sorted(heard(call, result).values()) == [-0.5, 0.25]


@every
def test_stereo_without_a_channel_is_said(call: Path, importer: Callable) -> None:
    result = importer(call, [{"id": "u", "audio": "call.wav", "text": "x"}])
    assert heard(call, result) == {"u": -0.125}
    assert any("no channel is named for 1 files with several channels" in note for note in result.notes)


def test_a_column_called_channel_that_names_broadcasters(call: Path) -> None:
    rows = [{"id": "u", "audio": "call.wav", "channel": "BBC Two", "text": "x"}]
    for result in (csv_of(call, rows), huggingface_of(call, rows)):
        assert result.utterances[0].meta == {"channel": "BBC Two"}
    assert "the channel is 'BBC Two'" in csv_of(call, rows, channel="channel").findings[0].what


def test_nemo_channel_selector(call: Path) -> None:
    rows = [{"id": f"u{k}", "audio": "call.wav", "channel_selector": k, "text": "x"} for k in (1, "average", [0, 1])]
    assert heard(call, nemo_of(call, rows)) == {"u1": -0.5, "uaverage": -0.125, "u[0, 1]": -0.125}


@pytest.mark.parametrize("sides", [("A", "B"), ("1", "2"), ("0", "1")])
@pytest.mark.parametrize("with_segments", [True, False])
def test_kaldi_reco2file_and_channel(call: Path, sides: tuple[str, str], with_segments: bool) -> None:
    data = call / "data"
    data.mkdir()
    recordings = [f"call-{side}" for side in sides]
    (data / "wav.scp").write_text("".join(f"{r} {call}/call.wav\n" for r in recordings))
    (data / "reco2file_and_channel").write_text("".join(f"{r} call {s}\n" for r, s in zip(recordings, sides)))
    names = recordings
    if with_segments:
        names = [f"{r}-1" for r in recordings]
        (data / "segments").write_text("".join(f"{n} {r} 0 1\n" for n, r in zip(names, recordings)))
    (data / "text").write_text("".join(f"{n} words\n" for n in names))
    result = import_kaldi([(None, data)], call / "corpus.jsonl")
    assert heard(call, result) == dict(zip(names, (0.25, -0.5)))
    assert {u.session for u in result.utterances} == {"call"}
    # A file without the side is a finding, and so is a pipe that takes another one.
    (data / "reco2file_and_channel").write_text(f"{recordings[0]} call C\n{recordings[1]} call {sides[0]}\n")
    (data / "wav.scp").write_text(
        f"{recordings[0]} {call}/call.wav\n{recordings[1]} sox {call}/call.wav -t wav - remix 2 |\n"
    )
    bad = import_kaldi([(None, data)], call / "corpus.jsonl")
    whats = " ".join(f.what for f in bad.findings)
    assert "no channel C" in whats
    assert "the pipe takes channel 1" in whats


@pytest.mark.parametrize(("names", "expected"), [("01", (0.25, -0.5)), ("12", (0.25, -0.5)), ("11", (-0.5, -0.5))])
def test_kaldi_segments_with_a_channel(call: Path, names: str, expected: tuple[float, float]) -> None:
    data = call / "data"
    data.mkdir()
    soundfile.write(call / "mono.wav", np.full(16000, 0.5), 8000)
    (data / "wav.scp").write_text(f"r {call}/call.wav\nm {call}/mono.wav\n")
    (data / "text").write_text("u0 x\nu1 y\n")
    (data / "segments").write_text("".join(f"u{k} r 0 1 {name}\n" for k, name in enumerate(names)))
    result = import_kaldi([(None, data)], call / "corpus.jsonl")
    assert heard(call, result) == dict(zip(("u0", "u1"), expected))
    (data / "segments").write_text("u0 r 0 1 0\nu1 m 0 1 1\n")  # The second file has no such channel.
    bad = import_kaldi([(None, data)], call / "corpus.jsonl")
    assert [(f.kind, f.id, "no channel 1" in f.what) for f in bad.findings] == [("audio", "u1", True)]


def test_kaldi_sides_of_mono_files_stay_files(tmp_path: Path, tone: Tone) -> None:
    for side in "AB":
        tone(tmp_path / f"{side}.wav", 1.0)
    data = tmp_path / "data"
    data.mkdir()
    (data / "wav.scp").write_text(f"r-A {tmp_path}/A.wav\nr-B {tmp_path}/B.wav\n")
    (data / "reco2file_and_channel").write_text("r-A r A\nr-B r B\n")
    (data / "text").write_text("r-A x\nr-B y\n")
    result = import_kaldi([(None, data)], tmp_path / "corpus.jsonl")
    assert ([u.channel for u in result.utterances], result.findings) == ([None, None], [])


def test_lhotse_channels_and_an_end_that_differs(call: Path) -> None:
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0, 1], "source": str(call / "call.wav")}]}
    supervision = {"recording_id": "r", "start": 0.0, "duration": 1.0, "text": "x"}
    (call / "r.jsonl").write_text(json.dumps({**recording, "sampling_rate": 8000, "num_samples": 16000}) + "\n")
    rows = [{**supervision, "id": f"u{k}", "channel": k} for k in (0, 1)] + [
        {**supervision, "id": "m", "channel": [0, 1]}
    ]
    (call / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = import_lhotse([(None, call / "r.jsonl"), (None, call / "s.jsonl")], call / "corpus.jsonl")
    assert heard(call, result) == {"u0": 0.25, "u1": -0.5, "m": -0.125}

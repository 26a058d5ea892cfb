"""Kaldi data directories: with and without segments, pipes, archives and errors."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import AudioError, CorpusError
from stillhouse.data.manifest import Corpus, write_manifest
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.entries.archives import audio_in_archive
from stillhouse.data.sources.entries.pipes import Decoded, decoded_file, run_command
from stillhouse.data.sources.kaldi import import_kaldi, joined
from stillhouse.data.sources.librispeech import import_librispeech

Tone = Callable[..., Path]


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_scp", ".scp")).write_text(text, encoding="utf-8")
    return folder


def places(result: Imported) -> list[tuple[str, str, str | None]]:
    return [(f.kind, f"{Path(f.file).name}:{f.line}", f.id) for f in result.findings]


@pytest.mark.parametrize(
    ("command", "read"),
    [
        ("flac -c -d -s a/b.flac", Decoded("a/b.flac")),
        ("/usr/bin/flac -cds 'a b.flac'", Decoded("a b.flac")),
        ("flac --decode --stdout --silent a.flac 2>/dev/null", Decoded("a.flac")),
        ("sox a.flac -t wav -", Decoded("a.flac")),
        ("sox -t flac a.flac -t wav -r 16k -c 1 -b 16 - remix 2", Decoded("a.flac", 1, 16000)),
        ("sox a.wav -r 8000 -t wav - channels 1", Decoded("a.wav", None, 8000)),
        ("sph2pipe -f wav -p -c 2 sw.sph", Decoded("sw.sph", 1)),
        ("ffmpeg -nostdin -i x.m4a -f wav -ar 16000 -ac 1 pipe:1", Decoded("x.m4a", None, 16000)),
        ("cat x.wav", Decoded("x.wav")),
        ("sox -q a.flac -b 16 -t wav - rate -v 16k remix -", Decoded("a.flac", None, 16000)),
        ("ffmpeg -v error -i x.m4a -vn -f wav -c:a pcm_s16le -", Decoded("x.m4a")),
        ("opusdec --force-wav --quiet x.opus -", None),
        ("lame --decode x.mp3 -", None),
        ("flac -c -d -s a.flac b.flac", None),
        ("flac -c -s a.wav", None),  # encodes
        ("sox a.wav -t wav - speed 1.1", None),
        ("sox -v 0.5 a.wav -t wav -", None),
        ("sox -t raw -r 8000 -e signed -b 16 a.raw -t wav -", None),
        ("sox a.wav b.wav -t wav -", None),
        ("sox a.wav -t wav - remix 1 2", None),
        ("sox a.wav -t wav - remix", None),
        ("sox a.wav -t wav - remix 0", None),
        ("sox a.wav -t wav", None),
        ("sox a.wav -r 8000 -", None),
        ("sox a.wav -c 2 -t wav -", None),
        ("sox -G a.wav -t wav -", None),
        ("sox a.wav -t raw -", None),
        ("sph2pipe -f wav -t 1:2 a.sph", None),
        ("sph2pipe -c 3 a.sph", None),
        ("ffmpeg -i a.wav -ss 5 -f wav -", None),
        ("ffmpeg -i - -f wav -", None),
        ("cat -", None),
        ("ffmpeg -i http://x/a.wav -f wav -", None),
        ("cat a.wav; rm -rf b", None),
        ("cat $(touch b)", None),
        ("cat `touch b`", None),
        ("cat a.wav | sox - -t wav -", None),
        ("cat 'a", None),
        ("", None),
        ("rm -rf /", None),
    ],
)
def test_pipes_that_only_decode_are_known(command: str, read: Decoded | None) -> None:
    assert decoded_file(command) == read


def test_without_segments(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "wav" / "a b.flac", 0.5)
    tone(tmp_path / "wav" / "b.wav", 0.75, channels=2)
    tone(tmp_path / "wav" / "c.wav", 1.0)
    folder = write(
        tmp_path / "egs" / "data" / "train",
        wav_scp=f"a flac -c -d -s '{tmp_path}/wav/a b.flac' |\nb sox ../wav/b.wav -t wav - remix 2 |\n"
        "c\t../wav/c.wav\n",
        text="a  hello\u00a0there  you\nc C\nb B  \n",
        utt2spk="a s1\nb s1\nc s2\n",
        spk2gender="s1 f\n",
        utt2lang="a en\n",
        utt2dur="a 0.5\nb 0.75\nc 2.0\n",
    )
    manifest = tmp_path / "out" / "corpus.jsonl"
    result = import_kaldi([(None, folder)], manifest)
    assert result.findings == []
    a, b, c = result.utterances
    assert (a.text, a.speaker, a.split, a.duration_s, a.meta) == (
        "hello\u00a0there  you", "s1", "train", 0.5, {"gender": "f", "lang": "en"},
    )  # fmt: skip
    assert (b.channel, c.channel, b.audio) == (1, None, "../wav/b.wav")
    assert {u.session for u in result.utterances} == {None}
    assert any("utt2dur" in n and "for example c" in n for n in result.notes)
    stereo, _ = soundfile.read(tmp_path / "wav" / "b.wav", dtype="float32")
    write_manifest(manifest, result.utterances)
    corpus = Corpus(manifest, result.utterances)
    np.testing.assert_array_equal(read_audio(corpus.audio_path(b), channel=b.channel), stereo[:, 1])
    with pytest.raises(AudioError, match="no channel 2: the audio has 2"):
        read_audio(corpus.audio_path(b), channel=2)


def test_segments_are_sessions_in_the_order_of_time(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "call.wav", 12.0, channels=2)
    tone(tmp_path / "talk.wav", 3.0)
    folder = write(
        tmp_path / "data",
        wav_scp=f"call-A sph2pipe -f wav -p -c 1 {tmp_path}/call.wav |\n"
        f"call-B sph2pipe -f wav -p -c 2 {tmp_path}/call.wav |\n"
        f"talk {tmp_path}/talk.wav\n",
        reco2file_and_channel="call-A call A\ncall-B call B\n",
        segments="A-1 call-A 0.0 1.5\nA-2 call-A 10.0 11.25\nB-1 call-B 2 3\nt-1 talk 0.5 -1\nt-2 talk 0 3.4 0\n",
        text="A-1 one\nA-2 three\nB-1 two\nt-1 later\nt-2 first\n",
    )
    result = import_kaldi([("test", folder)], tmp_path / "c.jsonl")
    assert result.findings == []
    assert [(u.id, u.session, u.start_s, u.duration_s, u.channel) for u in result.utterances] == [
        ("A-1", "call", 0.0, 1.5, 0),
        ("B-1", "call", 2.0, 1.0, 1),
        ("A-2", "call", 10.0, 1.25, 0),
        ("t-2", "talk", 0.0, 3.0, 0),
        ("t-1", "talk", 0.5, 2.5, None),
    ]
    assert {u.split for u in result.utterances} == {"test"}
    assert any("end with it" in n for n in result.notes)
    write_manifest(tmp_path / "c.jsonl", result.utterances)


def test_what_is_wrong_is_found(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "a.wav", 2.0)
    (tmp_path / "bad.wav").write_text("no audio")
    folder = write(
        tmp_path / "data",
        wav_scp=f"a {tmp_path}/a.wav\nbad {tmp_path}/bad.wav\ngone {tmp_path}/gone.wav\n"
        f"sh curl http://x | sox - -t wav - |\nempty\na {tmp_path}/a.wav\n",
        segments="u1 a 0 1\nu2 a 1 1\nu3 a 1.5 9\nu4 a x 2\nu5 a 1\nu6 bad 0 1\nu7 gone 0 1\nu8 sh 0 1\nu9 none 0 1\n"
        "u10 empty 0 1\nu11 a 0 1\nu1 a 1 2\nu12 a nan 2\nu13 a 0 1e400\nu15 a 0 1 x\n",
        text="".join(f"u{k} word\n" for k in (*range(1, 11), 12, 13, 14, 15)),
    )
    with (folder / "text").open("ab") as file:
        file.write("u11 Straße\n".encode("latin-1"))
    result = import_kaldi([(None, folder)], tmp_path / "c.jsonl")
    assert [u.id for u in result.utterances] == ["u1"]
    assert places(result) == [
        ("encoding", "text:15", None),
        ("duplicate-id", "wav.scp:6", "a"),
        ("segment", "segments:2", "u2"),
        ("segment", "segments:3", "u3"),
        ("line", "segments:4", "u4"),
        ("line", "segments:5", "u5"),
        ("audio", "segments:6", "u6"),
        ("audio", "segments:7", "u7"),
        ("audio", "segments:8", "u8"),
        ("line", "segments:9", "u9"),
        ("audio", "segments:10", "u10"),
        ("missing", "segments:11", "u11"),
        ("duplicate-id", "segments:12", "u1"),
        ("segment", "segments:13", "u12"),
        ("segment", "segments:14", "u13"),
        ("line", "segments:15", "u15"),
        ("missing", "text:13", "u14"),
    ]
    by_id = {f.id: f for f in result.findings}
    assert "--allow-pipes" in by_id["u8"].remedy and "curl http://x | sox" in by_id["u8"].what
    assert all(f.remedy for f in result.findings)
    for lacking, match in ((tmp_path, "no text in it"), (tmp_path / "none", "no wav.scp beside a text")):
        (tmp_path / "wav.scp").write_text("")
        with pytest.raises(CorpusError, match=match):
            import_kaldi([(None, lacking)], tmp_path / "c.jsonl")


def test_pipes_run_only_when_allowed(tmp_path: Path, tone: Tone) -> None:
    path = tone(tmp_path / "a.wav", 0.5)
    marker = tmp_path / "ran"
    folder = write(
        tmp_path / "data",
        wav_scp=f"a touch {marker}; cat {path} |\nbad exit 3 |\nslow echo no audio |\nnothing true |\n",
        text="a A\nbad B\nslow C\nnothing D\n",
    )
    manifest = tmp_path / "corpus.jsonl"
    refused = import_kaldi([(None, folder)], manifest)
    assert refused.utterances == [] and not marker.exists()
    assert {f.id for f in refused.findings} == {"a", "bad", "slow", "nothing"}
    ran = import_kaldi([(None, folder)], manifest, allow_pipes=True)
    assert marker.exists()
    assert [f.id for f in ran.findings] == ["bad", "slow", "nothing"], ran.findings
    assert "code 3" in ran.findings[0].what
    (u,) = ran.utterances
    np.testing.assert_array_equal(read_audio(tmp_path / u.audio), read_audio(path))
    assert [p.suffix for p in (tmp_path / "corpus.audio").iterdir()] == [".wav"]
    marker.unlink()
    assert import_kaldi([(None, folder)], manifest, allow_pipes=True).utterances == [u]
    assert not marker.exists()  # what was written is used again
    with pytest.raises(AudioError, match=r"more than 0\.2 s"):
        run_command("sleep 30", tmp_path / "t.wav", timeout_s=0.2)
    assert not list(tmp_path.glob("t.wav*"))


def test_a_decoder_of_what_we_cannot_read_runs_when_allowed(
    tmp_path: Path, tone: Tone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sph2pipe knows a compression that libsndfile does not; here it is a script that gives away a WAV."""
    path = tone(tmp_path / "a.wav", 0.5)
    (tmp_path / "call.sph").write_bytes(b"NIST_1A shorten")
    script = tmp_path / "bin" / "sph2pipe"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ncat {path}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    command = f"sph2pipe -f wav -p -c 1 {tmp_path}/call.sph |"
    folder = write(tmp_path / "data", wav_scp=f"a {command}\n", text="a A\n")
    refused = import_kaldi([(None, folder)], tmp_path / "c.jsonl")
    assert refused.utterances == [] and "--allow-pipes" in refused.findings[0].remedy
    (u,) = import_kaldi([(None, folder)], tmp_path / "c.jsonl", allow_pipes=True).utterances
    assert u.channel is None
    np.testing.assert_array_equal(read_audio(tmp_path / u.audio), read_audio(path))


def test_a_tree_of_folders_splits_and_speakers(tmp_path: Path, tone: Tone, monkeypatch: pytest.MonkeyPatch) -> None:
    tone(tmp_path / "s5" / "wav" / "x.wav", 0.5)
    for name in ("train", "dev"):
        write(
            tmp_path / "s5" / "data" / name,
            wav_scp=f"{name}-1 wav/x.wav\n",
            text=f"{name}-1 X\n",
            utt2spk=f"{name}-1 {name}-1\n",
        )
    shutil.copytree(tmp_path / "s5" / "data" / "train", tmp_path / "s5" / "data" / "train" / "split2" / "1")
    write(tmp_path / "s5" / "data" / "local", wav_scp="x wav/x.wav\n")
    monkeypatch.chdir(tmp_path / "s5" / "data")
    result = import_kaldi([(None, tmp_path / "s5" / "data")], tmp_path / "c.jsonl")
    assert [(u.id, u.split, u.speaker, u.audio) for u in result.utterances] == [
        ("dev-1", "dev", None, "s5/wav/x.wav"),
        ("train-1", "train", None, "s5/wav/x.wav"),
    ]
    assert any("the speakers are unknown" in n for n in result.notes)
    assert any("local is left out: no text" in n for n in result.notes) and result.findings == []
    (tmp_path / "s5" / "data" / "dev" / "utt2spk").unlink()
    (tmp_path / "s5" / "data" / "dev" / "spk2utt").write_text("me dev-1 dev-2\n")
    one = import_kaldi([("x", tmp_path / "s5" / "data" / "dev")], tmp_path / "c.jsonl", audio_root=tmp_path / "s5")
    assert [(u.split, u.speaker) for u in one.utterances] == [("x", "me")]


def test_the_root_holds(tmp_path: Path, tone: Tone) -> None:
    inside = tone(tmp_path / "held" / "in.wav", 0.5)
    outside = tone(tmp_path / "out.wav", 0.5)
    os.symlink(outside, tmp_path / "held" / "link.wav")
    folder = write(
        tmp_path / "held" / "data",
        wav_scp=f"ok {inside}\nabs {outside}\nup ../../out.wav\nlink {tmp_path}/held/link.wav\npipe cat {outside} |\n",
        text="ok 1\nabs 2\nup 3\nlink 4\npipe 5\n",
    )
    result = import_kaldi([(None, folder)], tmp_path / "held" / "c.jsonl", root=tmp_path / "held")
    assert [u.id for u in result.utterances] == ["ok"]
    assert [f.id for f in result.findings] == ["abs", "up", "link", "pipe"]
    assert all("out of the root" in f.what for f in result.findings)


def test_audio_in_archives(tmp_path: Path, tone: Tone) -> None:
    one, two = (tone(tmp_path / f"{k}.wav", 0.3 + k / 10).read_bytes() for k in (1, 2))
    flac = tone(tmp_path / "f.flac", 0.3).read_bytes()
    data, entries = b"", []
    framed = b"AUDIO\2" + struct.pack("<H", len(flac)) + flac  # as kaldiio's write_function="soundfile" has it
    broken = b"AUDIO\4" + struct.pack("<I", 1 << 31) + flac
    for name, content in (
        ("one", one), ("two", two), ("framed", framed), ("flac", flac), ("matrix", b"\0BFM \4"), ("broken", broken),
        ("cut", one[:5000]),
    ):  # fmt: skip
        data += name.encode() + b" "
        entries.append(f"{name} {tmp_path}/data.ark:{len(data)}")
        data += content
    (tmp_path / "data.ark").write_bytes(data)
    text = "".join(f"{e.split()[0]} W\n" for e in entries) + "far W\n"
    folder = write(
        tmp_path / "dump", wav_scp="\n".join([*entries, f"far {tmp_path}/data.ark:99999999"]) + "\n", text=text
    )
    result = import_kaldi([(None, folder)], tmp_path / "corpus.jsonl")
    assert [u.id for u in result.utterances] == ["one", "two", "framed"]
    assert [(tmp_path / u.audio).read_bytes() for u in result.utterances] == [one, two, flac]
    assert [Path(u.audio).suffix for u in result.utterances] == [".wav", ".wav", ".flac"]
    bad = ("flac", "matrix", "broken", "cut", "far")
    assert [(f.id, f.kind) for f in result.findings] == [(i, "audio") for i in bad]
    assert "no audio at that place" in result.findings[0].what and "Kaldi matrix" in result.findings[1].what
    assert "ends before" in result.findings[2].what
    (tmp_path / "x.ark").write_bytes(b"a RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVE")
    with pytest.raises(AudioError, match="length of the WAV in the archive is unknown"):
        audio_in_archive(tmp_path / "x.ark", 2)


def test_pieces() -> None:
    assert joined("▁HE LL O ▁WORLD") == "HELLO WORLD"
    assert joined("H I <space> Y O U") == "HI YOU"


def test_librispeech_as_kaldi_has_it(corpora: Path, tmp_path: Path) -> None:
    """The layout of Kaldi's own recipe: speakers are chapters, FLAC behind a pipe."""
    subset = corpora / "librispeech-subset"
    direct = {u.id: u for u in import_librispeech(subset, tmp_path / "c.jsonl").utterances}
    lines: dict[str, list[str]] = {"wav_scp": [], "text": [], "utt2spk": []}
    for id in sorted(direct):
        u = direct[id]
        lines["wav_scp"].append(f"{id} flac -c -d -s {(tmp_path / u.audio).resolve()} |")
        lines["text"].append(f"{id} {u.text}")
        lines["utt2spk"].append(f"{id} {u.session}")
    folder = write(tmp_path / "data" / "all", **{name: "\n".join(rows) + "\n" for name, rows in lines.items()})
    pattern = r"(?P<session>\d+-\d+)-(?P<order>\d+)"
    result = import_kaldi([(None, folder)], tmp_path / "c.jsonl", session_pattern=pattern)
    assert result.findings == []
    assert len(result.utterances) == 715
    for u in result.utterances:
        same = direct[u.id]
        assert (u.text, u.duration_s, u.session) == (same.text, same.duration_s, same.session)
        assert (tmp_path / u.audio).resolve() == (tmp_path / same.audio).resolve()
    chapters = [[k for k in s] for s in Corpus(tmp_path / "c.jsonl", result.utterances).sessions()]
    ids = [[result.utterances[k].id for k in c] for c in chapters]
    assert all(c == sorted(c) for c in ids)

"""NeMo, Lhotse, Hugging Face and ESPnet: on files that their own libraries wrote, and on what may be wrong in them.

tests/data/peers holds such files (peers/make.py wrote them); where the libraries are installed, they write more here.
"""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import ConfigError, CorpusError
from stillhouse.data.manifest import Corpus
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.huggingface import import_huggingface
from stillhouse.data.sources.kaldi import import_kaldi
from stillhouse.data.sources.lhotse import import_lhotse
from stillhouse.data.sources.librispeech import import_librispeech
from stillhouse.data.sources.nemo import import_nemo

Tone = Callable[..., Path]
PEERS = Path(__file__).parents[1] / "peers"


def installed(*names: str) -> None:
    for name in names:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'stillhouse[peers]'")


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PEERS, tmp_path / "peers"))


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def found(result: Imported) -> list[tuple[str, int | None, str | None]]:
    assert all(f.remedy and f.what for f in result.findings)
    return [(f.kind, f.line, f.id) for f in result.findings]


# NeMo


def test_nemo_whole_files_and_parts(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "m" / "wav" / "a.wav", 0.5)
    tone(tmp_path / "m" / "wav" / "x" / "b.wav", 0.5)
    tone(tmp_path / "m" / "wav" / "y" / "b.wav", 0.5)
    tone(tmp_path / "m" / "long.wav", 10.0)
    whole = jsonl(
        tmp_path / "m" / "train.json",
        {"audio_filepath": "wav/a.wav", "duration": 0.5, "text": "one", "speaker": 3, "lang": "en", "tags": ["x"]},
        {"audio_filepath": "./wav/x/b.wav", "text": "two", "offset": None, "duration": None},
        {"audio_filepath": str(tmp_path / "m" / "wav" / "y" / "b.wav"), "duration": 0.25, "text": "", "snr": 1.5},
    )
    parts = jsonl(
        tmp_path / "m" / "dev.json.gz",
        {"audio_filepath": "long.wav", "offset": 5.0, "duration": 2.0, "text": "later"},
        {"audio_filepath": "long.wav", "offset": 0.25, "duration": 2.0, "text": "first", "utt_id": "named"},
    )
    manifest = tmp_path / "c.jsonl"
    result = import_nemo([("train", whole)], manifest)
    assert result.findings == []
    y = f"{tmp_path}/m/wav/y/b".strip("/")
    assert [(u.id, u.text, u.duration_s, u.session, u.speaker, u.split) for u in result.utterances] == [
        ("a", "one", 0.5, None, "3", "train"),
        ("wav/x/b", "two", 0.5, None, None, "train"),
        (y, "", 0.25, None, None, "train"),
    ]
    assert [u.meta for u in result.utterances] == [{"lang": "en"}, {}, {"snr": "1.5"}]
    assert any("tags is left out" in n for n in result.notes)
    shared = import_nemo([(None, parts)], manifest)
    assert [(u.id, u.start_s, u.duration_s, u.session) for u in shared.utterances] == [
        ("named", 0.25, 2.0, "long"),
        ("long-00005000", 5.0, 2.0, "long"),
    ]
    corpus = Corpus(manifest, shared.utterances)
    assert len(read_audio(corpus.audio_path(shared.utterances[1]), 5.0, 2.0)) == 32000


def test_nemo_lines_that_cannot_be(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "a.wav", 0.5)
    good = {"audio_filepath": "a.wav", "text": "x"}
    source = jsonl(
        tmp_path / "m.json",
        good,
        "{",
        "[1]",
        {**good, "audio_filepath": None},
        {**good, "text": None},
        {**good, "audio_filepath": "gone.wav"},
        {**good, "offset": 9},
        {**good, "duration": "long"},
        {**good, "offset": -1},
        {**good, "duration": float("nan")},
        good,
        {**good, "audio_filepath": ""},
        {**good, "audio_filepath": "a\0.wav"},
        {**good, "id": " "},
        '{"audio_filepath": "a.wav", "text": "\\ud800", "id": "half"}',
        {**good, "shard_id": 0, "id": "tarred"},
        "[" * 100_000,
        {**good, "id": "big", "duration": 10**400},
    )
    with source.open("ab") as file:
        file.write(b'{"audio_filepath": "a.wav", "text": "\xff"}\n')
    result = import_nemo([(None, source)], tmp_path / "c.jsonl")
    assert [u.id for u in result.utterances] == ["a"]
    kinds = {f.line: f.kind for f in result.findings}
    assert kinds == {
        2: "line", 3: "line", 4: "line", 5: "line", 6: "audio", 7: "segment", 8: "line", 9: "segment", 10: "line",
        11: "duplicate-id", 12: "line", 13: "audio", 14: "line", 15: "line", 16: "audio", 17: "line", 18: "line",
        19: "encoding",
    }  # fmt: skip
    assert all(f.remedy and Path(f.file) == source for f in result.findings)


# Lhotse


WRITTEN = ["cuts.jsonl.gz", "trimmed.jsonl", "windows.jsonl.gz", "supervisions.jsonl.gz recordings.jsonl.gz"]


@pytest.mark.parametrize("files", [names.split() for names in WRITTEN])
def test_lhotse_however_it_is_written(peers: Path, files: list[str]) -> None:
    facts = json.loads((peers / "audio" / "facts.json").read_text())
    manifest = peers / "corpus.jsonl"
    result = import_lhotse([("dev", peers / "lhotse" / f) for f in files], manifest)
    assert result.findings == []
    turn = facts["left"] / 8000
    assert [(u.id, u.text, u.start_s, u.channel, u.session, u.speaker, u.split) for u in result.utterances] == [
        ("one-1", "The kettle sings.", 0.0, None, "one", "anna", "dev"),
        ("talk-a", "Is it raining?", 0.0, 0, "talk", "ben", "dev"),
        ("talk-b", "Not yet, I think.", turn, 1, "talk", "clara", "dev"),
    ]
    assert [u.meta for u in result.utterances] == [
        {"language": "en", "gender": "F"}, {"language": "en"}, {"language": "en", "topic": "weather"},
    ]  # fmt: skip
    # Each speaker is alone on a channel and in time: the texts that were spoken are those that are read.
    talk, _ = soundfile.read(peers / "audio" / "talk.flac", dtype="float32")
    corpus = Corpus(manifest, result.utterances)
    for u, (begin, end, channel) in zip(
        result.utterances[1:], [(0, facts["left"], 0), (facts["left"], len(talk), 1)], strict=True
    ):
        samples = read_audio(corpus.audio_path(u), u.start_s, u.duration_s, 8000, u.channel)
        np.testing.assert_array_equal(samples, talk[begin:end, channel])
        assert np.abs(samples).max() > 0.05
    assert ("supervisions that several cuts show are imported once" in result.notes) == (files == ["windows.jsonl.gz"])


def test_lhotse_that_changes_the_sound_is_refused_by_name(peers: Path) -> None:
    result = import_lhotse([(None, peers / "lhotse" / "changed.jsonl")], peers / "c.jsonl")
    assert [u.id for u in result.utterances] == ["one-1"]  # resampled alone
    shown = "\n".join(map(str, result.findings))
    for words in ("transformed by Speed", "transformed by Volume", "a MixedCut mixes several cuts"):
        assert words in shown


def test_lhotse_lines_that_cannot_be(tmp_path: Path, tone: Tone) -> None:
    path = tone(tmp_path / "a.wav", 2.0, channels=2)
    file = {"type": "file", "channels": [0, 1], "source": str(path)}
    recording = {"id": "r", "sources": [file], "sampling_rate": 16000, "num_samples": 32000, "duration": 2.0}
    spoken = {"id": "s", "recording_id": "r", "start": 0.5, "duration": 1.0, "channel": 0, "text": "x"}
    cut = {"id": "c", "type": "MonoCut", "start": 0.25, "duration": 1.5, "channel": 0, "recording": recording}

    def with_source(id: str, **source: object) -> dict:
        return {
            **cut,
            "recording": {**recording, "id": id, "sources": [source]},
            "supervisions": [{**spoken, "id": id}],
        }

    source = jsonl(
        tmp_path / "cuts.jsonl",
        {**cut, "supervisions": [spoken]},
        {**cut, "supervisions": []},
        {"id": "f", "type": "MonoCut", "start": 0, "duration": 1, "features": {}, "supervisions": [spoken]},
        {"id": "p", "type": "PaddingCut", "duration": 3},
        {**cut, "supervisions": [{**spoken, "id": "late", "start": 1.5, "duration": 9}]},
        {**cut, "supervisions": [{**spoken, "id": "ch", "channel": 5}]},
        {**cut, "supervisions": [{**spoken, "id": "chs", "channel": [0, {}]}, 7]},
        {**cut, "supervisions": [{**spoken, "id": "mute", "text": None}]},
        {**cut, "start": "soon", "supervisions": [spoken]},
        with_source("url", type="url", source="https://example.org/a.wav"),
        with_source("memory", type="memory", source="UklGRg=="),
        with_source("run", type="command", source=f"touch {tmp_path}/ran"),
        with_source("none", type="file", source=str(tmp_path / "none.wav")),
        with_source("wide", type="file", source=str(path), channels=[0, 1, 2]),
        {**cut, "recording": {"id": "r2", "sources": []}, "supervisions": [{**spoken, "id": "bare"}]},
        {**cut, "supervisions": [{**spoken, "id": "both", "channel": [0, 1]}]},
        "nonsense",
    )
    result = import_lhotse([(None, source)], tmp_path / "c.jsonl")
    assert [(u.id, u.start_s, u.channel) for u in result.utterances] == [("s", 0.75, 0), ("both", 0.75, None)]
    assert found(result) == [
        ("empty-text", 2, "c"), ("audio", 3, "f"), ("line", 4, "p"), ("segment", 5, "late"), ("line", 6, "ch"),
        ("line", 7, "chs"), ("line", 7, "c"), ("line", 8, "mute"), ("line", 9, "c"), ("audio", 10, "url"),
        ("audio", 11, "memory"), ("audio", 12, "run"), ("audio", 13, "none"), ("audio", 14, "wide"),
        ("audio", 15, "bare"), ("line", 17, None),
    ]  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert "type url" in result.findings[9].what
    with pytest.raises(CorpusError, match="neither a cut nor"):
        import_lhotse([(None, jsonl(tmp_path / "x.jsonl", {"a": 1}))], tmp_path / "c.jsonl")
    cut_off = tmp_path / "cut.jsonl.gz"
    cut_off.write_bytes((PEERS / "lhotse" / "cuts.jsonl.gz").read_bytes()[:-40])
    with pytest.raises(CorpusError, match=r"cut\.jsonl\.gz.*cannot read"):
        import_lhotse([(None, cut_off)], tmp_path / "c.jsonl")


# Hugging Face


def test_huggingface_datasets(peers: Path) -> None:
    pytest.importorskip("pyarrow")
    manifest = peers / "out" / "corpus.jsonl"
    result = import_huggingface([(None, peers / "huggingface" / "dict")], manifest)
    assert result.findings == []
    assert [(u.id, u.split, u.text, u.speaker, u.meta) for u in result.utterances] == [
        ("train/one", "train", "The kettle sings.", "7", {"accent": "us", "stars": "0.5"}),
        ("talk", "train", "Is it raining? Not yet, I think.", "8", {"accent": "gb", "stars": "0.5"}),
        ("test/one", "test", "The kettle sings.", "7", {"accent": "us", "stars": "0.5"}),
    ]
    for u in result.utterances:
        assert u.session is None
        written = manifest.parent / u.audio
        assert written.parent == manifest.parent / "corpus.audio"
        assert written.read_bytes() == (peers / "audio" / f"{Path(u.id).name}.flac").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in (manifest.parent / "corpus.audio").iterdir()}
    again = import_huggingface([("x", peers / "huggingface" / "dict" / "train")], manifest)
    assert [(u.id, u.split) for u in again.utterances] == [("one", "x"), ("talk", "x")]
    after = {p: p.stat().st_mtime_ns for p in (manifest.parent / "corpus.audio").iterdir()}
    assert after.items() > before.items()
    assert len(after) == len(before) + 1  # The name of a file holds the id of its utterance.
    import_huggingface([("x", peers / "huggingface" / "dict" / "train")], manifest)
    assert {p: p.stat().st_mtime_ns for p in (manifest.parent / "corpus.audio").iterdir()} == after
    parquet = import_huggingface([(None, peers / "huggingface" / "test-00000-of-00001.parquet")], manifest)
    assert [(u.id, u.split, u.meta["accent"]) for u in parquet.utterances] == [("one", "test", "us")]


def test_huggingface_rows_and_folders_that_cannot_be(tmp_path: Path, tone: Tone) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tone(tmp_path / "a.flac", 0.5)
    audio = [
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": b"no audio", "path": "x.wav"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "gone.wav"},
        None,
        {"bytes": path.read_bytes(), "path": "../../etc/x.flac"},
        {"bytes": path.read_bytes(), "path": "ok.flac"},
    ]
    texts = ["a", "b", "c", "d", "e", "f", "g", None]
    table = pa.table({"audio": audio, "text": texts, "chapter_id": [5, 5, 5, 5, 5, 5, 6, 6]})

    def save(folder: Path, table: object) -> Path:
        folder.mkdir()
        with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:  # type: ignore[attr-defined]
            stream.write_table(table)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}]}))
        return folder

    made = save(tmp_path / "d", table)
    result = import_huggingface([("train", made)], tmp_path / "c.jsonl")
    assert [(u.id, u.session) for u in result.utterances] == [("train-00000000", "5"), ("a", "5"), ("etc/x", "6")]
    assert {Path(u.audio).parent.as_posix() for u in result.utterances} == {"c.audio", "."}
    assert found(result) == [
        ("audio", 3, "x"), ("audio", 4, "train-00000003"), ("audio", 5, "gone"), ("audio", 6, "train-00000005"),
        ("line", 8, "ok"),
    ]  # fmt: skip
    no_text = save(tmp_path / "n", pa.table({"audio": audio[:1], "words": ["a"]}))
    with pytest.raises(CorpusError, match="--text-column"):
        import_huggingface([(None, no_text)], tmp_path / "c.jsonl")
    assert len(import_huggingface([(None, no_text)], tmp_path / "c.jsonl", {"text": "words"}).utterances) == 1
    with pytest.raises(ConfigError, match="no column 'x'"):
        import_huggingface([(None, no_text)], tmp_path / "c.jsonl", {"text": "x"})
    with pytest.raises(CorpusError, match="no column of audio"):
        import_huggingface([(None, save(tmp_path / "q", pa.table({"text": ["a"]})))], tmp_path / "c.jsonl")
    for name, content, match in (
        ("state.json", "{", "not JSON"),
        ("state.json", '{"_data_files": [{"filename": "../d/d.arrow"}]}', "names of data files"),
        ("state.json", '{"_data_files": [{"filename": "none.arrow"}]}', "not readable as Arrow"),
        ("dataset_dict.json", '{"splits": ["../d"]}', "no list of splits"),
        ("dataset_dict.json", "[]", "no object"),
    ):
        folder = tmp_path / f"bad {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(CorpusError, match=match):
            import_huggingface([(None, folder)], tmp_path / "c.jsonl")
    with pytest.raises(CorpusError, match="no dataset in it"):
        import_huggingface([(None, tmp_path / "c.audio")], tmp_path / "c.jsonl")


def test_without_pyarrow_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'stillhouse\[huggingface\]'"):
        import_huggingface([(None, tmp_path)], tmp_path / "c.jsonl")


# ESPnet


def test_an_espnet_dump(peers: Path) -> None:
    """dump/raw/SPLIT as its recipes lay it out: wav.scp into an archive, token files beside the text."""
    dump = peers / "dump" / "raw" / "org"
    dump.mkdir(parents=True)
    wav = peers / "one.wav"
    soundfile.write(wav, *soundfile.read(peers / "audio" / "one.flac", dtype="int16"), subtype="PCM_16")
    riff = wav.read_bytes()
    riff = riff[:4] + struct.pack("<I", len(riff) - 8) + riff[8:]
    (dump / "data_wav.ark").write_bytes(b"utt1 " + riff)
    (dump / "wav.scp").write_text("utt1 dump/raw/org/data_wav.ark:5\nutt2 audio/one.flac\n")
    (dump / "text").write_text("utt1 THE KETTLE SINGS\nutt2 THE KETTLE SINGS\n")
    (dump / "token").write_text("utt1 ▁THE ▁K ET TLE ▁SING S\nutt2 ▁THE ▁KETTLE ▁SINGS\n")
    (dump / "utt2spk").write_text("utt1 anna\nutt2 anna\n")
    (dump / "utt2num_samples").write_text("utt1 7747\nutt2 7747\n")
    (dump / "feats_type").write_text("raw\n")
    manifest = peers / "corpus.jsonl"
    plain = import_kaldi([("train", dump)], manifest)
    tokens = import_kaldi([("train", dump)], manifest, text_name="token", pieces=True)
    assert plain.findings == tokens.findings == []
    assert plain.utterances == tokens.utterances
    assert [(u.id, u.text, u.speaker, u.split, u.duration_s) for u in plain.utterances] == [
        (f"utt{k}", "THE KETTLE SINGS", "anna", "train", 7747 / 8000) for k in (1, 2)
    ]
    corpus = Corpus(manifest, plain.utterances)
    one, two = (read_audio(corpus.audio_path(u)) for u in plain.utterances)
    np.testing.assert_array_equal(one, two)


# The libraries themselves, on LibriSpeech


def test_librispeech_through_lhotse(corpora: Path, tmp_path: Path) -> None:
    installed("lhotse")
    from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet

    subset = corpora / "librispeech-subset" / "test-other"
    direct = import_librispeech(subset, tmp_path / "c.jsonl").utterances[:40]
    recordings = RecordingSet.from_recordings(
        Recording.from_file(str((tmp_path / u.audio).resolve()), recording_id=u.id) for u in direct
    )
    supervisions = SupervisionSet.from_segments(
        SupervisionSegment(u.id, u.id, 0.0, u.duration_s, 0, u.text, "English", u.speaker) for u in direct
    )
    recordings.to_file(str(tmp_path / "r.jsonl.gz"))
    supervisions.to_file(str(tmp_path / "s.jsonl.gz"))
    cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    cuts.to_file(str(tmp_path / "cuts.jsonl.gz"))
    pattern = r"(?P<session>\d+-\d+)-(?P<order>\d+)"
    for files in (["cuts.jsonl.gz"], ["s.jsonl.gz", "r.jsonl.gz"]):
        sources = [("test-other", tmp_path / f) for f in files]
        result = import_lhotse(sources, tmp_path / "c.jsonl", session_pattern=pattern)
        assert result.findings == []
        same = [u.model_copy(update={"meta": {}, "audio": None}) for u in result.utterances]
        assert same == [u.model_copy(update={"audio": None}) for u in direct]
        assert {u.session for u in import_lhotse(sources, tmp_path / "c.jsonl").utterances} == {None}


def test_librispeech_through_datasets_and_nemo(corpora: Path, tmp_path: Path) -> None:
    subset = corpora / "librispeech-subset" / "test-other"
    direct = import_librispeech(subset, tmp_path / "c.jsonl").utterances[:20]
    files = [(tmp_path / u.audio).resolve() for u in direct]
    source = jsonl(
        tmp_path / "m.json",
        *(
            {"audio_filepath": str(f), "text": u.text, "duration": u.duration_s, "speaker": u.speaker}
            for f, u in zip(files, direct, strict=True)
        ),
    )
    pattern = r"(?P<session>\d+-\d+)-(?P<order>\d+)"
    nemo = import_nemo([("test-other", source)], tmp_path / "c.jsonl", session_pattern=pattern)
    assert nemo.findings == []
    assert [u.model_copy(update={"audio": None}) for u in nemo.utterances] == [
        u.model_copy(update={"audio": None}) for u in direct
    ]
    installed("datasets")
    import datasets

    datasets.disable_progress_bars()
    audio = [{"path": f.name, "bytes": f.read_bytes()} for f in files]
    columns = {"audio": audio, "text": [u.text for u in direct], "chapter_id": [u.session for u in direct]}
    made = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(sampling_rate=16000))
    made.save_to_disk(str(tmp_path / "hf"), num_shards=3)
    result = import_huggingface([("test-other", tmp_path / "hf")], tmp_path / "out" / "c.jsonl")
    assert result.findings == []
    assert [(u.id, u.text, u.duration_s, u.session) for u in result.utterances] == [
        (u.id, u.text, u.duration_s, u.session) for u in direct
    ]
    assert [(tmp_path / "out" / u.audio).read_bytes() for u in result.utterances] == [f.read_bytes() for f in files]

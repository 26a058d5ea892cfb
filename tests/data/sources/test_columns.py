"""Times and ids of all importers: what a column or key means, and what is said when it is not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.data.sources.columns.times import TIMES, fold, seconds
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.huggingface import import_huggingface
from stillhouse.data.sources.kaldi import import_kaldi
from stillhouse.data.sources.lhotse import import_lhotse
from stillhouse.data.sources.nemo import import_nemo
from stillhouse.data.sources.table import import_table
from stillhouse.data.sources.text import import_text

Tone = Callable[..., Path]
Row = dict[str, Any]


def csv_of(folder: Path, rows: list[Row], **columns: str) -> Imported:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join("" if row.get(n) is None else str(row[n]) for n in names) for row in rows)]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return import_table(folder / "t.csv", folder / "corpus.jsonl", columns)


def nemo_of(folder: Path, rows: list[Row], **_: str) -> Imported:
    own = [{("audio_filepath" if name == "audio" else name): v for name, v in row.items()} for row in rows]
    (folder / "m.json").write_text("".join(json.dumps(row) + "\n" for row in own))
    return import_nemo([(None, folder / "m.json")], folder / "corpus.jsonl")


def huggingface_of(folder: Path, rows: list[Row], **columns: str) -> Imported:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    own = [{**row, "audio": {"path": row["audio"], "bytes": None}} for row in rows]
    names = list(dict.fromkeys(name for row in own for name in row))
    table = pa.table({name: [row.get(name) for row in own] for name in names})
    parquet.write_table(table, folder / "d.parquet")
    return import_huggingface([(None, folder / "d.parquet")], folder / "corpus.jsonl", columns)


IMPORTERS = {"csv": csv_of, "nemo": nemo_of, "huggingface": huggingface_of}
every = pytest.mark.parametrize("importer", IMPORTERS.values(), ids=IMPORTERS.keys())


def segments(result: Imported) -> list[tuple[str, float, float | None]]:
    return [(u.id, u.start_s, u.duration_s) for u in result.utterances]


def lines(result: Imported) -> dict[int, str]:
    return {f.line or 0: f"{f.kind}: {f.what}" for f in result.findings}


@every
@pytest.mark.parametrize(("start", "end"), [("start", "end"), ("begin", "stop"), ("start_time", "end_time")])
def test_start_and_end(tmp_path: Path, tone: Tone, importer: Callable, start: str, end: str) -> None:
    tone(tmp_path / "call.wav", 9.5)
    times = [(0.0, 2.5), (2.5, 6.0), (6.0, 9.0)]
    rows = [{"id": f"s{k}", "audio": "call.wav", start: b, end: e, "text": "x"} for k, (b, e) in enumerate(times)]
    result = importer(tmp_path, rows)
    assert (result.findings, segments(result)) == ([], [("s0", 0.0, 2.5), ("s1", 2.5, 3.5), ("s2", 6.0, 3.0)])


@every
def test_a_start_of_zero_keeps_its_duration(tmp_path: Path, tone: Tone, importer: Callable) -> None:
    tone(tmp_path / "call.wav", 9.5)
    rows = [{"audio": "call.wav", "offset": b, "duration": 2.0, "text": "x"} for b in (0.0, 2.0)]
    result = importer(tmp_path, rows)
    assert segments(result) == [("call-00000000", 0.0, 2.0), ("call-00002000", 2.0, 2.0)]
    # An end alone begins at 0, and a start alone reaches to the end.
    result = importer(tmp_path, [{"id": "a", "audio": "call.wav", "end": 3.0, "text": "x"}])
    assert (result.findings, segments(result)) == ([], [("a", 0.0, 3.0)])
    result = importer(tmp_path, [{"id": "a", "audio": "call.wav", "start": 3.0, "text": "x"}])
    assert (result.findings, segments(result)) == ([], [("a", 3.0, 6.5)])


@every
def test_times_that_cannot_be_are_named(tmp_path: Path, tone: Tone, importer: Callable) -> None:
    tone(tmp_path / "call.wav", 9.5)
    good = {"audio": "call.wav", "text": "x"}
    rows = [
        {"id": "agree", **good, "start": 1.0, "end": 3.5, "duration": 2.51},
        {"id": "differ", **good, "start": 1.0, "end": 3.5, "duration": 3.0},
        {"id": "back", **good, "start": 3.0, "end": 1.0, "duration": None},
        {"id": "none", **good, "start": 0.0, "end": 0.0, "duration": None},
        {"id": "beyond", **good, "start": 1.0, "end": 11.0, "duration": None},
        {"id": "late", **good, "start": 10.0, "end": None, "duration": None},
        {"id": "before", **good, "start": -1.0, "end": 2.0, "duration": None},
    ]
    result = importer(tmp_path, rows)
    assert segments(result) == [("agree", 1.0, 2.5)]
    first = 3 if importer is csv_of else 2
    found = lines(result)
    assert list(found) == list(range(first, first + 6))
    assert all(what.startswith("segment: ") for what in found.values())
    for k, words in enumerate(
        ("from 1 to 3.5 s are 2.5 s, but the duration is 3 s", "not behind the start", "0 s, is not")
    ):
        assert words in found[first + k]
    assert "1–11 s is not inside" in found[first + 3]


@every
@pytest.mark.parametrize("name", ["to", "end_sample", "segmentStop", "finish"])
def test_a_time_that_is_not_read_is_a_finding(tmp_path: Path, tone: Tone, importer: Callable, name: str) -> None:
    tone(tmp_path / "call.wav", 9.5)
    rows = [{"id": f"s{k}", "audio": "call.wav", "start": float(k), name: k + 1.0, "text": "x"} for k in range(3)]
    result = importer(tmp_path, rows)
    assert [(f.kind, f.what) for f in result.findings] == [
        ("column", f"column {name!r} looks like a time, but it is not read")
    ]
    if importer is not nemo_of:
        assert f"--end-column {name}" in result.findings[0].remedy
        named = importer(tmp_path, rows, end=name)
        assert (named.findings, segments(named)[1]) == ([], ("s1", 1.0, 1.0))
        kept = importer(tmp_path, rows, end="-")
        assert (kept.findings, kept.utterances[1].meta) == ([], {name: "2.0"})
    # Where the segment is known without it, the column is only named.
    known = importer(tmp_path, [{**row, "duration": 1.0} for row in rows])
    assert known.findings == []
    assert any(repr(name) in note for note in known.notes)


@every
def test_words_are_no_times(tmp_path: Path, tone: Tone, importer: Callable) -> None:
    tone(tmp_path / "a.wav", 1.0)
    row = {"id": "a", "audio": "a.wav", "text": "x", "to": "anna", "tone": 3, "lens": 2.5, "friend": 1}
    result = importer(tmp_path, [row])
    assert result.findings == []
    assert not any("time" in note for note in result.notes)
    assert {"to", "tone", "lens", "friend"} <= result.utterances[0].meta.keys()


@every
def test_milliseconds(tmp_path: Path, tone: Tone, importer: Callable) -> None:
    tone(tmp_path / "call.wav", 9.5)
    rows = [{"id": "a", "audio": "call.wav", "start_ms": 0, "end_ms": 1500, "text": "x"}]
    assert segments(importer(tmp_path, rows)) == [("a", 0.0, 1.5)]


def test_the_usual_names_of_times_are_folded_and_stand_once() -> None:
    names = [name for field in TIMES.values() for name in field]
    assert len(set(names)) == len(names)
    assert all(fold(name) == name for name in names)
    assert (fold("Start Time (s)"), seconds("2500", "start_ms"), seconds(" ", "end")) == ("start_time_s", 2.5, None)
    for value in (True, [1], "1e10", float("nan")):
        with pytest.raises(CorpusError):
            seconds(value, "start")


def test_a_duration_without_a_start_that_is_not_that_of_the_file(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "a.wav", 4.0)
    rounded = huggingface_of(tmp_path, [{"id": "a", "audio": "a.wav", "duration": 4.3, "text": "x"}])
    assert segments(rounded) == [("a", 0.0, 4.0)]
    row = {"id": "a", "audio": "a.wav", "duration": 2.0, "text": "x"}
    other = huggingface_of(tmp_path, [row])
    assert "the duration is 2 s without a start, but the audio has 4.000 s" in other.findings[0].what
    assert segments(huggingface_of(tmp_path, [row], duration="-")) == [("a", 0.0, 4.0)]


def test_times_inside_of_a_column(tmp_path: Path, tone: Tone) -> None:
    tone(tmp_path / "call.wav", 9.5)
    rows = [{"id": "a", "audio": "call.wav", "text": "x", "part": {"start": 1.0, "end": 2.0, "side": "A"}}]
    result = huggingface_of(tmp_path, rows)
    assert [(f.kind, f.what) for f in result.findings] == [
        ("column", f"column 'part.{name}' looks like a time, but it is not read") for name in ("start", "end")
    ]
    assert "dataset.flatten()" in result.findings[0].remedy


# Ids


def ids(result: Imported) -> list[str]:
    assert result.findings == []
    return sorted(u.id for u in result.utterances)


@every
def test_files_of_one_name_get_ids_from_their_paths(tmp_path: Path, tone: Tone, importer: Callable) -> None:
    paths = [f"{speaker}/{name}.wav" for speaker in ("spk1", "spk2") for name in ("0001", "0002")] + ["spk2/0003.wav"]
    for path in paths:
        tone(tmp_path / path, 0.5)
    rows = [{"audio": path, "text": path} for path in paths]
    first = importer(tmp_path, rows)
    assert ids(first) == ["0003", "spk1/0001", "spk1/0002", "spk2/0001", "spk2/0002"]
    by_id = {u.id: u.text for u in first.utterances}
    assert by_id == {u.id: u.text for u in importer(tmp_path, rows[::-1]).utterances}


def test_lists_that_are_imported_together(tmp_path: Path, tone: Tone) -> None:
    sources: list[tuple[str | None, Path]] = []
    for split in ("train", "dev"):
        tone(tmp_path / split / "wav" / "0001.wav", 0.5)
        row = {"audio_filepath": "wav/0001.wav", "text": split}
        (tmp_path / split / "m.json").write_text(json.dumps(row) + "\n")
        sources.append((split, tmp_path / split / "m.json"))
    assert ids(import_nemo(sources, tmp_path / "c.jsonl")) == ["dev/wav/0001", "train/wav/0001"]
    assert ids(import_nemo(sources[:1], tmp_path / "c.jsonl")) == ["0001"]
    # Two files of one list that use one name for their sessions stay apart, too.
    twice = [
        json.dumps({"audio_filepath": "wav/0001.wav", "offset": b, "duration": 0.2, "text": "x"}) for b in (0, 0.2)
    ]
    for _, source in sources:
        source.write_text("\n".join(twice) + "\n")
    both = import_nemo(sources, tmp_path / "c.jsonl")
    assert {u.session for u in both.utterances} == {"train/wav/0001", "dev/wav/0001"}
    assert len(ids(both)) == 4


def test_embedded_audio_of_one_name(tmp_path: Path, tone: Tone) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [tone(tmp_path / f"{k}.wav", 0.5, 300 + k).read_bytes() for k in range(3)]
    audio = [{"path": "0001.wav", "bytes": d} for d in data]

    def ids_of(order: list[int]) -> dict[str, str]:
        table = pa.table({"audio": [audio[k] for k in order], "text": [str(k) for k in order]})
        parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
        result = import_huggingface([(None, tmp_path / "train-00000-of-00001.parquet")], tmp_path / "c.jsonl")
        assert len(ids(result)) == 3
        return {u.text: u.id for u in result.utterances}

    assert ids_of([0, 1, 2]) == ids_of([2, 0, 1])


def test_text_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "story.txt").write_text(f"One of {folder}.\nTwo.\n")
    (tmp_path / "a" / "tale.txt").write_text("Three.\n")
    files = [tmp_path / "a" / "story.txt", tmp_path / "b" / "story.txt", tmp_path / "a" / "tale.txt"]
    result = import_text(files)
    name = str(tmp_path).strip("/")
    assert ids(result) == sorted(["tale-1", *(f"{name}/{d}/story-{n}" for d in "ab" for n in (1, 2))])
    assert len({u.session for u in result.utterances}) == 3


def test_recordings_of_one_name_in_two_sources(tmp_path: Path, tone: Tone) -> None:
    """Sessions must not join two recordings, and a cut must not be read from the recording of another set."""
    kaldi: list[tuple[str | None, Path]] = []
    cuts: list[tuple[str | None, Path]] = []
    sets: list[tuple[str | None, Path]] = []
    for k, split in enumerate(("train", "dev")):
        audio = tone(tmp_path / split / "0001.wav", 2.0, 300 + 100 * k)
        names = [f"{split}-{n}" for n in range(2)]
        data = tmp_path / split
        (data / "wav.scp").write_text(f"0001 {audio}\n")
        (data / "segments").write_text("".join(f"{n} 0001 {k} {k + 1}\n" for k, n in enumerate(names)))
        (data / "text").write_text("".join(f"{n} words\n" for n in names))
        kaldi.append((split, data))
        recording = {"id": "0001", "sources": [{"type": "file", "channels": [0], "source": str(audio)}]}
        supervisions = [
            {"id": n, "recording_id": "0001", "start": k, "duration": 1, "text": "x"} for k, n in enumerate(names)
        ]
        cut = {"id": split, "type": "MonoCut", "start": 0, "duration": 2, "channel": 0, "recording": recording}
        (data / "cuts.jsonl").write_text(json.dumps({**cut, "supervisions": supervisions}) + "\n")
        (data / "recordings.jsonl").write_text(json.dumps(recording) + "\n")
        (data / "supervisions.jsonl").write_text("".join(json.dumps(s) + "\n" for s in supervisions))
        cuts.append((split, data / "cuts.jsonl"))
        sets += [(split, data / "recordings.jsonl"), (split, data / "supervisions.jsonl")]
    for result in (import_kaldi(kaldi, tmp_path / "c.jsonl"), import_lhotse(cuts, tmp_path / "c.jsonl")):
        assert [(u.id, u.audio, u.session) for u in result.utterances] == [
            ("train-0", "train/0001.wav", "0001"),
            ("train-1", "train/0001.wav", "0001"),
            ("dev-0", "dev/0001.wav", "dev/0001"),
            ("dev-1", "dev/0001.wav", "dev/0001"),
        ]
    both = import_lhotse(sets, tmp_path / "c.jsonl")
    assert both.utterances == []
    assert {f.what.split(": ")[-1] for f in both.findings} == {"two recordings with other audio have the id 0001"}
    # One recording whose parts are in two sets stays one session.
    (tmp_path / "dev" / "wav.scp").write_text(f"0001 {tmp_path}/train/0001.wav\n")
    assert {u.session for u in import_kaldi(kaldi, tmp_path / "c.jsonl").utterances} == {"0001"}

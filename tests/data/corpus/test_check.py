from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from stillhouse.cli import cli
from stillhouse.data.audio.read import read_audio, resample
from stillhouse.data.corpus.check import KINDS, Checked, check_corpus
from stillhouse.data.errors import AudioError, CorpusError, UsageError
from stillhouse.data.manifest import Corpus, Utterance, to_line, write_manifest

Make = Callable[..., Corpus]


def kinds(path: Path, **options: object) -> list[tuple[int, str, str | None]]:
    found = check_corpus(path, **options).findings  # type: ignore[arg-type]
    assert all(f.what and f.remedy for f in found)
    return [(int(f.where.rsplit(":", 1)[1]), f.kind, f.id) for f in found]


def test_a_good_corpus_has_no_findings(make_corpus: Make) -> None:
    corpus = make_corpus(5)
    for full in (False, True):
        done = check_corpus(corpus.path, full=full)
        assert (done.findings, done.utterances, done.files) == ([], 5, 5)


def test_every_kind_of_finding(make_corpus: Make, tone: Callable[..., Path]) -> None:
    corpus = make_corpus(6)
    u = corpus.utterances
    corpus.audio_path(u[1]).unlink()
    corpus.audio_path(u[2]).write_bytes(b"no audio")
    tone(corpus.audio_path(u[3]), u[3].duration_s, 300, 8000)
    whole = tone(corpus.path.parent / "audio" / "whole.flac", 3.0).read_bytes()
    (corpus.path.parent / "audio" / "cut.flac").write_bytes(whole[:-2000])
    lines = [to_line(x).encode() for x in u] + [
        b'{"id": "u000", "text": "again"}',
        to_line(u[0].model_copy(update={"id": "copy"})).encode(),
        to_line(u[4].model_copy(update={"id": "late", "start_s": 0.5, "duration_s": 9.0})).encode(),
        to_line(Utterance(id="blank", text=" \u00a0")).encode(),
        to_line(Utterance(id="tab", text="a\tb")).encode(),
        to_line(Utterance(id="lost", text="a\ufffdb")).encode(),
        b'{"id": "latin", "text": "\xe9"}',
        b'{"id": "broken", ',
        to_line(Utterance(id="cut", text="x", audio="audio/cut.flac", duration_s=3.0)).encode(),
        to_line(Utterance(id="second", text="x", audio="audio/whole.flac", channel=1)).encode(),
        b'{"id": " ", "text": "x"}',
        b'{"id": "typed", "text": 1}',
    ]
    corpus.path.write_bytes(b"\n".join(lines))
    assert kinds(corpus.path) == [
        (2, "missing", "u001"),
        (3, "audio", "u002"),
        (4, "rate", "u003"),
        (7, "duplicate-id", "u000"),
        (8, "duplicate-audio", "copy"),
        (9, "segment", "late"),
        (10, "empty-text", "blank"),
        (11, "control", "tab"),
        (12, "encoding", "lost"),
        (13, "encoding", "latin"),
        (14, "line", None),
        (15, "audio", "cut"),
        (16, "audio", "second"),
        (17, "empty-id", None),
        (18, "line", "typed"),
    ]
    assert {k for _, k, _ in kinds(corpus.path, audio=False)} == {
        "duplicate-id", "duplicate-audio", "empty-text", "control", "encoding", "line", "empty-id",
    }  # fmt: skip
    findings = check_corpus(corpus.path).findings
    assert str(findings[3]) == (
        f"{corpus.path}:7: u000: the id was used before, at {corpus.path}:1; give it another id or delete it"
    )
    assert "U+0009 at 1" in findings[7].what
    facts = findings[3].facts()
    assert (facts["file"], facts["line"], facts["id"]) == (str(corpus.path), 7, "u000")


def test_rates(make_corpus: Make, tone: Callable[..., Path]) -> None:
    corpus = make_corpus(2)
    assert kinds(corpus.path, rate_hz=8000) == [(1, "rate", "u000"), (2, "rate", "u001")]
    assert kinds(corpus.path, rate_hz=16000) == []


def test_damage_in_the_middle_is_found_by_decoding_all(make_corpus: Make, tone: Callable[..., Path]) -> None:
    corpus = make_corpus(1)
    flac = tone(corpus.path.parent / "audio" / "x.flac", 5.0)
    data = bytearray(flac.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8000] = bytes(8000)
    flac.write_bytes(data)
    corpus.path.write_text(to_line(Utterance(id="x", text="x", audio="audio/x.flac")))
    assert kinds(corpus.path, full=True) == [(1, "audio", "x")]


def test_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("\n")
    assert [f.kind for f in check_corpus(tmp_path).findings] == ["empty"]
    with pytest.raises(CorpusError, match="no such manifest"):
        check_corpus(tmp_path / "none.jsonl")


def test_real_corpora_are_clean(corpora: Path, tmp_path: Path) -> None:
    from stillhouse.data.manifest import write_manifest
    from stillhouse.data.sources.table import import_table

    path = tmp_path / "corpus.jsonl"
    write_manifest(path, import_table(corpora / "kathleen-arctic" / "manifest.tsv", path).utterances)
    done = check_corpus(path, rate_hz=16000)
    assert (done.utterances, done.files, done.findings) == (1620, 1620, [])


def full(folder: Path, *utterances: Utterance) -> Checked:
    write_manifest(folder / "c.jsonl", utterances)
    return check_corpus(folder / "c.jsonl", full=True)


def test_silence_and_channels_that_cancel_each_other_out(tmp_path: Path) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    sounds = {
        "zero": np.zeros(16000),
        "constant": np.full(16000, 0.25),
        "part": np.concatenate([np.zeros(8000), noise[:8000]]),
        "quiet": noise / 3000,
        "anti": np.stack([noise, -noise], axis=1),
        "almost": np.stack([noise, -0.9 * noise], axis=1),
        "same": np.stack([noise, noise], axis=1),
        "one": np.stack([noise, 0 * noise], axis=1),
    }
    for name, samples in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    utterances = [Utterance(id=name, text="x", audio=f"{name}.wav") for name in sounds]
    utterances += [
        Utterance(id="anti-0", text="x", audio="anti.wav", channel=0),
        Utterance(id="one-1", text="x", audio="one.wav", channel=1),
        Utterance(id="part-0", text="x", audio="part.wav", duration_s=0.5),
    ]
    done = full(tmp_path, *utterances)
    assert [(f.kind, f.id) for f in done.findings] == [
        ("silence", "zero"),
        ("silence", "constant"),
        ("antiphase", "anti"),
        ("antiphase", "almost"),
        ("silence", "one-1"),
        ("silence", "part-0"),
    ]
    assert "-26 dB below them" in done.findings[3].what
    assert len(done.notes) == 1 and "4 utterances of 4 files with several channels" in done.notes[0]
    assert check_corpus(tmp_path / "c.jsonl").findings == []
    with pytest.raises(AudioError, match="cancel each other out"):
        read_audio(tmp_path / "anti.wav")


def test_a_call_whose_sides_are_mixed_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    turns = np.repeat(np.array([1.0, 0.01] * 4), 8000)  # The sides speak in turns of half a second.
    left, right = (0.1 * turns[o : o + 56000] * rng.standard_normal(56000) for o in (0, 8000))
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], axis=1), 16000)
    room = 0.1 * turns[:56000] * rng.standard_normal(56000)
    soundfile.write(tmp_path / "room.wav", np.stack([room, np.roll(room, 40)], axis=1), 16000)  # 2.5 ms apart
    call, side = (Utterance(id=f"u{c}", text="x", audio="call.wav", channel=c) for c in (None, 0))
    done = full(tmp_path, call, side, Utterance(id="room", text="x", audio="room.wav"))
    assert done.findings == []
    assert any("1 utterances, for example uNone, are the mean of two channels" in note for note in done.notes)


def test_half_a_file_is_one_finding(tmp_path: Path, tone: Callable[..., Path]) -> None:
    data = tone(tmp_path / "a.wav", 2.0).read_bytes()
    (tmp_path / "a.wav").write_bytes(data[:32044])
    inside = [Utterance(id=f"u{k}", text="x", audio="a.wav", start_s=k / 10, duration_s=0.1) for k in range(3)]
    for whole in (False, True):
        write_manifest(tmp_path / "c.jsonl", [*inside, Utterance(id="all", text="x", audio="a.wav")])
        done = check_corpus(tmp_path / "c.jsonl", full=whole)
        assert [(f.kind, f.id) for f in done.findings] == [("audio", "u0")]
        assert "it promises 2.000 s, and 1.000 s can be read" in done.findings[0].what


def test_mixed_rates_are_counted(tmp_path: Path, tone: Callable[..., Path]) -> None:
    for k in range(3):
        tone(tmp_path / f"{k}.wav", 0.5, rate_hz=8000 if k == 1 else 16000)
    write_manifest(tmp_path / "c.jsonl", [Utterance(id=f"u{k}", text="x", audio=f"{k}.wav") for k in range(3)])
    done = check_corpus(tmp_path / "c.jsonl")
    assert done.rates == {16000: 2, 8000: 1}
    assert [(f.kind, f.id) for f in done.findings] == [("rate", "u1")]
    assert "2 others have 16000" in done.findings[0].what and "--rate 8000" in done.findings[0].remedy
    assert done.notes == [
        "rates: 8000 Hz in 1 files, 16000 Hz in 2 files. `corpus features --rate 8000` makes all of them alike"
    ]


def test_narrow_audio_at_a_wide_rate_is_said(tmp_path: Path) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32)
    soundfile.write(tmp_path / "wide.wav", noise, 16000)
    soundfile.write(tmp_path / "made.wav", resample(noise, 8000, 16000), 16000)
    soundfile.write(tmp_path / "narrow.wav", noise, 8000)
    names = ("wide", "made", "narrow")
    done = full(tmp_path, *(Utterance(id=name, text="x", audio=f"{name}.wav") for name in names))
    [note] = [note for note in done.notes if "upper band" in note]
    assert note.startswith("1 utterances, for example made, have next to nothing in the upper band")


def test_samples_that_no_recording_has(tmp_path: Path) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    sounds = {"int16": 3000 * noise, "loud": 10 * noise, "nan": np.where(np.arange(16000) == 5, np.nan, noise)}
    for name, samples in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="FLOAT")
    done = full(tmp_path, *(Utterance(id=name, text="x", audio=f"{name}.wav") for name in sounds))
    assert [(f.kind, f.id) for f in done.findings] == [("audio", "int16"), ("audio", "nan")]
    assert "where full scale is 1" in done.findings[0].what


def test_findings_that_are_accepted(tmp_path: Path) -> None:
    texts = {"a": "oh [noise] no", "b": "zero\u200bwidth", "c": "plain"}
    write_manifest(tmp_path / "c.jsonl", [Utterance(id=id, text=text) for id, text in texts.items()])

    def check(*options: str) -> Result:
        return CliRunner().invoke(cli, ["corpus", "check", str(tmp_path / "c.jsonl"), *options])

    done = check()
    assert done.exit_code == 1 and "2 findings" in done.output and "--ignore mark" in done.output
    done = check("--ignore", "mark")
    assert done.exit_code == 1 and "1 findings, and 1 that are ignored (mark)" in done.output
    assert "[noise]" not in done.output
    done = check("--ignore", "mark, invisible")
    assert done.exit_code == 0 and "no findings, and 2 that are ignored (invisible, mark)" in done.output
    facts = json.loads(check("--ignore", "mark", "--json").stdout)
    assert facts["ignored"] == {"mark": 1} and [f["kind"] for f in facts["findings"]] == ["invisible"]
    done = check("--ignore", "marks")
    assert isinstance(done.exception, UsageError) and "invisible" in str(done.exception)
    page = (Path(__file__).parents[3] / "docs" / "guide" / "corpus.md").read_text()
    assert all(f"`{kind}`" in page for kind in KINDS)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.data.corpus.check import check_corpus
from stillhouse.data.errors import CorpusError
from stillhouse.data.manifest import Corpus, Utterance, to_line

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

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.data.files.paths import relative_audio
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, to_line, write_manifest

A = Utterance(
    id="a-1", text="Ä b", audio="x y/ä.wav", start_s=1.5, duration_s=2.0, session="s", speaker="p", split="dev"
)
B = Utterance(id="b", text="", meta={"prompt": "p1"})
C = Utterance(id="c", text="c", session="s", split="train")


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ein Ordner" / "corpus.jsonl"
    write_manifest(path, iter([A, B, C]))
    assert [p.name for p in path.parent.iterdir()] == ["corpus.jsonl"]
    corpus = read_manifest(path.parent)
    assert corpus.utterances == [A, B, C]
    assert corpus.by_id["b"] is corpus.utterances[1]
    assert corpus.audio_path(A) == path.parent / "x y" / "ä.wav"
    assert to_line(B) == '{"id": "b", "text": "", "meta": {"prompt": "p1"}}'
    with pytest.raises(CorpusError, match="the utterance has no audio"):
        corpus.audio_path(B)


def test_sessions_are_in_file_order_and_the_lonely_are_their_own() -> None:
    shared = Utterance(id="s", text="its id is a session's name")
    assert Corpus(Path("x"), [A, B, C, shared]).sessions() == [[0, 2], [1], [3]]


def test_select() -> None:
    corpus = Corpus(Path("corpus.jsonl"), [A, B, C])
    assert [u.id for u in corpus.select("train,dev").utterances] == ["a-1", "c"]
    assert corpus.select(None) is corpus
    with pytest.raises(CorpusError, match=r"split test \(expected one of dev, train\)"):
        corpus.select("test,dev")
    with pytest.raises(CorpusError, match="corpus split"):
        Corpus(Path("corpus.jsonl"), [B]).select("dev")


def test_bom_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (to_line(A) + "\r\n\r\n" + to_line(C) + "\r\n").encode())
    assert read_manifest(path).utterances == [A, C]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"id": "x"', r"c\.jsonl:2: Invalid JSON"),
        (b'{"id": "x"}', r":2: text: Field required"),
        (b'{"id": "", "text": "t"}', r":2: id: an id must not be empty.*\(given ''\)"),
        (b'{"id": "a\\tb", "text": "t"}', r":2: id: .*control characters"),
        (b'{"id": " x", "text": "t"}', r"white space"),
        (b'{"id": "x", "text": "t", "txt": "u"}', r":2: txt: Extra inputs"),
        (b'{"id": "x", "text": "t", "audio": ""}', r":2: audio: audio must be a path"),
        (b'{"id": "x", "text": "t", "start_s": -1}', r":2: start_s: .*greater than or equal to 0"),
        (b'{"id": "x", "text": "t", "duration_s": 0}', r":2: duration_s"),
        (b'{"id": "x", "text": "t", "duration_s": NaN}', r":2: "),
        (b'{"id": "x", "text": "t", "meta": {"n": 1}}', r":2: meta\.n: .*valid string"),
        (b'{"id": "x", "text": "\xe9"}', r":2: bytes 21.22 of the line are not UTF-8.*save"),
        (b'["x"]', r":2: "),
        (b'{"id": "a-1", "text": "again"}', r":2: id a-1 was used before, on line 1; .*corpus check"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(to_line(A).encode() + b"\n" + line + b"\n")
    with pytest.raises(CorpusError, match=match):
        read_manifest(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="corpus import"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(CorpusError, match="empty"):
        read_manifest(tmp_path / "empty.jsonl")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, [A])
    with pytest.raises(CorpusError, match="twice"):
        write_manifest(path, [B, B])

    class Broken(Utterance):
        def model_dump(self, **_: object) -> dict:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_manifest(path, [B, Broken(id="z", text="")])
    assert read_manifest(path).utterances == [A]
    assert len(list(tmp_path.iterdir())) == 1


def test_paths_are_relative_to_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert relative_audio(Path("a/b c.wav"), Path("m/corpus.jsonl")) == "../a/b c.wav"
    assert relative_audio(tmp_path / "a" / "b.wav", Path("a/corpus.jsonl")) == "b.wav"
    absolute = Corpus(tmp_path / "corpus.jsonl", [A.model_copy(update={"audio": "/far/x.wav"})])
    assert absolute.audio_path(absolute.utterances[0]) == Path("/far/x.wav")


def test_every_line_stands_alone(tmp_path: Path) -> None:
    tricky = Utterance(id="u\u00a0x", text='quote " slash \\ sep \u2028 nl \n tab \t 😀')
    write_manifest(tmp_path / "c.jsonl", [tricky, C])
    assert read_manifest(tmp_path / "c.jsonl").utterances == [tricky, C]
    assert len((tmp_path / "c.jsonl").read_bytes().splitlines()) == 2
    assert json.loads((tmp_path / "c.jsonl").read_bytes().split(b"\n")[0])["text"] == tricky.text
    assert os.stat(tmp_path / "c.jsonl").st_mode & 0o044

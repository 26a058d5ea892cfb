from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.data.errors import ConfigError, CorpusError
from stillhouse.data.files.lines import read_lines
from stillhouse.data.manifest import Corpus, read_manifest, write_manifest
from stillhouse.data.sources.common import natural
from stillhouse.data.sources.librispeech import import_librispeech
from stillhouse.data.sources.table import import_table
from stillhouse.data.sources.text import import_text

SESSION = r"(?P<session>\d+-\d+)-(?P<order>\d+)"


@pytest.fixture
def tree(tmp_path: Path, tone: Callable[..., Path]) -> Path:
    """Two splits; numbers whose order as text and as numbers differ; transcripts with BOM and Windows line ends."""
    root = tmp_path / "Libri Späch"
    for split, speaker, chapter, numbers in [
        ("train-clean-100", 103, 1240, [0, 2, 10]),
        ("train-clean-100", 19, 198, [0]),
        ("train-clean-100", 19, 27, [0]),
        ("dev-other", 7, 5, [0, 1]),
    ]:
        folder = root / split / str(speaker) / str(chapter)
        lines = []
        for n in numbers:
            tone(folder / f"{speaker}-{chapter}-{n}.flac", 0.5 + n / 100)
            lines.append(f"{speaker}-{chapter}-{n} WORDS OF {n}\r\n")
        text = "".join(sorted(lines))
        (folder / f"{speaker}-{chapter}.trans.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return root


ORDER = ["7-5-0", "7-5-1", "19-27-0", "19-198-0", "103-1240-0", "103-1240-2", "103-1240-10"]


def test_a_librispeech_tree_at_every_level(tree: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "out" / "corpus.jsonl"
    result = import_librispeech(tree, manifest)
    assert result.findings == []
    assert [u.id for u in result.utterances] == ORDER
    first, last = result.utterances[0], result.utterances[-1]
    assert (first.split, first.speaker, first.session, first.text) == ("dev-other", "7", "7-5", "WORDS OF 0")
    assert (last.split, last.duration_s) == ("train-clean-100", 0.6)
    assert last.audio == "../Libri Späch/train-clean-100/103/1240/103-1240-10.flac"
    write_manifest(manifest, result.utterances)
    corpus = read_manifest(manifest)
    assert all(corpus.audio_path(u).is_file() for u in corpus.utterances)
    assert corpus.sessions() == [[0, 1], [2], [3], [4, 5, 6]]
    for level, ids in [
        ("train-clean-100", ORDER[2:]),
        ("train-clean-100/19", ORDER[2:4]),
        ("train-clean-100/103/1240", ORDER[4:]),
    ]:
        part = import_librispeech(tree / level, manifest)
        assert [u.id for u in part.utterances] == ids
        assert {u.split for u in part.utterances} == {"train-clean-100"}
        assert part.utterances[-1].audio == next(u.audio for u in result.utterances if u.id == ids[-1])


def test_the_name_of_any_folder_is_not_a_split(tree: Path, tmp_path: Path) -> None:
    (tree / "dev-other").rename(tree / "mine")
    assert {u.split for u in import_librispeech(tree, tmp_path / "c").utterances} == {"mine", "train-clean-100"}
    assert {u.split for u in import_librispeech(tree / "mine", tmp_path / "c").utterances} == {None}
    assert {u.split for u in import_librispeech(tree / "mine" / "7" / "5", tmp_path / "c").utterances} == {None}


def test_a_tree_of_links(tree: Path, tmp_path: Path) -> None:
    linked = tmp_path / "links"
    linked.mkdir()
    for name in ("train-clean-100", "dev-other"):
        (linked / name).symlink_to(tree / name)
    (linked / "dev-other" / "7" / "round").symlink_to(linked)
    result = import_librispeech(linked, tmp_path / "c.jsonl")
    assert (result.findings, [u.id for u in result.utterances]) == ([], ORDER)
    assert result.utterances[0].split == "dev-other"


def test_what_a_tree_lacks_is_named(tree: Path, tmp_path: Path) -> None:
    chapter = tree / "train-clean-100" / "103" / "1240"
    (chapter / "103-1240-2.flac").unlink()
    (chapter / "103-1240-10.flac").write_text("not audio")
    transcript = chapter / "103-1240.trans.txt"
    transcript.write_text(transcript.read_text() + "x-1 WHAT\n7-5-0 AGAIN\n")
    (chapter / "103-1240-11.flac").write_bytes(b"")
    (tree / "dev-other" / "7" / "5" / "7-5.trans.txt").write_bytes(b"7-5-0 OK\n7-5-1 \xff\n")
    result = import_librispeech(tree, tmp_path / "c.jsonl")
    problems = "\n".join(map(str, result.findings))
    assert [u.id for u in result.utterances] == ["19-27-0", "19-198-0", "103-1240-0"]
    for words in (
        "103-1240.trans.txt:3: 103-1240-2: no audio 103-1240-2.flac beside it; restore the file",
        "103-1240-10.flac: not readable as audio",
        "103-1240.trans.txt:4: the line begins with 'x-1'",
        "103-1240-11.flac: 103-1240-11: audio without a transcript",
        "7-5.trans.txt:2: byte 0xff is not UTF-8",
    ):
        assert words in problems
    with pytest.raises(CorpusError, match=r"no \*\.trans\.txt"):
        import_librispeech(tmp_path / "Libri Späch" / "none", tmp_path / "c.jsonl")


def test_the_real_librispeech(corpora: Path, tmp_path: Path) -> None:
    result = import_librispeech(corpora / "librispeech-subset", tmp_path / "c.jsonl")
    assert result.findings == []
    assert len(result.utterances) == 715
    assert len({u.speaker for u in result.utterances}) == 261
    assert sum(u.duration_s or 0 for u in result.utterances) / 60 == pytest.approx(135, abs=1)
    corpus = Corpus(tmp_path / "c.jsonl", result.utterances)
    assert corpus.splits() == {"train-clean-100": 615, "test-other": 100}
    for session in corpus.sessions():
        numbers = [int(corpus.utterances[k].id.split("-")[2]) for k in session]
        assert numbers == sorted(numbers)


def test_a_table_with_usual_columns(tmp_path: Path, tone: Callable[..., Path]) -> None:
    tone(tmp_path / "a b" / "ä.wav", 1.5)
    tone(tmp_path / "a b" / "c.wav", 0.5)
    table = tmp_path / "a b" / "t.tsv"
    table.write_bytes(
        '\ufeffutt\tpath\ttext\tspeaker\tprompt\r\nu1\tä.wav\tSay "hi\tp\tq1\r\nu2\tc.wav\t Straße \t\t\r\n'.encode()
    )
    result = import_table(table, tmp_path / "out" / "corpus.jsonl")
    assert result.findings == []
    one, two = result.utterances
    assert (one.id, one.text, one.audio, one.duration_s) == ("u1", 'Say "hi', "../a b/ä.wav", 1.5)
    assert (one.speaker, one.meta, one.session) == ("p", {"prompt": "q1"}, None)
    assert (two.text, two.speaker, two.meta, two.duration_s) == ("Straße", None, {}, 0.5)


def test_a_table_by_mapping(tmp_path: Path, tone: Callable[..., Path]) -> None:
    tone(tmp_path / "wavs" / "long.wav", 3.0)
    table = tmp_path / "t.csv"
    table.write_text(
        "name;part;said;file;from;len;call;turn\n"
        'x;1;"one; ""two""";long.wav;0;1;c2;10\n'
        "x;2;three;long.wav;1;1.5;c1;1\n"
        "x;3;four;long.wav;2.5;;c2;9\n"
    )
    columns = {"id": "name,part", "text": "said", "start": "from", "duration": "len", "session": "call", "order": "8"}
    wavs = tmp_path / "wavs"
    result = import_table(table, tmp_path / "c.jsonl", columns, split="train", audio_root=wavs)
    assert result.findings == []
    assert [(u.id, u.text, u.session, u.split) for u in result.utterances] == [
        ("x-3", "four", "c2", "train"),
        ("x-1", 'one; "two"', "c2", "train"),
        ("x-2", "three", "c1", "train"),
    ]
    assert [(u.start_s, u.duration_s) for u in result.utterances] == [(2.5, 0.5), (0.0, 1.0), (1.0, 1.5)]
    assert {(u.audio, *u.meta) for u in result.utterances} == {("wavs/long.wav",)}


def test_a_table_without_header_and_with_a_pattern(tmp_path: Path) -> None:
    table = tmp_path / "t.txt"
    table.write_text("1-2-10\tten\tx\n1-2-9\tnine\ty\n1-1-1\tone\tz\nbad\tno\tw\n")
    result = import_table(table, tmp_path / "c.jsonl", {"id": "1", "text": "2"}, session_pattern=SESSION)
    assert [(u.id, u.session, u.meta) for u in result.utterances] == [
        ("1-2-9", "1-2", {"column_3": "y"}),
        ("1-2-10", "1-2", {"column_3": "x"}),
        ("1-1-1", "1-1", {"column_3": "z"}),
    ]
    assert [str(p) for p in result.findings] == [
        f"{table}:4: bad: the session pattern {SESSION} does not match the whole id; "
        "change the pattern, or correct or delete the line"
    ]


def test_rows_that_cannot_be_are_named(tmp_path: Path, tone: Callable[..., Path]) -> None:
    tone(tmp_path / "a.wav", 1.0)
    table = tmp_path / "t.csv"
    table.write_text(
        'id,audio,text,duration,start\nok,a.wav,"two\nlines",,\nshort,a.wav\nno,b.wav,x,,\nno2,b.wav,x,1,\n'
        "nan,a.wav,x,abc,\nlate,a.wav,x,,2\nok,a.wav,again,,\n,a.wav,stem is the id,,\n"
    )
    result = import_table(table, tmp_path / "c.jsonl")
    assert [u.id for u in result.utterances] == ["ok", "a"]
    problems = [str(p) for p in result.findings]
    for begin, words in [
        (f"{table}:4: ", "2 columns, expected 5 (id, audio, text, duration, start)"),
        (f"{table}:5: ", "no such audio file"),
        (f"{table}:6: ", "no such audio file"),
        (f"{table}:7: ", "could not convert string to float: 'abc'"),
        (f"{table}:8: ", f"the segment 2–1 s is not inside {tmp_path / 'a.wav'}, which has 1.000 s"),
        (f"{table}:9: ", f"the id was used before, at {table}:2"),
    ]:
        assert any(p.startswith(begin) and words in p for p in problems), (begin, problems)
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("content", "columns", "error", "match"),
    [
        ("a,b\n1,2\n", {}, ConfigError, r"no column holds the transcript \(expected one of a, b\); --text-column"),
        ("text,b\n1,2\n", {}, ConfigError, "--id-column"),
        ("id,text\n1,2\n", {"speaker": "who"}, ConfigError, "no column 'who' for --speaker-column"),
        ("id,text\n1,2\n", {"speaker": "3"}, ConfigError, "no column '3'"),
        ("id,text\n1,2\n", {"colour": "id"}, ConfigError, "unknown field colour"),
        ("id,text,id\n1,2,3\n", {}, CorpusError, "same name"),
        ("id,text\n", {}, CorpusError, "no rows"),
        ("", {}, CorpusError, "no rows"),
        ('id,text\n1,"open\n', {}, CorpusError, r"t\.csv:2: not a table: .*"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, content: str, columns: dict, error: type, match: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(error, match=match):
        import_table(tmp_path / "t.csv", tmp_path / "c.jsonl", columns)


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("id,text\n1,ok\n2,Stra\u00dfe\n".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"t\.csv:3: byte 0xdf is not UTF-8"):
        import_table(tmp_path / "t.csv", tmp_path / "c.jsonl")
    (tmp_path / "t.csv").write_bytes("id,text\n".encode("utf-16"))
    with pytest.raises(CorpusError, match="UTF-16"):
        import_table(tmp_path / "t.csv", tmp_path / "c.jsonl")


def test_real_tables(corpora: Path, tmp_path: Path) -> None:
    kathleen = import_table(corpora / "kathleen-arctic" / "manifest.tsv", tmp_path / "c.jsonl")
    assert kathleen.findings == []
    assert len(kathleen.utterances) == 1620
    assert kathleen.utterances[0].meta == {"prompt": "a0001"}
    calls = import_table(
        corpora / "text" / "earnings21.tsv",
        tmp_path / "c.jsonl",
        {"id": "1,2", "session": "1", "order": "2", "text": "4"},
    )
    assert calls.findings == []
    assert calls.utterances[1].id == "4320211-1"
    assert len(Corpus(tmp_path / "c.jsonl", calls.utterances).sessions()) == 44


def test_text_with_ids(corpora: Path, tmp_path: Path) -> None:
    result = import_text([corpora / "text" / "librispeech-test-clean.tsv"], session_pattern=SESSION, split="test")
    assert result.findings == []
    assert len(result.utterances) == 2620
    corpus = Corpus(tmp_path / "c.jsonl", result.utterances)
    assert len(corpus.sessions()) == 87
    assert {u.split for u in corpus.utterances} == {"test"}
    assert all(u.audio is None for u in corpus.utterances)


def test_a_sentence_a_line(tmp_path: Path) -> None:
    (tmp_path / "tale.txt").write_bytes("One.\r\nTwo.\r\n\r\n\r\nThree — ü.\r\n".encode())
    (tmp_path / "other.txt").write_text("Four.")
    result = import_text([tmp_path / "tale.txt", tmp_path / "other.txt"])
    assert [(u.id, u.session, u.text) for u in result.utterances] == [
        ("tale-1", "tale-1", "One."),
        ("tale-2", "tale-1", "Two."),
        ("tale-5", "tale-5", "Three — ü."),
        ("other-1", "other-1", "Four."),
    ]
    (tmp_path / "tabs.txt").write_text("a\tone\nb two\n\tthree\na\tfour\n")
    with_ids = import_text([tmp_path / "tabs.txt"], ids=True)
    assert [u.id for u in with_ids.utterances] == ["a"]
    assert [p.where.rsplit(":", 1)[1] for p in with_ids.findings] == ["2", "3", "4"]
    assert [u.text for u in import_text([tmp_path / "tabs.txt"]).utterances] == ["a\tone", "b two", "three", "a\tfour"]
    with pytest.raises(ConfigError, match="no group `session`"):
        import_text([tmp_path / "tale.txt"], session_pattern="(.*)")
    with pytest.raises(ConfigError, match="not a regular expression"):
        import_text([tmp_path / "tale.txt"], session_pattern="(?P<session>")


def test_small_tools(tmp_path: Path) -> None:
    assert sorted(["a10", "a2", "b1", "a"], key=natural) == ["a", "a2", "a10", "b1"]
    (tmp_path / "x").write_bytes(b"a\rb\r\nc\x0bd\x1ce\n")
    assert read_lines(tmp_path / "x") == [(1, "a"), (2, "b"), (3, "c\x0bd\x1ce")]

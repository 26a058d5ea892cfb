"""Tables that spreadsheets write, stray quotes, metadata of audio folders, and ids at the heads of lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.data.errors import CorpusError, UsageError
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.huggingface import import_huggingface
from stillhouse.data.sources.nemo import import_nemo
from stillhouse.data.sources.table import import_table
from stillhouse.data.sources.text import import_text


def read(tmp_path: Path, content: str, name: str = "t.csv", **options: object) -> Imported:
    (tmp_path / name).write_text(content, newline="")
    return import_table(tmp_path / name, tmp_path / "c.jsonl", **options)  # type: ignore[arg-type]


def texts(result: Imported) -> list[tuple[str, str]]:
    return [(u.id, u.text) for u in result.utterances]


def lines(result: Imported) -> list[int | None]:
    return [f.line for f in result.findings]


@pytest.mark.parametrize(
    "rows, left, found",
    [
        (['u0,"to be" he said', "u1,plain", "u2,other"], ["plain", "other"], [2]),
        (['u0,"what now', "u1,plain", 'u2,he said "no"'], ["plain", 'he said "no"'], [2]),
        (['u0,"what now', "u1,the end", 'u2,other"'], ["the end"], [2, 4]),
        (["u0,plain", 'u1,"what now', "u2,the end"], ["plain", "the end"], [3]),
        (['u0,"two ""quotes"""', 'u1,"a', 'b"'], ['two "quotes"', "a\nb"], []),
    ],
)
def test_a_stray_quote_is_named_at_its_own_line(tmp_path: Path, rows: list[str], left: list[str], found: list) -> None:
    result = read(tmp_path, "\n".join(["id,text", *rows]) + "\n")
    assert [u.text for u in result.utterances] == left and lines(result) == found
    assert all("--no-quote" in f.remedy for f in result.findings)
    plain = read(tmp_path, 'id,text\nu0,"what now\nu1,plain\n', quote=False)
    assert texts(plain) == [("u0", '"what now'), ("u1", "plain")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_spreadsheets_add(tmp_path: Path, end: str) -> None:
    rows = [
        "sep=;",
        "id;text;start;duration;;",
        "a;one, two;1,5;2,25;;",
        "b;three;0;1;;",
        ";;;;;",
        "c;four;;;;x",
        "",
        "",
    ]
    result = read(tmp_path, end.join(rows) + end)
    assert lines(result) == [6]  # "x" has no column
    assert [(u.id, u.text, u.start_s, u.duration_s) for u in result.utterances] == [
        ("a", "one, two", 1.5, 2.25),
        ("b", "three", 0.0, 1.0),
    ]


def test_cells_behind_the_last_column(tmp_path: Path) -> None:
    result = read(tmp_path, "id,text\na,one,,\nb,two,three\n")
    assert texts(result) == [("a", "one")] and lines(result) == [3]


def test_decimal_commas(tmp_path: Path) -> None:
    result = read(tmp_path, 'id,text,start\na,one,"1,5"\nb,two,2.5\n')
    assert texts(result) == [("b", "two")] and lines(result) == [2]
    assert "'1,5'" in result.findings[0].what and "point" in result.findings[0].what
    tabbed = read(tmp_path, "id\ttext\tstart\na\tone\t1,5\nb\ttwo\t1.234,5\n", "t.tsv")
    assert [u.start_s for u in tabbed.utterances] == [1.5] and lines(tabbed) == [3]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("nested", [False, True])
def test_audio_folders_with_metadata(tmp_path: Path, tone: Callable[..., Path], name: str, nested: bool) -> None:
    folder = tmp_path / "set"
    parts = [folder / "train", folder / "test"] if nested else [folder]
    for k, part in enumerate(parts):
        part.mkdir(parents=True)
        tone(part / f"u{k}.wav", 1.0)
        row = {"file_name": f"u{k}.wav", "transcription": "hello, world", "age": "30"}
        if name.endswith("csv"):
            (part / name).write_text(f'file_name,transcription,age\nu{k}.wav,"hello, world",30\n')
        else:
            (part / name).write_text(json.dumps(row | {"age": 30}) + "\n")
    result = import_huggingface([(None, folder)], tmp_path / "c.jsonl")
    assert not result.findings
    found = [(u.id, u.text, u.split, u.meta) for u in result.utterances]
    meta = {"age": "30"}
    assert sorted(found, key=str) == sorted(
        [(f"u{k}", "hello, world", p.name if nested else None, meta) for k, p in enumerate(parts)], key=str
    )
    assert (tmp_path / str(result.utterances[0].audio)).exists()


def test_an_array_of_nemo(tmp_path: Path, tone: Callable[..., Path]) -> None:
    tone(tmp_path / "a.wav", 1.0)
    rows = [{"audio_filepath": "a.wav", "duration": 1.0, "text": "hello"}, {"audio_filepath": "b.wav", "text": "no"}]
    (tmp_path / "m.json").write_text(json.dumps(rows, indent=2))
    result = import_nemo([(None, tmp_path / "m.json")], tmp_path / "c.jsonl")
    assert texts(result) == [("a", "hello")] and lines(result) == [7]


def test_ids_at_the_heads_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("utt1 hello world\nutt2\tno\nutt3\n".replace("\t", " "))
    with pytest.raises(UsageError, match=r"an id, as 'utt1'; say whether they do: --ids or --no-ids"):
        import_text([path])
    result = import_text([path], ids=True)
    assert texts(result) == [("utt1", "hello world"), ("utt2", "no"), ("utt3", "")]
    assert import_text([path], ids=False).utterances[0].text == "utt1 hello world"
    path.write_text("In 1984 he came.\nThen he went.\n")
    assert len(import_text([path]).utterances) == 2


def test_a_table_of_quotes_alone_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"t\.csv:2: not a table"):
        read(tmp_path, 'id,text\n1,"open\n')

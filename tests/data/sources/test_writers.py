"""Corpora as toolkits write them: names without suffixes, other headers, whole files twice, and no plain texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import ConfigError, UsageError
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.table import import_table
from stillhouse.data.sources.text import import_text


def sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    return path


def read(tmp_path: Path, content: str, name: str = "t.csv", **options: object) -> Imported:
    (tmp_path / name).write_text(content)
    return import_table(tmp_path / name, tmp_path / "c.jsonl", **options)  # type: ignore[arg-type]


def rows(result: Imported) -> list[tuple[str, str | None, str]]:
    return [(u.id, u.audio, u.text) for u in result.utterances]


def test_ljspeech_names_files_without_suffixes(tmp_path: Path) -> None:
    sound(tmp_path / "wavs" / "LJ001-0001.wav")
    sound(tmp_path / "wavs" / "LJ001-0002.wav")
    sound(tmp_path / "wavs" / "LJ001-0002.flac")
    form = {"delimiter": "|", "quote": False, "audio_root": tmp_path / "wavs"}
    table = 'LJ001-0001|No. 1, "a"|Number one, "a"\nLJ001-0002|x|y\nLJ001-0003|x|z\n'
    result = read(tmp_path, table, columns={"audio": "1", "text": "3"}, **form)
    assert rows(result) == [("LJ001-0001", "wavs/LJ001-0001.wav", 'Number one, "a"')]
    two, none = result.findings
    assert two.line == 2 and "2 files have this name (expected a suffix)" in two.what
    assert none.line == 3 and "no such audio file" in none.what and "--audio-root" in none.remedy
    with pytest.raises(ConfigError) as e:
        read(tmp_path, table.replace(",", ""))
    assert e.value.remedy == "name the delimiter, for example --delimiter '|'"


@pytest.mark.parametrize(
    "header, row",
    [
        ("wav_filename,wav_filesize,transcript", "a.wav,32044,one"),  # DeepSpeech
        ("ID,duration,wav,spk_id,wrd", "a,1.0,a.wav,s1,one"),  # SpeechBrain
        (",,path,text", "0,9,a.wav,one"),  # pandas
    ],
)
def test_headers_of_toolkits(tmp_path: Path, header: str, row: str) -> None:
    sound(tmp_path / "a.wav")
    result = read(tmp_path, f"{header}\n{row}\n")
    assert rows(result) == [("a", "a.wav", "one")] and not result.findings
    (utterance,) = result.utterances
    assert utterance.speaker == ("s1" if "spk_id" in header else None) and "" not in utterance.meta


def test_a_table_of_json_is_read_in_both_forms(tmp_path: Path) -> None:
    entries = [{"path": sound(tmp_path / f"{name}.wav").name, "sentence": name} for name in "ab"]
    for name, content in (("t.json", json.dumps(entries, indent=1)), ("t.jsonl", "\n".join(map(json.dumps, entries)))):
        assert rows(read(tmp_path, content, name)) == [("a", "a.wav", "a"), ("b", "b.wav", "b")]


def test_files_that_differ_in_their_suffix_alone_are_all_kept(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac", "x/a.flac", "b.wav"):
        sound(tmp_path / name)
    result = read(tmp_path, "path,text\na.wav,1\na.flac,2\nx/a.flac,3\nb.wav,4\n")
    assert [u.id for u in result.utterances] == ["a.wav", "a.flac", "x/a", "b"] and not result.findings


def test_lines_that_all_name_one_whole_file_are_said(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    sound(tmp_path / "b.wav")
    result = read(tmp_path, "id,path,text,t0,t1\nu,a.wav,one,0,0.5\nv,a.wav,two,0.5,1\nw,b.wav,three,0,1\n")
    assert len(result.utterances) == 3
    (note,) = [note for note in result.notes if "the whole of one file" in note]
    assert "a.wav (1 such files)" in note
    result = read(tmp_path, "id,path,text,start,end\nu,a.wav,one,0,0.5\nv,a.wav,two,0.5,1\nw,b.wav,three,,\n")
    assert not any("whole" in note for note in result.notes)


@pytest.mark.parametrize(
    "content, form",
    [
        (";; x\ntalk1 1 spk 0.5 2.0 <o,f0,male> so here\ntalk1 1 spk 2.0 4.25 <o,f0,male> and there\n", "stm"),
        ("talk1 1 0.5 0.2 so\ntalk1 1 0.7 0.25 here 0.98\n", "ctm"),
        ('{"text": "hi"}\n', "JSON lines"),
        ("hello (spk-1)\n(spk-2)\n", "trn"),
        ("(utt1) hello\n(utt2) bye\n", "UTT: TEXT"),
        ("utt1: hello\nutt2: bye\n", "UTT: TEXT"),
        ("LJ1-1|hello there|hello\nLJ1-2|bye|bye\n", "UTT: TEXT"),
        ("id,sentence\na,hello\nb,bye\n", "a table"),
        ("path\tsentence\na.mp3\thello\nb.mp3\tbye\n", "a table"),
        ("1\n00:00:01,000 --> 00:00:02,000\nhello\n", "subtitles"),
        ("WEBVTT\n\n00:01.000 --> 00:02.000\nhello\n", "subtitles"),
    ],
)
def test_what_is_no_plain_text_is_refused_by_name(tmp_path: Path, content: str, form: str) -> None:
    path = tmp_path / "t.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match=rf"no plain text: its lines look like {form}.*--no-ids"):
        import_text([path])
    assert len(import_text([path], ids=False).utterances) == len([line for line in content.split("\n") if line])


def test_plain_texts_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    for content in ("He came (in 1984)\nThen he went (home)\n", "Note: this\nThen: that\n", "It is 12:30\nat 3 | 4\n"):
        path.write_text(content)
        assert len(import_text([path]).utterances) == 2


def test_the_folder_of_a_datasets_audio(tmp_path: Path) -> None:
    sound(tmp_path / "clips" / "a.wav")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.csv").write_text("file_name,transcription\na.wav,one\n")
    arguments = ["corpus", "import", "huggingface", str(tmp_path / "set"), str(tmp_path / "c.jsonl")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1 and "--audio-root" in done.output
    done = CliRunner().invoke(cli, [*arguments, "--audio-root", str(tmp_path / "clips")])
    assert done.exit_code == 0, done.output


def test_quotes_of_a_tsv(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    sound(tmp_path / "b.wav")
    pandas = 'path\tsentence\na.wav\t"He said ""hi"""\nb.wav\tplain\n'
    result = read(tmp_path, pandas, "t.tsv")
    assert [u.text for u in result.utterances] == ['He said "hi"', "plain"]
    assert any("--no-quote" in note for note in result.notes)
    assert read(tmp_path, pandas, "t.tsv", quote=False).utterances[0].text == '"He said ""hi"""'
    voice = 'path\tsentence\na.wav\t"Hello," she said.\nb.wav\t"All of it."\n'  # Common Voice
    result = read(tmp_path, voice, "t.tsv")
    assert [u.text for u in result.utterances] == ['"Hello," she said.', '"All of it."'] and not result.findings


def test_rows_without_audio_are_counted(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    result = read(tmp_path, "id,audio,text\nu,a.wav,one\nTotal,,1\n")
    assert [u.audio for u in result.utterances] == ["a.wav", None]
    assert any(note.startswith("1 rows name no audio") and note.endswith("t.csv:3") for note in result.notes)

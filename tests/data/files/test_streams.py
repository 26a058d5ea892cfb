"""Standard streams with escapes: what they change, what they leave, and that no command goes around them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stillhouse.cli import main
from stillhouse.data.files.streams import EscapedStream, escaped, exact

EVIL = "a\x1b[2J\r\x07\x9b5m\u202eb"
SHOWN = r"a\x1b[2J\x0d\x07\u009b5m\u202eb"
UNSAFE = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066"} - {
    "\t",
    "\n",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_escapes() -> None:
    assert escaped(EVIL) == SHOWN
    plain = "tab\t, line\n, naïve, 漢字\u3000, emoji 👩\u200d🚀, ZWNJ \u200c, RLM \u200f"
    assert escaped(plain) == plain
    assert escaped(os.fsdecode(b"\xff.wav")) == r"\udcff.wav"


def test_json_means_the_same() -> None:
    value = {EVIL: [EVIL, "é\u2028"]}
    text = escaped(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value and not UNSAFE & set(text)


def test_a_stream() -> None:
    for make in (io.StringIO, Terminal):
        inner = make()
        stream = EscapedStream(inner)
        assert stream.write(EVIL) == len(EVIL) and inner.getvalue() == SHOWN
        stream.writelines([EVIL, EVIL])
        click.echo(EVIL, file=exact(stream), nl=False, color=True)
        assert inner.getvalue() == 3 * SHOWN + (SHOWN if inner.isatty() else EVIL)
        with pytest.raises(TypeError):
            stream.write(b"bytes")  # type: ignore[arg-type]
    assert exact(inner) is inner


def test_progress_bars_move_the_cursor_and_what_they_show_does_not() -> None:
    inner = Terminal()
    stream = EscapedStream(inner, cursor=True)
    stream.write("\r\x1b[K50 % \x1b[2J\r")
    assert inner.getvalue() == "\r\x1b[K50 % \\x1b[2J\\x0d"
    with click.progressbar(length=2, label="features", file=stream) as bar:
        bar.update(1)
    assert "\\x" not in inner.getvalue()[20:] and "features" in inner.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_click_does_not_go_around(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    monkeypatch.setattr(sys, "stdout", EscapedStream(sys.stdout))
    click.echo(EVIL + "é", color=True)
    assert raw.getvalue().decode() == f"{SHOWN}é\n"


def test_words_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown commands, options, files and settings, as click and as Stillhouse report them."""
    for words in (
        [EVIL],
        ["corpus", "check", f"--{EVIL}"],
        ["corpus", "check", EVIL],
        ["extract", "c", "s", "--dtype", EVIL],
        ["inspect", "info", EVIL],
        ["inspect", "verify", "s", "--sample", EVIL],
        ["score", EVIL],
        ["train", EVIL],
        ["study", EVIL],
        ["report", EVIL],
        ["decode", EVIL, EVIL],
        ["corpus", "import", "text", EVIL, "o"],
        ["--debug", "inspect", "info", EVIL],
    ):
        with pytest.raises(SystemExit) as e:
            main(words)
        said = capsys.readouterr()
        assert e.value.code and "\\x1b[2J" in said.err and not UNSAFE & set(said.out + said.err), words


@pytest.fixture
def evil_corpus(tmp_path: Path) -> Path:
    """Ids cannot have control characters, but they can have others that reorder text. Other fields can have all."""
    lines = [
        {
            "id": f"u\u202e{i}",
            "text": f"one {EVIL} two",
            "speaker": EVIL,
            "session": f"s\u2066{i}",
            "meta": {EVIL: EVIL},
        }
        for i in range(4)
    ]
    path = tmp_path / EVIL / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_a_corpus_says(evil_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hyp = evil_corpus.with_name("hyp.jsonl")
    lines = [{"id": f"u\u202e{i}", "hyp": f"one {EVIL}"} for i in range(4)]
    hyp.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    seen = ""
    score = ["score", hyp, "--corpus", evil_corpus]
    for words in (
        ["corpus", "info", evil_corpus],
        ["corpus", "info", evil_corpus, "--json"],
        ["corpus", "check", evil_corpus],
        ["corpus", "check", evil_corpus, "--json"],
        [*score, "--by", "speaker", "--errors", 2],
        [*score, "--by", "speaker", "--json"],
    ):
        with pytest.raises(SystemExit):
            main([str(w) for w in words])
        said = capsys.readouterr()
        assert not UNSAFE & set(said.out + said.err), words
        seen += said.out
    assert "\\u202e" in seen and "\\x1b" in seen


def test_on_a_terminal(evil_corpus: Path) -> None:
    """A real terminal, so that click sees one, too."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli", "corpus", "info", str(evil_corpus)], stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode().replace("\r\n", "\n")
    assert done.returncode == 0 and "\\x1b[2J" in said and not UNSAFE & set(said)

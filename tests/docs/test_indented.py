"""Commands that a page shows without running them, indented by four spaces, parse like those that run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def shown(text: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, command) of a page, lines that end in a backslash joined to the next."""
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if line.startswith("    stillhouse "):
            while line.endswith("\\"):
                line = line.removesuffix("\\") + next(lines)[1].strip()
            yield number, line.strip()


SHOWN = [
    (page.name, number, line)
    for page in sorted(DOCS.rglob("*.md"))
    for number, line in shown(page.read_text(encoding="utf-8"))
    if page.name != "cli.md" and "OPTIONS" not in line and "…" not in line
]


def test_indented_commands_parse(shell: SimpleNamespace) -> None:
    assert any(name == "corpus.md" for name, _, _ in SHOWN)
    assert any(name == "log.md" and "--out runs/kathleen-short" in line for name, _, line in SHOWN)
    wrong = []
    for name, number, line in SHOWN:
        for words in shell.pipeline(line):
            try:
                if words[0] == "stillhouse":
                    shell.check(words)
            except click.UsageError as e:
                wrong.append(f"{name}:{number}: {e.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_one_would_be_seen(shell: SimpleNamespace) -> None:
    with pytest.raises(click.UsageError):
        shell.check(["stillhouse", "corpus", "import", "kaldi", "data/train", "corpus.jsonl", "--allow-shell"])

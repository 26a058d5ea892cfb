"""Commands that a page shows without running them, indented by four spaces, parse like those that run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import click
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHOWN = [
    (page.name, number, line.strip())
    for page in sorted(DOCS.glob("*.md"))
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    if line.startswith("    stillhouse ") and page.name != "cli.md" and "OPTIONS" not in line and "…" not in line
]


def test_indented_commands_parse(shell: SimpleNamespace) -> None:
    assert any(name == "corpus.md" for name, _, _ in SHOWN)
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

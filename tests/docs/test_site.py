"""The pages of docs/ as a site: every page is in the navigation, and mkdocs builds them without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_navigation_names_every_page() -> None:
    named = re.findall(r"^ *- .*: (\S+\.md)$", (ROOT / ".mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'stillhouse[docs]'")
    done = build(ROOT / ".mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html")}
    assert "<table>" in pages["faq.html"] and 'class="language-python"' in pages["python.html"]
    assert not [name for name, text in pages.items() if "```" in text]  # a fence that Markdown did not understand


def test_a_link_that_leads_nowhere_would_be_seen(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'stillhouse[docs]'")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](b.md#there)\n")
    text = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    text = text[: text.index("nav:")].replace("tests/docs/", f"{ROOT}/tests/docs/")
    (tmp_path / ".mkdocs.yml").write_text(text + "nav:\n  - A: index.md\n")
    done = build(tmp_path / ".mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "b.md" in done.stderr, done.stderr

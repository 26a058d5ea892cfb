"""Tables in a terminal of 80 columns: long names and ids are whole, and no line is longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.inspect.show.terminal import fitted, table, width
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request

TEACHERS = ("sentence-transformers-all-MiniLM-L6-v2", "Qwen2.5-0.5B-Instruct-GPTQ-Int4")
IDS = [f"call-center-2024-{i // 3:04}-channel-left-speaker-{i:06}-segment-{i:08}" for i in range(12)]


@pytest.fixture(scope="module")
def wide(known: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w")
    spoken = [" ".join(f"w{(i * 7 + j * j) % 30}" for j in range(8)) for i in range(12)]
    corpus = Corpus(folder / "c", [Utterance(id=i, text=t, session=i[:21]) for i, t in zip(IDS, spoken)])
    for teacher in TEACHERS:
        request = Request(teacher, (0, 1, 2, 3, 4), ("alone", "both:32"))
        extract(folder / "s", corpus, known.Teacher(), request)
    return folder / "s"


def test_no_line_is_longer(
    wide: Path, stillhouse: Callable[..., SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    views = f"{TEACHERS[0]}/alone/*,{TEACHERS[0]}/both:32/*"
    for words in (
        ("inspect", "info", wide),
        ("inspect", "ls", wide),
        ("inspect", "ls", wide, "--utterances"),
        ("inspect", "show", wide, IDS[0]),
        ("inspect", "stats", wide),
        ("inspect", "similarity", wide),
        ("inspect", "neighbours", wide, f"{IDS[0]}:2", "--view", f"{TEACHERS[1]}/both:32/4"),
        ("inspect", "compare", wide, IDS[0], "--views", views),
        ("inspect", "diff", wide, wide),
        ("inspect", "tree", wide),
        ("extract", wide / "store.json", wide, "--status"),
    ):
        said = stillhouse(*words)
        assert said.code == 0, said.err
        long = [line for line in said.out.splitlines() if width(line) > 80 and str(wide) not in line]
        assert not long, (words, long)
        shown = said.out.split()
        if words[1] in ("ls", "stats", "similarity", "diff"):
            named = IDS if "--utterances" in words else [f"{t}/both:32/4" for t in TEACHERS]
            assert set(named) <= set(shown)
        if words[1] in ("show", "neighbours"):
            assert {IDS[0], f"{IDS[0]}:"} & set(shown)


def test_a_table_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("a" * 30, "1,234", "yes"), ("b", "5", "no")]
    assert fitted(rows, right="lrl", header=("name", "count", "is")) == "\n".join(
        ["name", "  count  is", "a" * 30, "  1,234  yes", "b", "      5  no"]
    )
    monkeypatch.setenv("COLUMNS", "50")
    assert fitted(rows, right="lrl", header=("name", "count", "is")) == table(
        rows, right="lrl", header=("name", "count", "is")
    )
    monkeypatch.setenv("COLUMNS", "40")
    many = fitted([("x" * 41, *range(12))], right="l" + "r" * 12, header=("name", *(f"col{i}" for i in range(12))))
    assert many.count("x" * 41) == 2 and all(len(line) <= 41 for line in many.splitlines())

"""The page: alignments by hand, nothing from elsewhere in it, and nothing of a corpus read as markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from stillhouse.train.report.demo import DemoPage, ErrorRow, Stage, render
from stillhouse.train.report.html import clock, curve, read_metrics, section, size, step_times
from stillhouse.train.score.wer import score

ALIKE = [("sea", "see"), ("knight", "night")]


def test_words_that_sound_alike_are_found_by_hand() -> None:
    found = section("s", "", [("u", "the knight saw the blue sea", "the night saw blue sea too")], ALIKE)
    assert [(p.kind, p.ref, p.hyp) for p in found.shown[0].pairs] == [
        ("=", "the", "the"),
        ("S", "knight", "night"),
        ("=", "saw", "saw"),
        ("D", "the", ""),
        ("=", "blue", "blue"),
        ("=", "sea", "sea"),
        ("I", "", "too"),
    ]
    assert found.confusions == [("knight", "night", 1, True)] and found.alike == 1
    found = section("s", "", [("u", "one two", "see you"), ("v", "", "a b"), ("w", "a b", ""), ("x", "", "")], ALIKE)
    assert found.confusions == [("one", "see", 1, False), ("two", "you", 1, False)] and found.alike == 0
    assert [[(p.kind, p.ref, p.hyp) for p in u.pairs] for u in found.shown[1:]] == [
        [("I", "", "a"), ("I", "", "b")],
        [("D", "a", ""), ("D", "b", "")],
        [],
    ]


def test_a_section_shows_an_even_spread_and_counts_confusions() -> None:
    found = section(
        "s", "", [(f"u{k}", "by the sea", "by the see" if k % 2 else "by sea") for k in range(100)], ALIKE, 10
    )
    assert [p.id for p in found.shown] == [f"u{k}" for k in range(0, 100, 10)]
    assert found.confusions == [("sea", "see", 50, True)]
    assert (found.substitutions, found.alike) == (50, 50)
    assert [u.errors for u in found.utterances[:2]] == [1, 1]


def test_torn_metrics(tmp_path) -> None:
    (tmp_path / "m.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert read_metrics(tmp_path / "m.jsonl") == [{"kind": "train", "step": 1}]


def test_step_times_are_means_and_sorted() -> None:
    lines = [{"kind": "train", "time": {"loss": 1.0, "data": 0.5}}, {"kind": "train", "time": {"loss": 2.0}}]
    assert step_times(lines) == [("loss", 1.5), ("data", 0.25)]


def test_figures_follow_the_colours_of_the_page_and_are_the_same_twice() -> None:
    points = {"a": [(1.0, 2.0), (2.0, 1.0)], "b": [(1.0, 1.0)], "none": []}
    svg = curve(points, "loss")
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg and ">none<" not in svg
    assert svg == curve(points, "loss")
    assert curve({"a": []}, "loss") == ""
    other = set(re.findall(r'id="([^"]+)"', curve(points, "x", name="other")))
    shared = set(re.findall(r'(?:clip-path="url\(|xlink:href=")#([^")]+)', svg)) & other
    assert not shared  # two figures of a page would clip each other


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (5e16, "5e+04 TB")])
def test_sizes(value: float, text: str) -> None:
    assert size(value) == text


def test_clock() -> None:
    assert (clock(9.96), clock(60), clock(605)) == ("10.0 s", "1 min 00 s", "10 min 05 s")


class Page(HTMLParser):
    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(**changes) -> tuple[str, Page]:
    found = section("test", "Words.", [("u<1>", "the knight", "the <b>night</b>")], ALIKE)
    facts = {
        "path": "t.zarr",
        "utterances": 3,
        "bytes": 1500,
        "teachers": [
            {
                "name": "m",
                "model": "org/model",
                "kind": "encoder",
                "width": 4,
                "depth": 2,
                "tokens": 12345,
                "dtype": "float16",
                "transform": "none",
                "views": ["m/alone/1"],
            }
        ],
    }
    metrics = [
        {"kind": "train", "step": k, "rnnt": 9.0 / k, "ctc": 8.0 / k, "transfer/m/alone/1": 0.5, "time": {"loss": 0.1}}
        for k in (1, 2)
    ]
    made = {
        "title": "A <run>",
        "lead": "What & why",
        "rows": [ErrorRow("test", "All.", score(["a b"], ["a c"]), 0.3)],
        "sections": [found],
        "metrics": [*metrics, {"kind": "dev", "step": 2, "wer": 0.5, "cer": 0.25}],
        "store": facts,
        "stages": [Stage("train", "stillhouse train a.toml > b", 61.0)],
    } | changes
    text = render(DemoPage(**made))
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    return text, parser


def test_the_page_is_whole_and_takes_nothing_from_elsewhere() -> None:
    text, parser = page()
    assert all(link.startswith("#") for link in parser.links)
    assert not parser.tags & {"script", "img", "link", "iframe"} and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for words in ("50.0 %", "fails: at most 30 %", "12,345", "1.5 kB", "1 min 01 s", "m/alone/1", "Error rate on dev"):
        assert words in text, words
    assert text.count("<figure>") == 3


def test_what_a_corpus_says_is_not_markup() -> None:
    text, parser = page()
    assert "b" not in parser.tags
    assert "u&lt;1&gt;" in text and "&lt;b&gt;night&lt;/b&gt;" in text and "A &lt;run&gt;" in text


def test_a_page_of_next_to_nothing() -> None:
    text, _ = page(sections=(), metrics=(), store=None, stages=(), rows=[ErrorRow("test", "All.", score(["a"], ["a"]))])
    assert "<figure>" not in text and "The commands" not in text and "0.0 %" in text


def test_a_good_score_passes() -> None:
    assert ErrorRow("t", "", score(["a b c d"], ["a b c d"]), 0.0).passed
    assert not ErrorRow("t", "", score(["a b"], ["a c"]), 0.49).passed

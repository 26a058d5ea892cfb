"""What decode writes is what score reads, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.data.errors import CorpusError, UsageError
from stillhouse.train.decode.align import Alignment
from stillhouse.train.decode.decode import Hypothesis, ScoredText
from stillhouse.train.decode.emissions import Word
from stillhouse.train.decode.stream import StreamResult
from stillhouse.train.decode.write import FORMATS, check_ids, hypothesis_lines, is_textgrid, stream_lines, textgrid
from stillhouse.train.score.hypotheses import read_hypotheses

WORDS = [Word("oh", 0.04, 0.12, 0.61), Word("(so)", 0.12, 0.16, 0.4)]


def hypothesis(id: str, words: list[Word], ref: str = "oh no") -> Hypothesis:
    text = " ".join(w.text for w in words)
    return Hypothesis(id, text, ref, [ScoredText(text, -3.5, -3.0, -0.5, words), ScoredText("o", -4.0, -4.0, 0.0, [])])


FOUND = [hypothesis("a-1", WORDS), hypothesis("a-2", [], ""), hypothesis("b", WORDS[1:])]
REFERENCES = {"a-1": "oh no", "a-2": "", "b": "oh no", "c": "not decoded"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("named", [False, True])
def test_there_and_back(tmp_path: Path, kind: str, named: bool) -> None:
    path = tmp_path / (f"hyp.{kind}" if named else "hyp")
    lines = [line for found in FOUND for line in hypothesis_lines(found, kind, 2)]
    path.write_text("\n".join(lines) + "\n")
    expected = [("a-1", "oh no", "oh (so)"), ("a-2", "", ""), ("b", "oh no", "(so)")]
    assert read_hypotheses(path, REFERENCES) == expected
    if kind == "jsonl":
        assert read_hypotheses(path) == expected
        return
    with pytest.raises(CorpusError, match="--corpus"):
        read_hypotheses(path)
    with pytest.raises(CorpusError, match=r"hyp.*:1: the corpus has no utterance 'a-1'"):
        read_hypotheses(path, {})


def test_lines_by_hand() -> None:
    assert hypothesis_lines(FOUND[0], "trn") == ["oh (so) (a-1)"]
    assert hypothesis_lines(FOUND[1], "trn") == ["(a-2)"]
    assert hypothesis_lines(FOUND[0], "text") == ["a-1 oh (so)"]
    assert hypothesis_lines(FOUND[1], "text") == ["a-2"]
    assert hypothesis_lines(FOUND[0], "ctm") == ["a-1 1 0.04 0.08 oh 0.610", "a-1 1 0.12 0.04 (so) 0.400"]
    assert hypothesis_lines(FOUND[1], "ctm") == [";; a-2: nothing was heard"]
    record = json.loads(hypothesis_lines(FOUND[0], "jsonl", 2)[0])
    assert record["words"][0] == {"word": "oh", "start_s": 0.04, "end_s": 0.12, "confidence": 0.61}
    assert [(r["hyp"], r["score"], r["acoustic"], r["fused"]) for r in record["nbest"]] == [
        ("oh (so)", -3.5, -3.0, -0.5),
        ("o", -4.0, -4.0, 0.0),
    ]


def test_partial_results_are_no_hypotheses(tmp_path: Path) -> None:
    ranked = FOUND[0].ranked
    told = [
        StreamResult(0, 0.0, 0.32, False, ranked[1:]),
        StreamResult(0, 0.0, 0.5, True, ranked),
        StreamResult(1, 0.5, 1.0, True, ranked),
    ]
    path = tmp_path / "live.jsonl"
    path.write_text("\n".join(line for h in told for line in stream_lines(h, "jsonl", "talk", True)))
    assert read_hypotheses(path, {"talk-0001": "x", "talk-0002": "y"}) == [
        ("talk-0001", "x", "oh (so)"),
        ("talk-0002", "y", "oh (so)"),
    ]
    assert [line.split()[0] for line in stream_lines(told[1], "ctm", "talk", True)] == ["talk", "talk"]


@pytest.mark.parametrize(
    "kind, id",
    [("trn", "a(b"), ("trn", "b)"), ("trn", "a b"), ("ctm", "a\tb"), ("ctm", ";;a"), ("text", "a b"), ("text", "")],
)
def test_ids_that_a_format_cannot_hold(kind: str, id: str) -> None:
    with pytest.raises(UsageError, match="--format jsonl"):
        check_ids(["fine", id], kind)
    check_ids(["fine", id], "jsonl")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.trn", "oh no (a-1)\nno id here\n", "a.trn:2: this is not a line of trn"),
        ("a.ctm", "a-1 1 0.0 0.1 oh\na-1 1 zero 0.1 no\n", "a.ctm:2: this is not a line of ctm"),
        ("a", "a-1 oh\na-1 no\n", "a:2: this is a second hypothesis of 'a-1'"),
        (
            "a.jsonl",
            '{"id": "a-1", "hyp": "x"}\n[1]\n',
            "a.jsonl:2: this is not a hypothesis: it has no id and hyp",
        ),
        ("a.jsonl", '{"id": "a-1", "text": "x"}\n', "a.jsonl:1: this is not a hypothesis: it has no id and hyp"),
        ("a", " \n", "no hypothesis"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError) as e:
        read_hypotheses(tmp_path / name, REFERENCES)
    assert words in str(e.value)


def test_an_edited_textgrid_is_no_output_of_align() -> None:
    ours = textgrid(Alignment("a", 1.0, [Word("oh", 0.1, 0.4, 0.9)])).encode()
    edited_by_praat = ours.replace(b"\n", b" \n").replace(b'" \n', b'"\n', 2)
    assert is_textgrid(ours[:4096]) and not is_textgrid(edited_by_praat) and not is_textgrid(b"\xff")

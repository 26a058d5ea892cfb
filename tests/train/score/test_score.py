"""Error rates, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.train.score.hypotheses import read_hypotheses
from stillhouse.train.score.wer import score


def test_rates_by_hand() -> None:
    #       1 substitution, 1 deletion of 4       2 insertions of 1     right
    refs = ["the cat sat down", "yes", "no no"]
    hyps = ["the hat sat", "oh yes yes", "no no"]
    found = score(refs, hyps)
    assert (found.wer.substitutions, found.wer.deletions, found.wer.insertions, found.wer.reference) == (1, 1, 2, 7)
    assert found.wer.rate == pytest.approx(4 / 7)
    assert found.wer.low <= found.wer.rate <= found.wer.high and found.wer.low < found.wer.high
    assert found.cer.reference == 16 + 3 + 5


def test_an_empty_reference_counts_what_was_heard() -> None:
    found = score(["", "a b"], ["x y", "a b"])
    assert (found.wer.insertions, found.wer.reference) == (2, 2)
    assert found.wer.rate == 1.0


def test_the_same_hypotheses_give_the_same_interval() -> None:
    refs, hyps = ["a b c", "d e", "f"] * 5, ["a b x", "d e", "g"] * 5
    assert score(refs, hyps) == score(refs, hyps)


def test_a_line_that_is_no_hypothesis_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hyp.jsonl"
    path.write_text(json.dumps({"id": "a", "hyp": "x", "ref": "x"}) + '\n{"id": "b"}\n')
    with pytest.raises(CorpusError, match=r"hyp\.jsonl:2"):
        read_hypotheses(path)
    path.write_text("")
    with pytest.raises(CorpusError, match="no hypothesis"):
        read_hypotheses(path)

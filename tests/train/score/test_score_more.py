"""Alignments, parts, and whether a difference means anything: by hand, by swapping, by simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.cli import cli
from stillhouse.data.errors import CorpusError, UsageError
from stillhouse.data.manifest import Utterance, write_manifest
from stillhouse.train.score.alignment import align_utterance, align_words, as_text, frequent_errors
from stillhouse.train.score.groups import score_groups, worst_utterances
from stillhouse.train.score.significance import compare_systems, same_utterances, segments
from stillhouse.train.score.wer import error_counts, rate

WORDS = st.lists(st.sampled_from("abc"), max_size=8).map(" ".join)


def test_an_alignment_by_hand() -> None:
    pairs = align_words("the cat sat down", "a the hat sat")
    assert [(p.kind, p.ref, p.hyp) for p in pairs] == [
        ("I", "", "a"), ("=", "the", "the"), ("S", "cat", "hat"), ("=", "sat", "sat"), ("D", "down", ""),
    ]  # fmt: skip
    assert as_text(pairs) == ("  ref · the cat sat down\n  hyp a the hat sat ·\n      I     S       D")
    assert as_text(pairs, width=10).count("ref") == 2
    assert frequent_errors([pairs, pairs]) == {"S": [("cat → hat", 2)], "D": [("down", 2)], "I": [("a", 2)]}
    assert [p.kind for p in align_words("", "x y") + align_words("z", "")] == ["I", "I", "D"]


@given(ref=WORDS, hyp=WORDS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_alignments_have_the_errors_that_are_counted(ref: str, hyp: str) -> None:
    pairs = align_words(ref, hyp)
    assert align_utterance("u", ref, hyp).errors == error_counts([ref], [hyp])[0, :3].sum()
    assert " ".join(p.ref for p in pairs if p.ref) == ref and " ".join(p.hyp for p in pairs if p.hyp) == hyp


def test_segments_by_hand() -> None:
    """Two words that both have right end a segment; one does not."""
    ref = "a b c d e f g h"
    one, two = "x b c d e f g h", "a b c d x f y h"
    assert segments(align_words(ref, one), align_words(ref, two)) == [(1, 0), (0, 2)]
    assert segments(align_words(ref, one), align_words(ref, one)) == [(1, 1)]
    assert segments(align_words(ref, ref), align_words(ref, ref)) == []
    late = "a b c d e f g h i j"
    assert segments(align_words(ref, late), align_words(ref, "a b q c d e f g h")) == [(0, 1), (2, 0)]


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=2, max_size=8))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_swapped_sets_change_signs_alone(rows: list[tuple[str, str, str]]) -> None:
    refs, one, two = (list(column) for column in zip(*rows, strict=True))
    there, back = (compare_systems(refs, a, b, resamples=200) for a, b in ((one, two), (two, one)))
    assert (there.better, there.worse, there.stretches) == (back.worse, back.better, back.stretches)
    assert there.difference == -back.difference and there.low == pytest.approx(-back.high)
    assert (there.p_bootstrap, there.p_matched_pairs) == (back.p_bootstrap, back.p_matched_pairs)
    gap = error_counts(refs, one)[:, :3].sum() - error_counts(refs, two)[:, :3].sum()
    total = sum(a - b for r, x, y in rows for a, b in segments(align_words(r, x), align_words(r, y)))
    assert gap == total


def test_chance_is_called_chance_and_a_real_difference_is_seen() -> None:
    """Random errors of equal rates: p below 0.1 in about a tenth of the cases; of unequal rates: nearly always."""
    rng = np.random.default_rng(3)
    refs = [" ".join(f"w{k}" for k in range(12))] * 150

    def heard(share: float) -> list[str]:
        return [" ".join("x" if rng.random() < share else w for w in ref.split()) for ref in refs]

    alike = [compare_systems(refs, heard(0.1), heard(0.1), resamples=300) for _ in range(30)]
    for name in ("p_bootstrap", "p_matched_pairs"):
        assert sum(getattr(c, name) < 0.1 for c in alike) <= 8
    clear = compare_systems(refs, heard(0.05), heard(0.12), resamples=1000)
    assert clear.p_bootstrap < 0.01 and clear.p_matched_pairs is not None and clear.p_matched_pairs < 0.01
    assert clear.high < 0 < clear.better


def test_parts_add_up() -> None:
    refs, hyps = ["a b", "c d e", "f", ""], ["a x", "c d e", "g h", "i"]
    names = ["p", "q", "p", ""]
    groups = score_groups(names, refs, hyps)
    assert [(g.name, g.utterances, g.wer.reference) for g in groups] == [("", 1, 0), ("p", 2, 3), ("q", 1, 3)]
    whole = rate(error_counts(refs, hyps))
    for field in ("substitutions", "deletions", "insertions", "reference"):
        assert sum(getattr(g.wer, field) for g in groups) == getattr(whole, field)
    assert [(u.id, u.errors) for u in worst_utterances([("1", "a", "a"), ("2", "a b", "c d"), ("3", "a", "b")])] == [
        ("2", 2),
        ("3", 1),
    ]


def test_other_utterances_are_refused() -> None:
    mine = [("a", "x", "x"), ("b", "y", "y")]
    assert same_utterances(mine, [("b", "y", "2"), ("a", "x", "1")], "f") == ["1", "2"]
    for others, match in (
        (mine[:1], "1 utterances, not 2"),
        ([("a", "x", ""), ("c", "y", "")], "no hypothesis of b"),
        ([("a", "x", ""), ("b", "z", "")], "another transcript of b"),
    ):
        with pytest.raises(CorpusError, match=match):
            same_utterances(mine, others, "f")


def test_the_command(tmp_path: Path) -> None:
    def lines(name: str, *hyps: str) -> Path:
        refs = ["The cat sat.", "Yes", "no <b>no</b>"]
        rows = [{"id": f"u{k}", "ref": r, "hyp": h} for k, (r, h) in enumerate(zip(refs, hyps, strict=True))]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    one, two = lines("1.jsonl", "the cat", "yes", "no no"), lines("2.jsonl", "the bat sat", "yes", "no <b>no</b>")
    speakers = ("ann", "bob", None)
    write_manifest(tmp_path / "c.jsonl", [Utterance(id=f"u{k}", text="", speaker=s) for k, s in enumerate(speakers)])

    def score(*words: object) -> str:
        result = CliRunner().invoke(cli, ["score", *map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    plain = json.loads(score(one, "--json"))
    assert plain["wer"]["substitutions"] == 3 and plain["wer"]["deletions"] == 1
    options = ["--corpus", tmp_path / "c.jsonl", "--by", "speaker", "--against", two, "--errors", 5]
    options += ["--transform", "lower+no_punct+squeeze", "--html", tmp_path / "new" / "e.html"]
    facts = json.loads(score(one, *options, "--json"))
    assert {g["name"]: g["wer"]["rate"] for g in facts["groups"]} == {"ann": pytest.approx(1 / 3), "bob": 0, "": 0.5}
    assert facts["comparison"]["better"] == 0 and facts["comparison"]["difference"] == pytest.approx(2 / 8)
    assert [u["id"] for u in facts["errors"]] == ["u2", "u0"]
    page = (tmp_path / "new" / "e.html").read_text()
    assert "<del>sat</del>" in page and "Against" in page and "By speaker" in page
    raw = score(one, "--html", tmp_path / "raw.html", "--errors", 1)
    assert "1 × Yes → yes" in raw and "ref The cat sat." in raw
    assert "&lt;b&gt;no&lt;/b&gt;" in (tmp_path / "raw.html").read_text()
    assert "(none)" in score(one, *options[:4]) and "by paired bootstrap" in score(one, "--against", two)
    for words, error in (
        (["--by", "speaker"], UsageError),
        (["--transform", "x"], UsageError),
        (["--by", "speaker"], UsageError),
    ):
        with pytest.raises(error):
            score(one, *words)
    with pytest.raises(CorpusError, match="no utterance has a session"):
        score(one, "--corpus", tmp_path / "c.jsonl", "--by", "session")

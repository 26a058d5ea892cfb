"""Held-out sentences in training text: against sets of 6-grams, whole sentences, and what counts as the same."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.corpus import overlap
from stillhouse.data.corpus.overlap import GRAM, overlap_findings, words_of
from stillhouse.data.manifest import Utterance, write_manifest

Rows = list[tuple[str, Utterance]]


def rows(**splits: list[str]) -> Rows:
    """The texts of each split, with their places."""
    found = [
        Utterance(id=f"{s}-{k}", text=t, split=s.replace("_", "-"))
        for s, ts in splits.items()
        for k, t in enumerate(ts)
    ]
    return [(f"c.jsonl:{n}", u) for n, u in enumerate(found, start=1)]


def counts(found: Rows) -> list[tuple[str, int]]:
    return [(id.rsplit("-", 1)[0], int(what.split()[0])) for _, _, id, what, _ in overlap_findings(found)]


def test_whole_sentences_whatever_their_spelling() -> None:
    found = list(
        overlap_findings(
            rows(
                train=["Nothing of it.", "The cat -- isn\u2019t it? -- sat down"],
                text=["THE CAT ISN'T IT SAT DOWN", "yes please"],
                test_clean=["the cat isnt it sat down", "Yes, please!", "another sentence altogether"],
            )
        )
    )
    ((kind, where, id, what, remedy),) = found
    assert (kind, where, id) == ("overlap", "c.jsonl:5", "test_clean-0")
    assert what.startswith("1 of the 3 sentences of test-clean are whole sentences of the training text")
    assert "'the cat isnt it sat down', like train-1 at c.jsonl:2" in what and "--ignore overlap" in remedy


def test_part_of_a_longer_line_counts_by_its_6_grams() -> None:
    inside = "one two three four five six seven"
    half = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    found = rows(text=[f"now {inside} and so on"], dev=[inside, half, "six five four three two one zero"])
    ((_, where, id, what, _),) = overlap_findings(found)
    assert (where, id) == ("c.jsonl:2", "dev-0")
    assert what.startswith("1 of the 3 sentences of dev have half or more of their 6-grams") and "c.jsonl:1" in what


def test_no_split_is_held_out_or_all_are() -> None:
    assert counts(rows(train=["one two three"], text=["one two three"])) == []
    assert counts(rows(dev=["one two three"], test=["one two three"])) == []  # neither is training text


def test_characters_of_scripts_without_spaces_are_words() -> None:
    text = "今天天气很好我们去公园"
    assert words_of(text + "。 OK") == [*text, "ok"]
    assert counts(rows(train=[f"因为{text}玩"], test=[text])) == [("test", 1)]
    assert counts(rows(train=["明天天气不好他们回家"], test=[text])) == []


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_against_sets_of_6_grams(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BLOCK", block)
    rng = random.Random(4)
    train = [" ".join(rng.choices("ab", k=rng.randrange(0, 14))) for _ in range(12)]
    test = [" ".join(rng.choices("aaabbbc", k=rng.randrange(0, 14))) for _ in range(80)]
    test += rng.sample(train, 9)

    def grams(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[k : k + GRAM]) for k in range(len(words) - GRAM + 1)]

    known, lines = {gram for text in train for gram in grams(text)}, set(train)
    whole = [text for text in test if text in lines and len(text.split()) >= overlap.SHORTEST]
    shares = [np.mean([gram in known for gram in grams(t)]) for t in test if grams(t) and t not in whole]
    near = sum(share >= overlap.SHARE for share in shares)
    assert whole and 0 < near < len(shares)
    assert counts(rows(train=train, test=test)) == [("test", len(whole)), ("test", near)]


def test_the_place_is_that_of_the_first_training_text() -> None:
    inside = "one two three four five six"
    places = ["x", f"a {inside}", f"{inside} b"]
    ((_, _, _, what, _),) = overlap_findings(rows(train=places, test=["nothing", f"z {inside}"]))
    assert what.endswith("as at c.jsonl:2")


def test_check_reports_it_and_can_accept_it(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    write_manifest(path, [u for _, u in rows(text=["a b c"], test=["A b c."])])
    made = CliRunner().invoke(cli, ["corpus", "check", str(path), "--json"])
    assert made.exit_code == 1
    (finding,) = json.loads(made.stdout)["findings"]
    assert (finding["kind"], finding["line"], finding["id"]) == ("overlap", 2, "test-0")
    assert re.search("text-0 at .*corpus.jsonl:1", finding["what"])
    assert CliRunner().invoke(cli, ["corpus", "check", str(path), "--ignore", "overlap"]).exit_code == 0

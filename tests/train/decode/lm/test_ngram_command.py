"""`corpus ngram`: which transcripts it counts, how it spells them, and which files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import stillhouse

from stillhouse.data.errors import UsageError
from stillhouse.data.manifest import Utterance, write_manifest
from stillhouse.data.units import train_units
from stillhouse.train.decode.ngram import read_arpa


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Speech in two splits, and text alone in a third."""
    rows = [
        Utterance(id="s1", text="One, two!", audio="a.wav", split="train"),
        Utterance(id="s2", text="two three", audio="b.wav", split="test-new"),
        Utterance(id="t1", text="ONE two one", split="text"),
        Utterance(id="t2", text="...", split="text"),
    ]
    write_manifest(tmp_path / "corpus.jsonl", rows)
    return tmp_path / "corpus.jsonl"


def test_text_alone_counts_and_held_out_splits_do_not(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.arpa.gz"
    made = stillhouse("corpus", "ngram", corpus, out, "--order", 2, "--held-out", "test-new", "--json")
    assert "test-new are not counted" in made.stderr
    facts = json.loads(made.stdout)
    assert (facts["sentences"], facts["words"], facts["ngrams"]) == (2, 5, [5, 5])
    assert (facts["held_out"]["test-new"]["words"], facts["held_out"]["test-new"]["unknown"]) == (2, 1)
    assert set(read_arpa(out).words) == {"<s>", "</s>", "<unk>", "one", "two"}
    named = stillhouse("corpus", "ngram", corpus, out, "--split", "test-new", "--json")
    assert json.loads(named.stdout)["words"] == 2 and "Do not decode it with this model" in named.stderr


def test_units_and_their_spelling(corpus: Path, tmp_path: Path) -> None:
    train_units(["ONE TWO"], "characters", transform="upper+no_punct").save(tmp_path / "units")
    words, units = tmp_path / "w.arpa", tmp_path / "u.arpa"
    stillhouse("corpus", "ngram", corpus, words, "--units", tmp_path / "units", "--split", "text")
    assert {"ONE", "TWO"} <= read_arpa(words).words.keys()
    options = ("--units", tmp_path / "units", "--unit", "unit", "--order", 4)
    facts = json.loads(stillhouse("corpus", "ngram", corpus, units, *options, "--json").stdout)
    assert (facts["words"], facts["unit"]) == (len("ONE TWO" + "ONE TWO ONE"), "unit")
    assert {"O", "N", "E", "▁", "<unk>"} <= read_arpa(units).words.keys()
    stillhouse("corpus", "ngram", corpus, units, "--unit", "unit", error=UsageError, match="needs the units")
    both = ("--units", tmp_path / "units", "--transform", "lower")
    stillhouse("corpus", "ngram", corpus, units, *both, error=UsageError, match="their own transform")


def test_files_that_it_did_not_write_stay(corpus: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "mine.arpa"
    foreign.write_text("notes")
    stillhouse("corpus", "ngram", corpus, foreign, error=UsageError, match="no earlier call")
    stillhouse("corpus", "ngram", corpus, corpus, "--force", error=UsageError, match="input of the command")
    assert foreign.read_text() == "notes"
    stillhouse("corpus", "ngram", corpus, foreign, "--force")
    stillhouse("corpus", "ngram", corpus, foreign, "--order", 1)  # its own file, again
    assert read_arpa(foreign).order == 1

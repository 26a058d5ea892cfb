from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.data.corpus.split import parse_share, split_corpus
from stillhouse.data.errors import ConfigError, CorpusError
from stillhouse.data.manifest import Corpus, Utterance


def corpus(groups: int, each: int = 3) -> Corpus:
    return Corpus(
        Path("c.jsonl"),
        [
            Utterance(
                id=f"{g}-{k}",
                text="t",
                speaker=f"s{g % 20}",
                meta={"prompt": f"p{g}"},
                split="train" if g % 2 else "old",
            )
            for k in range(each)
            for g in range(groups)
        ],
    )


def sides(utterances: list[Utterance]) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for u in utterances:
        found.setdefault(u.meta["prompt"], set()).add(u.split)
    return found


def test_no_group_is_on_two_sides_and_the_shares_are_met() -> None:
    found = sides(split_corpus(corpus(2000), "prompt", 0.05, 0.1))
    assert all(len(names) == 1 for names in found.values())
    counts = {name: sum(names == {name} for names in found.values()) for name in ("train", "dev", "test")}
    # Three standard deviations of the binomials.
    assert abs(counts["dev"] - 100) < 30
    assert abs(counts["test"] - 200) < 41
    assert sum(counts.values()) == 2000


def test_a_side_stays_when_the_corpus_grows_and_moves_with_the_seed() -> None:
    small, large = (sides(split_corpus(corpus(n), "prompt", 0.1, 0.1)) for n in (200, 2000))
    assert all(large[group] == names for group, names in small.items())
    other = sides(split_corpus(corpus(200), "prompt", 0.1, 0.1, seed=1))
    assert sum(other[g] != small[g] for g in small) > 20
    # A larger test set keeps the smaller one.
    more = sides(split_corpus(corpus(200), "prompt", 0.1, 0.3))
    assert all(more[g] == {"test"} for g in small if small[g] == {"test"})


def test_by_a_field_and_only_some_splits() -> None:
    found = split_corpus(corpus(400), "speaker", 0.2, 0.2, only=["train"])
    assert {u.split for u in found if int(u.meta["prompt"][1:]) % 2 == 0} == {"old"}
    by_speaker: dict[str | None, set[str | None]] = {}
    for u in found:
        if u.split != "old":
            by_speaker.setdefault(u.speaker, set()).add(u.split)
    assert all(len(names) == 1 for names in by_speaker.values())


def test_what_cannot_be_split() -> None:
    with pytest.raises(CorpusError, match=r"60 utterances have no colour, for example 0-0 \(expected .*prompt\)"):
        split_corpus(corpus(20), "colour", 0.1, 0.1)
    with pytest.raises(CorpusError, match=r"no prompt is in (dev|test): there are 2 in all; .*--seed"):
        split_corpus(corpus(2), "prompt", 0.01, 0.01)
    with pytest.raises(ConfigError, match="nothing to train on"):
        split_corpus(corpus(20), "prompt", 0.5, 0.5)
    with pytest.raises(CorpusError, match="no utterance has split nowhere"):
        split_corpus(corpus(20), "prompt", 0.1, 0.1, only=["nowhere"])


def test_shares() -> None:
    assert parse_share("5%") == 0.05
    assert parse_share("0.1") == 0.1
    for bad in ("x", "100%", "-1%", "nan"):
        with pytest.raises(ConfigError, match="share"):
            parse_share(bad)

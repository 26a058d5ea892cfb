"""What the stories promise: enough of them, in order, new sentences out of words that are known."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from stillhouse.data.errors import CorpusError
from stillhouse.train.demo.stories import homophones, parse_stories, read_stories

STORIES = read_stories()


def words(sentence: str) -> list[str]:
    return re.sub(r"[^a-z ]", "", sentence.lower()).split()


def sentences(split: str) -> list[str]:
    return [line for s in STORIES if s.split == split for line in s.sentences]


def test_numbers_and_sizes() -> None:
    assert [s.number for s in STORIES] == list(range(1, len(STORIES) + 1))
    assert len({s.title for s in STORIES}) == len(STORIES) >= 100
    assert len(sentences("train")) >= 1400
    assert len({*sentences("train")}) == len(sentences("train"))
    assert len(sentences("test")) >= 90
    assert all(12 <= len(s.sentences) <= 16 for s in STORIES)


def test_sentences_are_short_plain_and_whole() -> None:
    for line in sentences("train") + sentences("dev") + sentences("test"):
        assert re.fullmatch(r"""["A-Z][A-Za-z,.!?:" ]*[.!?]"?""", line), line
        assert "  " not in line and line.count('"') % 2 == 0, line
        assert 4 <= len(words(line)) <= 12, line


def test_the_vocabulary_is_small() -> None:
    count = Counter(w for s in STORIES for line in s.sentences for w in words(line))
    assert len(count) <= 370
    assert sum(count.values()) / len(count) >= 40
    assert min(Counter(w for line in sentences("train") for w in words(line)).values()) >= 3  # so that none is new


@pytest.mark.parametrize("split", ["dev", "test"])
def test_new_sentences_of_known_words(split: str) -> None:
    train = Counter(w for line in sentences("train") for w in words(line))
    heard = {" ".join(words(line)) for line in sentences("train")}
    new = {" ".join(words(line)) for line in sentences(split)}
    assert not new & heard
    rare = {w: train[w] for line in sentences(split) for w in words(line) if train[w] < 4}
    assert not rare


def test_dev_and_test_share_no_sentence() -> None:
    assert not {*sentences("dev")} & {*sentences("test")}


def test_words_that_sound_alike_are_all_used() -> None:
    train = Counter(w for line in sentences("train") for w in words(line))
    assert sum(len(group) for group in homophones()) >= 60
    assert {w: train[w] for group in homophones() for w in group if train[w] < 6} == {}
    alike = {w for group in homophones() for w in group}
    assert sum(n for w, n in train.items() if w in alike) / sum(train.values()) >= 0.2


def test_a_sentence_before_the_first_title_is_named() -> None:
    with pytest.raises(CorpusError, match=r"tales:2: a sentence before the first title \(expected # Title\)"):
        parse_stories("\nOnce.\n# A\nTwo.", "train", where="tales")


def test_parsing_by_hand() -> None:
    first, second = parse_stories("# A b\nOne.\n\nTwo.\n# C\nThree.\n", "dev", first=7)
    assert (first.number, first.title, first.sentences) == (7, "A b", ("One.", "Two."))
    assert (second.number, second.split, second.sentences) == (8, "dev", ("Three.",))

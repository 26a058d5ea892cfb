"""Kneser-Ney smoothing: numbers worked by hand, sums over all words, a slow reader of the equations, and lmplz."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.errors import CorpusError, UsageError
from stillhouse.train.decode.lm.arpa import is_arpa, write_arpa
from stillhouse.train.decode.lm.kneser_ney import (
    USUAL,
    count_ngrams,
    estimated_discounts,
    kneser_ney,
    perplexity,
)
from stillhouse.train.decode.ngram import LN10, NGram, read_arpa

SMALL = [["a", "b"], ["a", "c"], [], ["a", "b"]]


def some_text(seed: int, sentences: int = 400) -> list[list[str]]:
    """Sentences of words with the frequencies of Zipf, so that all discounts can be estimated."""
    rng = random.Random(seed)
    words = [f"w{k}" for k in range(1000)]
    weights = [1 / (k + 1) for k in range(1000)]
    return [rng.choices(words, weights, k=rng.randrange(1, 9)) for _ in range(sentences)]


def model(sentences: list[list[str]], order: int, *prune: int) -> NGram:
    return kneser_ney(count_ngrams(sentences, order), prune).lm


def p(lm: NGram, text: str) -> float:
    *context, word = (lm.words[w] for w in text.split())
    return math.exp(lm.score(lm.shortened(tuple(context)), word))


def test_a_bigram_model_by_hand() -> None:
    counts = count_ngrams(SMALL, 2)
    assert (counts.sentences, counts.tokens) == (3, 6)
    smoothed = kneser_ney(counts)
    # Of the bigrams, a c and c </s> occur once, a b and b </s> twice, <s> a three times, and none four times.
    y = 2 / (2 + 2 * 2)
    pairs = (1 - 2 * y * 2 / 2, 2 - 3 * y * 1 / 2, 3 - 4 * y * 0 / 1)
    assert smoothed.usual == [1] and smoothed.discounts == [USUAL, pytest.approx(pairs)]
    assert pairs == pytest.approx((1 / 3, 3 / 2, 3))
    lm = smoothed.lm
    # Words by what they follow: a follows <s>, b and c follow a, </s> follows b and c. 5 in all, discounts 3 * 0.5 + 1.
    # The half that is taken off goes to all of a, b, c, </s> and <unk>.
    single = {"a": 0.5 / 5 + 0.1, "b": 0.2, "c": 0.2, "</s>": 1 / 5 + 0.1, "<unk>": 0.1}
    assert sum(single.values()) == pytest.approx(1)
    for word, expected in single.items():
        assert p(lm, word) == pytest.approx(expected)
    # After a: b twice and c once, so that 3/2 and 1/3 of 3 are taken off.
    rest = (3 / 2 + 1 / 3) / 3
    assert p(lm, "a b") == pytest.approx((2 - 3 / 2) / 3 + rest * single["b"])
    assert p(lm, "a c") == pytest.approx((1 - 1 / 3) / 3 + rest * single["c"])
    assert p(lm, "a </s>") == pytest.approx(rest * single["</s>"])
    # a begins three times, and all of that is taken off.
    assert p(lm, "<s> a") == pytest.approx(single["a"])
    assert p(lm, "b </s>") == pytest.approx((2 - 3 / 2) / 2 + 3 / 4 * single["</s>"])
    # Nothing follows an unknown word.
    assert p(lm, "<unk> a") == pytest.approx(single["a"])


def test_a_perplexity_by_hand() -> None:
    lm = model(SMALL, 2)
    # <s> a: 0.2, a b: 1/6 + 11/18 * 0.2, b </s>: 1/4 + 3/4 * 0.3
    known = 0.2 * (1 / 6 + 11 / 90) * (1 / 4 + 0.225)
    assert perplexity(lm, [["a", "b"], []]) == (pytest.approx(known ** (-1 / 3)), 2, 0)
    # <s> c: 0.2. The unknown word counts apart. </s> after it: 0.3
    assert perplexity(lm, [["c", "nope"]]) == (pytest.approx((0.2 * 0.3) ** -0.5), 2, 1)
    assert perplexity(lm, [["a", "b"], ["c", "nope"]]) == (pytest.approx((known * 0.2 * 0.3) ** (-1 / 5)), 4, 1)


def test_discounts_by_hand() -> None:
    own = np.array([1] * 10 + [2] * 4 + [3] * 2 + [4] * 1 + [9] * 5 + [0] * 3)
    y = 10 / 18
    assert estimated_discounts(own) == pytest.approx((1 - 2 * y * 4 / 10, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2))
    assert estimated_discounts(np.array([1, 1, 2])) is None
    assert estimated_discounts(np.array([1, 2, 2, 3, 3, 3, 3, 3, 3, 3])) is None  # the second would be negative


@pytest.mark.parametrize(("order", "prune"), [(1, ()), (2, ()), (3, ()), (4, (0, 0, 1)), (3, (0, 1)), (4, (0, 1, 2))])
def test_all_words_sum_to_one_in_every_context(order: int, prune: tuple[int, ...]) -> None:
    text = some_text(order)
    smoothed = kneser_ney(count_ngrams(text, order), prune)
    lm, rng = smoothed.lm, random.Random(0)
    assert 2 not in smoothed.usual  # Few 4-grams occur twice, so that those have the usual discounts.
    words = [id for word, id in lm.words.items() if word != "<s>"]
    seen = [tuple(lm.words[w] for w in s[:k]) for s in text[:40] for k in range(len(s))]
    begun = [(lm.words["<s>"], *context) for context in seen[:60]]
    unseen = [tuple(rng.choices(words, k=rng.randrange(order))) for _ in range(60)]
    for context in [*seen, *begun, *unseen]:
        row = np.exp(lm.row(lm.shortened(context)))
        assert row[words].sum() == pytest.approx(1, abs=1e-9)
        assert row[words].min() > 0


class Plain:
    """The equations of Chen and Goodman, one probability at a time, with counts in dictionaries."""

    def __init__(self, sentences: list[list[str]], order: int, discounts: list[tuple[float, float, float]]) -> None:
        padded = [["<s>", *s, "</s>"] for s in sentences if s]
        self.raw = [
            Counter(tuple(s[k : k + n]) for s in padded for k in range(len(s) - n + 1)) for n in range(1, order + 1)
        ]
        self.discounts = discounts
        self.words = {w for s in padded for w in s} - {"<s>"} | {"<unk>"}
        self.counts = []
        for n in range(1, order + 1):
            own: dict[tuple[str, ...], int] = {}
            for gram, count in self.raw[n - 1].items():
                different = sum(longer[1:] == gram for longer in self.raw[n]) if n < order else count
                own[gram] = count if gram[0] == "<s>" else different
            own.pop(("<s>",), None)
            self.counts.append(own)

    def p(self, context: tuple[str, ...], word: str) -> float:
        n = len(context) + 1
        below = self.p(context[1:], word) if context else 1 / len(self.words)
        after = {gram[-1]: count for gram, count in self.counts[n - 1].items() if gram[:-1] == context}
        if not after:
            return below
        cut = {w: self.discounts[n - 1][min(count, 3) - 1] for w, count in after.items()}
        total = sum(after.values())
        return (after.get(word, 0) - cut.get(word, 0)) / total + sum(cut.values()) / total * below


def test_against_the_equations() -> None:
    text = some_text(5, 80)
    smoothed = kneser_ney(count_ngrams(text, 3))
    lm, plain = smoothed.lm, Plain(text, 3, smoothed.discounts)
    for sentence in [*text[:12], ["w3", "w0", "w0", "w3"]]:
        padded = ["<s>", *sentence, "</s>"]
        for k in range(1, len(padded)):
            context = tuple(padded[max(0, k - 2) : k])
            assert p(lm, " ".join([*context, padded[k]])) == pytest.approx(plain.p(context, padded[k]))


@pytest.mark.parametrize("name", ["m.arpa", "m.arpa.gz"])
def test_a_file_is_read_back(tmp_path: Path, name: str) -> None:
    lm = model([*some_text(7), ["<unk>", "w1"], ["tür", "▁x"]], 3, 0, 0, 1)
    write_arpa(tmp_path / name, lm)
    again = read_arpa(tmp_path / name)
    assert again.words == lm.words
    for (keys, logp, backoff), (keys2, logp2, backoff2) in zip(lm.tables, again.tables, strict=True):
        assert (keys == keys2).all()
        assert logp2 == pytest.approx(logp, rel=1e-6) and backoff2 == pytest.approx(backoff, rel=1e-6, abs=1e-9)
    first = (tmp_path / name).read_bytes()
    assert is_arpa(first[:4096])
    write_arpa(tmp_path / name, lm)
    assert (tmp_path / name).read_bytes() == first


def test_the_file_of_another_tool_is_not_taken_for_ours() -> None:
    assert not is_arpa(b"\\data\\\nngram 1=3\n\n\\1-grams:\n-1.2\t<unk>\t0\n0\t<s>\t-0.3\n")
    assert not is_arpa(b"\x1f\x8b rest") and not is_arpa(b"")


def test_an_unknown_word_in_the_text_is_the_unknown_word() -> None:
    lm = model([["a", "<unk>"], ["b"]], 2)
    assert lm.words["<unk>"] == 2 and p(lm, "a <unk>") > p(lm, "a b")


def test_sentences_shorter_than_the_order(tmp_path: Path) -> None:
    lm = model([["x"]], 5)
    assert [len(table[0]) for table in lm.tables] == [4, 2, 1, 0, 0]
    write_arpa(tmp_path / "x.arpa", lm)
    assert p(read_arpa(tmp_path / "x.arpa"), "<s> x </s>") == pytest.approx(p(lm, "<s> x </s>"))


def test_what_cannot_be_counted() -> None:
    with pytest.raises(CorpusError, match=r"^mine\.jsonl: there is no word to count"):
        count_ngrams([[]], 2, "mine.jsonl")
    with pytest.raises(CorpusError, match="no word to count"):
        count_ngrams([[], []], 3)
    with pytest.raises(CorpusError, match="the word </s>"):
        count_ngrams([["a"], ["b", "</s>", "c"]], 3)
    counts = count_ngrams(SMALL, 3)
    with pytest.raises(UsageError, match="numbers for 4 orders, and the model has 3"):
        kneser_ney(counts, (0, 0, 1, 1))
    for prune in ((1,), (0, 2, 1)):
        with pytest.raises(UsageError, match="numbers that do not fall"):
            kneser_ney(counts, prune)


def entries(path: Path) -> dict[str, tuple[float, ...]]:
    rows = [line.split("\t") for line in path.read_text().splitlines() if "\t" in line]
    return {row[1]: (float(row[0]), float(row[2]) if len(row) > 2 else 0.0) for row in rows}


@pytest.mark.parametrize("prune", [(), (0, 0, 1), (0, 1, 1)])
def test_equals_lmplz(tmp_path: Path, prune: tuple[int, ...]) -> None:
    lmplz = shutil.which("lmplz")
    if lmplz is None:
        pytest.skip("lmplz of KenLM is not on the PATH")
    text = some_text(11, 3000)
    command = [
        lmplz,
        "-o",
        "3",
        "-S",
        "50M",
        "-T",
        str(tmp_path / "t"),
        *(["--prune", *map(str, prune)] if prune else []),
    ]
    made = subprocess.run(
        command, input="".join(" ".join(s) + "\n" for s in text), capture_output=True, text=True, check=True
    )
    (tmp_path / "theirs.arpa").write_text(made.stdout)
    write_arpa(tmp_path / "ours.arpa", model(text, 3, *prune))
    ours, theirs = entries(tmp_path / "ours.arpa"), entries(tmp_path / "theirs.arpa")
    assert ours.keys() == theirs.keys()
    for gram, values in ours.items():
        at = 1 if gram == "<s>" else 0  # whose own probability is never used
        assert values[at:] == pytest.approx(theirs[gram][at:], abs=1e-5)


def test_ten_to_a_power() -> None:
    lm = model(SMALL, 2)
    assert lm.score((), lm.words["a"]) / LN10 == pytest.approx(math.log10(0.2))

"""What a language model adds to a hypothesis, unit by unit, is its probability of the whole."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from stillhouse.data.errors import UsageError
from stillhouse.data.units import Units, train_units
from stillhouse.train.decode.fusion import UnitFusion, WordFusion
from stillhouse.train.decode.ngram import LN10, NGram, read_arpa

WORDS = """\\data\\
ngram 1=7
ngram 2=4

\\1-grams:
-9\t<s>\t-0.2
-1.0\t</s>
-1.7\t<unk>\t-0.1
-0.5\tTHE\t-0.3
-0.8\tCAT\t-0.4
-1.2\tCATS
-1.4\tTO

\\2-grams:
-0.3\t<s> THE
-0.2\tTHE CAT
-0.6\tCAT TO
-0.1\tTO </s>

\\end\\
"""
# log10 P by hand: P(the | <s>) P(cat | the) P(</s> | cat) …
SAID = {
    "the cat": -0.3 - 0.2 - (0.4 + 1.0),
    "cats": -(0.2 + 1.2) - 1.0,
    "the dog to": -0.3 - (0.3 + 1.7) - (0.1 + 1.4) - 0.1,
    "": -0.2 - 1.0,
    "cat to": -(0.2 + 0.8) - 0.6 - 0.1,
}
PIECES = ["<blank>", "<unk>", "▁", "▁the", "▁ca", "t", "s", "▁to", "▁d", "o", "g", "▁t", "h", "e", "t▁t", "c", "a", "▁"]


@pytest.fixture
def words(tmp_path: Path) -> NGram:
    (tmp_path / "lm.arpa").write_text(WORDS)
    return read_arpa(tmp_path / "lm.arpa")


def added(fusion: UnitFusion | WordFusion, ids: list[int]) -> float:
    state, total = fusion.start, 0.0
    for unit in ids:
        total += float(fusion.row(state)[unit])
        state = fusion.advance(state, unit)
    return total + fusion.final(state)


def spellings(text: str, pieces: list[str], *, marked: bool) -> list[list[int]]:
    """All ways to spell it, with a space in front if `marked`."""
    whole = ("▁" if marked and text else "") + text.replace(" ", "▁")
    found: list[list[int]] = []

    def go(at: int, so_far: list[int]) -> None:
        if at == len(whole):
            found.append(so_far)
        for k, piece in enumerate(pieces):
            if k > 1 and whole.startswith(piece, at):
                go(at + len(piece), [*so_far, k])

    go(0, [])
    return found


@pytest.mark.parametrize("text", SAID)
def test_words_by_hand(words: NGram, text: str) -> None:
    units = Units("sentencepiece", "lower", PIECES)
    fusion = WordFusion(words, units, 0.7, unknown=2.5)
    expected = 0.7 * (SAID[text] * LN10 - 2.5 * text.count("dog"))
    ways = spellings(text, PIECES, marked=True)
    assert len(ways) >= 1
    for ids in ways:
        assert units.decode(ids) == text
        assert added(fusion, ids) == pytest.approx(expected, abs=1e-4), [PIECES[k] for k in ids]
    letters = Units("characters", "lower", ["<blank>", "<unk>", *"▁thecasodg"])
    (ids,) = spellings(text, letters.pieces, marked=False)
    assert added(WordFusion(words, letters, 0.7, unknown=2.5), ids) == pytest.approx(expected, abs=1e-4)


def test_a_word_begun_counts_as_the_likeliest_that_begins_so(words: NGram) -> None:
    letters = Units("characters", "lower", ["<blank>", "<unk>", *"▁thecasodg"])
    fusion = WordFusion(words, letters, 1.0)
    row = fusion.row(fusion.start)
    by_hand = {"t": -0.5, "c": -0.8}  # the; cat
    assert {c: row[letters.pieces.index(c)] / LN10 for c in by_hand} == pytest.approx(by_hand)
    assert row[letters.pieces.index("g")] == pytest.approx(-1.7 * LN10 - 10.0)  # no word begins so
    t = fusion.advance(fusion.start, letters.pieces.index("t"))
    assert fusion.row(t)[letters.pieces.index("o")] == pytest.approx((-1.4 + 0.5) * LN10, abs=1e-5)  # the -> to
    assert fusion.row(t)[letters.pieces.index("h")] == 0.0


def test_random_units_add_up_to_the_words(words: NGram) -> None:
    rng = random.Random(0)
    units = Units("sentencepiece", "lower", PIECES)
    fusion = WordFusion(words, units, 1.0, unknown=3.0)
    for _ in range(300):
        ids = [rng.randrange(1, len(PIECES)) for _ in range(rng.randrange(12))]
        text = "".join("⁇" if k == 1 else PIECES[k] for k in ids).replace("▁", " ")
        context, expected = words.start, 0.0
        for word in text.upper().split():
            id = words.words.get(word)
            expected += words.score(context, words.unknown if id is None else id) - (3.0 if id is None else 0.0)
            context = words.shortened((*context, words.unknown if id is None else id))
        expected += words.score(context, words.end)
        assert added(fusion, ids) == pytest.approx(expected, abs=1e-3), text


def test_units_by_hand(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text("""\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-99\t<s>\t-0.5
-1.1\t</s>
-0.6\ta\t-0.2
-0.9\tb
-0.7\t<space>\t-0.3

\\2-grams:
-0.4\ta b
-0.8\t<space> a

\\end\\
""")
    lm = read_arpa(tmp_path / "lm.arpa")
    units = Units("characters", "none", ["<blank>", "<unk>", "▁", "a", "b", "c"])
    fusion = UnitFusion(lm, units, 2.0)
    # a b ▁ a: P(a | <s>) P(b | a) P(▁ | b) P(a | ▁) P(</s> | a)
    by_hand = -(0.5 + 0.6) - 0.4 - 0.7 - 0.8 - (0.2 + 1.1)
    assert added(fusion, [3, 4, 2, 3]) == pytest.approx(2 * by_hand * LN10, abs=1e-5)
    # c is unknown to a model without <unk>: as rare as its rarest, and its context is forgotten
    assert added(fusion, [3, 5, 3]) == pytest.approx(2 * (-(0.5 + 0.6) - 1.1 - 0.6 - (0.2 + 1.1)) * LN10, abs=1e-5)
    assert fusion.row(fusion.start)[0] == 0
    fusion.reset()
    assert len(fusion.states) == 1


def test_models_of_something_else_are_refused(words: NGram) -> None:
    units = train_units(["the cat"], "characters", transform="lower")
    with pytest.raises(UsageError, match="--lm-unit word"):
        UnitFusion(words, units, 1.0, "lm.arpa")
    greek = train_units(["αβγ"], "characters", transform="none")
    with pytest.raises(UsageError, match="no word of the language model can be spelled"):
        WordFusion(words, greek, 1.0, "lm.arpa")
    upper = train_units(["the cat"], "characters", transform="upper")
    assert math.isfinite(added(WordFusion(words, upper, 1.0), [2, 3]))

"""Hotwords: scores against a plain scan of the units, the beam against all paths there are, and wrong files."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data.errors import CorpusError
from stillhouse.data.units import Units, train_units
from stillhouse.train.decode.beam import Beam
from stillhouse.train.decode.fusion import SumFusion
from stillhouse.train.decode.hotwords import Hotwords, Phrase, read_hotwords

from .test_beam import Bigram, every_path, small_model

Scores = dict[tuple[int, ...], float]


def phrases(scores: Scores) -> list[Phrase]:
    return [Phrase("", units, score, line) for line, (units, score) in enumerate(scores.items(), 1)]


def unit_score(scores: Scores, prefix: tuple[int, ...]) -> float:
    return max(score for phrase, score in scores.items() if phrase[: len(prefix)] == prefix)


def value(scores: Scores, prefix: tuple[int, ...]) -> float:
    return sum(unit_score(scores, prefix[:k]) for k in range(1, len(prefix) + 1))


def scanned(scores: Scores, units: tuple[int, ...]) -> tuple[float, float]:
    """(what the phrases that ended in it are worth, what the phrase that it is inside of is worth), without a trie."""
    kept, begin = 0.0, 0
    for end in range(1, len(units) + 1):
        ended = [p for p in scores if len(p) <= end - begin and units[end - len(p) : end] == p]
        if ended:
            kept, begin = kept + value(scores, max(ended, key=len)), end
    ends = [units[k:] for k in range(begin, len(units))]
    return kept, next((value(scores, e) for e in ends if any(p[: len(e)] == e for p in scores)), 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_of_units_adds_up_to_what_a_scan_finds(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))]
    scores = {tuple(rng.randrange(1, 4) for _ in range(n)): rng.choice([0.5, 1.5, 3.0]) for n in sizes}
    hotwords = Hotwords(phrases(scores), 4)
    for units in itertools.product(range(1, 4), repeat=6):
        state, total = hotwords.start, 0.0
        for k, unit in enumerate(units, 1):
            row = hotwords.row(state)
            assert row[0] == 0 and row.dtype == np.float32
            total += float(row[unit])
            state = hotwords.advance(state, unit)
            assert total == pytest.approx(sum(scanned(scores, units[:k])), abs=1e-4)
        assert total + hotwords.final(state) == pytest.approx(scanned(scores, units)[0], abs=1e-4)


def test_scores_by_hand() -> None:
    """he, she, shell, his and this, of one nat a unit, as in the documentation of sherpa-onnx."""
    letters = ["", *"heslit"]
    spelled = {tuple(map(letters.index, word)): 1.0 for word in ("he", "she", "shell", "his", "this")}
    hotwords = Hotwords(phrases(spelled), len(letters))

    def added(word: str) -> list[float]:
        state, found = hotwords.start, []
        for unit in map(letters.index, word):
            found.append(float(hotwords.row(state)[unit]))
            state = hotwords.advance(state, unit)
        return [*found, hotwords.final(state)]

    assert added("his") == [1, 1, 1, 0]
    assert added("hi") == [1, 1, -2]  # given back at the end
    assert added("hit") == [1, 1, -1, -1]  # `hi` is given back, and `t` begins `this`
    assert added("the") == [1, 1, 0, 0]  # `th` is given back, and `he` is kept
    assert added("shell") == [1, 1, 1, 0, 0, 0]  # `she` has ended
    assert added("thishis") == [1, 1, 1, 1, 1, 1, 1, 0]
    assert [p.line for p in hotwords.cut_short] == [3]


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_a_wide_beam_scores_every_hypothesis_exactly(predictor: str) -> None:
    """With a language model, the internal one and a penalty: all 127 sequences that paths can spell."""
    model = small_model(3, predictor, sharp=3.0)
    torch.manual_seed(8)
    states = torch.randn(1, 3, 16)
    bigram = Bigram(np.random.default_rng(0).normal(size=(3, 3)))
    scores = {(1, 2): 0.7, (2, 2, 1): 1.1, (1, 1, 1, 2): 0.4}
    acoustic = every_path(model, states[0], 2, bigram=bigram, penalty=0.7, ilm=0.4)
    expected = {units: score + scanned(scores, units)[0] for units, score in acoustic.items()}
    fusion = SumFusion([Hotwords(phrases(scores), 3), bigram])
    search = Beam(model, 1, width=127, max_symbols=2, fusion=fusion, blank_penalty=0.7, ilm_weight=0.4)
    search.feed(states, torch.tensor([3]))
    found = {tuple(e.units): e.score for e in search.finish()[0]}
    assert found == pytest.approx(expected, abs=1e-4) and len(found) == 127
    assert max(acoustic, key=acoustic.__getitem__) != max(expected, key=expected.__getitem__)
    # The same with one part, and without any phrase that occurs
    alone = every_path(model, states[0], 2)
    search = Beam(model, 1, width=127, max_symbols=2, fusion=Hotwords(phrases(scores), 3))
    search.feed(states, torch.tensor([3]))
    found = {tuple(e.units): e.score for e in search.finish()[0]}
    assert found == pytest.approx({u: s + scanned(scores, u)[0] for u, s in alone.items()}, abs=1e-4)


def test_the_start_of_an_utterance_counts_as_a_space() -> None:
    """1 is the space: a phrase is worth the same at the start and behind a space, and nothing inside a word."""
    scores = {(1, 2, 3): 1.0, (1, 2, 2): 2.0}
    hotwords = Hotwords(phrases(scores), 4, space=1)
    for n in range(6):
        for units in itertools.product(range(1, 4), repeat=n):
            state, total = hotwords.start, 0.0
            for unit in units:
                total += float(hotwords.row(state)[unit])
                state = hotwords.advance(state, unit)
            assert total + hotwords.final(state) == pytest.approx(scanned(scores, (1, *units))[0])
    assert hotwords.row(hotwords.start).tolist() == [0, 2, 4, 0]
    assert Hotwords(phrases({(2, 3): 1.0}), 4, space=1).row(0).tolist() == [0, 0, 1, 0]


LINES = ["the old mill", "a new mill by the water", "don't walk"]


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_a_file_is_spelled_as_transcripts_are(tmp_path: Path, kind: str) -> None:
    units = train_units(LINES, kind, size=60)
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffThe  MILL :2.5\r\n\r\n  don't, walk\r\nold▁mill :0.25\n".encode())
    first, second, third = read_hotwords(path, units, 3.0)
    assert [units.decode(p.units).strip() for p in (first, second, third)] == ["the mill", "don't walk", "old mill"]
    assert [(p.score, p.line) for p in (first, second, third)] == [(2.5, 1), (3.0, 3), (0.25, 4)]
    behind = [units.pieces.index("▁")] if kind == "characters" else []
    assert list(first.units) == [*behind, *units.encode("the mill").ids.tolist()]


def test_units_without_a_space_take_phrases_in_separate_characters(tmp_path: Path) -> None:
    units = train_units(["語音識別", "深度學習"], "characters", transform="none")
    (tmp_path / "names.txt").write_text("語 音 識 別\n深度學習 :2\n")
    assert [units.decode(p.units) for p in read_hotwords(tmp_path / "names.txt", units)] == ["語音識別", "深度學習"]


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
@pytest.mark.parametrize(
    ("text", "transform", "words"),
    [
        ("", "lower", "names.txt: the file holds no phrase"),
        ("\n \n", "lower", "the file holds no phrase"),
        ("mill\n:2\n", "lower", "names.txt:2: a score without a phrase"),
        ("mill :0\n", "lower", "names.txt:1: the score is '0'"),
        ("mill :-1\n", "lower", "the score is '-1'"),
        ("mill :nan\n", "lower", "the score is 'nan'"),
        ("mill :inf\n", "lower", "the score is 'inf'"),
        ("mill :high\n", "lower", "the score is 'high'"),
        ("mill :\n", "lower", "the score is ''"),
        ("mill :2 water\n", "lower", "':2' is not the last word"),
        ("mill :2 :3\n", "lower", "':2' is not the last word"),
        ("mill\n# all names\n", "lower+no_punct", "names.txt:2: '#' is no word, and a file of hotwords has no"),
        ("#mill\n", "lower+no_punct", "names.txt:1: '#mill' is no word"),
        ("mill #0.35 :2\n", "lower+no_punct", "'#0.35' is no word"),
        ("mill :2 @MILL\n", "lower+no_punct", "':2' is not the last word"),
        ("mill @MILL\n", "lower+no_punct", "'@MILL' is no word"),
        ("old mill:2.5\n", "lower+no_punct", "'mill:2.5' has no space in front of its score"),
        ("mill:.5\n", "lower+no_punct", "'mill:.5' has no space"),
        ("mill\nroute 66\n", "lower", "names.txt:2: the model's units cannot write 'route 66': they have no unit for"),
        ("mill\nroute 6\nwall\n7 :1\n8\n", "lower", "It is the same with lines 4, 5"),
        ("route 6\n7\n", "lower", "It is the same with line 2"),
        ("mill\n-- !\n", "lower+no_punct", "'-- !': their transform (lower+no_punct) leaves nothing of it"),
        ("MILL\n", "none", "write it in small letters, as the units are: mill"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(tmp_path: Path, kind: str, text: str, transform: str, words: str) -> None:
    units = train_units(LINES, kind, size=60, transform=transform)
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(CorpusError) as caught:
        read_hotwords(tmp_path / "names.txt", units)
    assert words in str(caught.value), str(caught.value)


def test_signs_that_the_units_write_are_words(tmp_path: Path) -> None:
    units = train_units(["#1 at 10:30", "a:b @home"], "characters", transform="none")
    (tmp_path / "names.txt").write_text("#1 :2\n@home\n10:30\nb 1:03\n")
    spelled = [units.decode(p.units).strip() for p in read_hotwords(tmp_path / "names.txt", units)]
    assert spelled == ["#1", "@home", "10:30", "b 1:03"]


def test_capital_units_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    units = train_units([line.upper() for line in LINES], "characters", transform="none")
    (tmp_path / "names.txt").write_text("mill\n")
    with pytest.raises(CorpusError, match="write it in capital letters, as the units are: MILL"):
        read_hotwords(tmp_path / "names.txt", units)
    (tmp_path / "names.txt").write_bytes(b"MILL\n\xff\xfa\n")
    with pytest.raises(CorpusError, match=r"names\.txt:2: .*UTF-8"):
        read_hotwords(tmp_path / "names.txt", Units("characters", "none", units.pieces))

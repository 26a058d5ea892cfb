"""Spans of tokens in the raw transcript, for wordpiece, byte-level BPE and sentencepiece with byte fallback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.errors import ConfigError

from ..conftest import TEXTS, loaded


def spell(folder: Path, text: str, transform: str = "none") -> list[tuple[str, str]]:
    """(piece, raw characters) of each token."""
    t = loaded(folder).tokeniser
    tokens = t.encode([text], transform)
    return [(p, text[a:b]) for p, (a, b) in zip(t.pieces(tokens.ids.tolist()), tokens.span.tolist())]


def test_wordpiece_of_an_upper_case_transcript(minilm: Path) -> None:
    """MiniLM lower-cases by itself; the spans point into the upper-case text."""
    got = spell(minilm, "I'M UNBELIEVABLY GLAD", "sentence_case")
    assert got[:4] == [("i", "I"), ("'", "'"), ("m", "M"), ("unbelievable", "UNBELIEVABLE")] or got[:3] == [
        ("i", "I"), ("'", "'"), ("m", "M"),
    ]  # fmt: skip
    assert "".join(raw for _, raw in got) == "I'MUNBELIEVABLYGLAD"


def test_sentence_case_reaches_a_cased_model(gpt2: Path) -> None:
    pieces = spell(gpt2, "THE OLD KETTLE", "sentence_case")
    assert "".join(p for p, _ in pieces) == "ĠTheĠoldĠkettle"
    assert "".join(r for _, r in pieces if r != " ") == "THEOLDKETTLE"  # the space put before has no character


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_a_first_word_is_spelt_as_a_later_one(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    one, two = spell(folder, "kettle"), spell(folder, "kettle kettle")
    assert two == one + one


def test_leading_space_only_where_it_is_wanted(gpt2: Path, llama: Path, minilm: Path) -> None:
    wants = [loaded(f).tokeniser.leading_space for f in (gpt2, llama, minilm)]
    assert wants == [True, False, False]


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_byte_pieces_share_their_character(which: str, request: pytest.FixtureRequest) -> None:
    """The tokenizers know neither 龘 nor 🦉: three and four bytes."""
    got = spell(request.getfixturevalue(which), "a 龘🦉 b")
    raws = [raw for _, raw in got]
    assert raws.count("龘") >= 2 and raws.count("🦉") >= 2
    assert set(raws) <= {"a", "b", "龘", "🦉", " "}


@pytest.mark.parametrize("which", ["minilm", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("transform", ["none", "upper", "sentence_case", "lower+no_punct+squeeze"])
def test_spans_are_in_order_and_cover_the_letters(which: str, transform: str, request: pytest.FixtureRequest) -> None:
    t = loaded(request.getfixturevalue(which)).tokeniser
    texts = [*TEXTS, "  two  spaces ", "Ⅷ ﬁne ß", "e\u0301te\u0301", "\u200d", "...", "A.B.C!"]
    tokens = t.encode(texts, transform)
    at = 0
    for text, n in zip(texts, tokens.length.tolist()):
        span = tokens.span[at : at + n]
        at += n
        blank = np.array([set(p) <= {"Ġ", "▁"} for p in t.pieces(tokens.ids[at - n : at].tolist())], dtype=bool)
        assert (span[:, 0] < span[:, 1])[~blank].all() and (span >= 0).all() and (span <= len(text)).all()
        assert (np.diff(span[:, 0]) >= 0).all()
        covered = np.zeros(len(text), dtype=bool)
        for a, b in span:
            covered[a:b] = True
        if which != "bert":  # its tiny vocabulary has [UNK]s, which cover their word as well
            assert all(c for c, ch in zip(covered, text) if ch.isascii() and ch.isalnum())


@pytest.mark.parametrize("which", ["bert", "gpt2", "llama"])
def test_texts_are_spanned_as_one_by_one(which: str, request: pytest.FixtureRequest) -> None:
    """Many are worked on as one text; none may reach into its neighbours, which are white and empty ones, too."""
    t = loaded(request.getfixturevalue(which)).tokeniser
    texts = [" a", "", "  ", "b ", "é", " 龘🦉 ", "...", "x  y", "\u3000z", "\u200d", *TEXTS]
    together = t.encode(texts, "sentence_case")
    each = [t.encode([text], "sentence_case") for text in texts]
    assert np.array_equal(together.span, np.concatenate([e.span for e in each]))
    assert np.array_equal(together.ids, np.concatenate([e.ids for e in each]))
    assert together.length.tolist() == [int(e.length[0]) for e in each]


def test_join_ids(minilm: Path, gpt2: Path) -> None:
    assert loaded(minilm).tokeniser.join_ids("") == []
    assert loaded(minilm).tokeniser.join_ids("[SEP]") == [102]
    assert len(loaded(gpt2).tokeniser.join_ids("\n")) == 1


def test_long_texts_are_not_truncated(minilm: Path) -> None:
    """MiniLM's own tokenizer.json cuts at 128 tokens and pads to 128."""
    tokens = loaded(minilm).tokeniser.encode(["word " * 700, "word"], "none")
    assert tokens.length.tolist() == [700, 1]


def test_unknown_transform(minilm: Path) -> None:
    with pytest.raises(ConfigError, match="sentence_case"):
        loaded(minilm).tokeniser.encode(["a"], "no_such")

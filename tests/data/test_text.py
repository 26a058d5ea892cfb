from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.data.errors import ConfigError
from stillhouse.data.text import NAMES, SPACE_MARK, transform, transformed

# Any code point but lone surrogates, and often those that change length or compose.
TRICKY = st.sampled_from([*"ßİŉﬁÅΣσςǅΐ", "e\u0301", "\u1100\u1161\u11a8", "\u09c7\u09be", "\u0344", "😀", "\u200d"])
TEXT = st.lists(
    st.one_of(st.characters(exclude_categories=["Cs"]), TRICKY, st.sampled_from(list(" \t\n'’-.,I"))), max_size=30
).map("".join)
CHAIN = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("+".join)


@given(raw=TEXT, name=CHAIN)
def test_source_ranges_are_inside_the_text_and_never_run_backwards(raw: str, name: str) -> None:
    mapped = transform(raw, name)
    assert transformed(raw, name) == mapped.text
    assert mapped.source.shape == (len(mapped.text), 2)
    assert mapped.source.dtype == np.int32
    if len(mapped.text):
        assert mapped.source.min() >= 0
        assert mapped.source.max() <= len(raw)
        assert (mapped.source[:, 0] < mapped.source[:, 1]).all()
        assert (np.diff(mapped.source, axis=0) >= 0).all()


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("lower", str.lower),
        ("upper", str.upper),
        ("casefold", str.casefold),
        ("nfc", lambda s: unicodedata.normalize("NFC", s)),
        ("nfd", lambda s: unicodedata.normalize("NFD", s)),
        ("nfkc", lambda s: unicodedata.normalize("NFKC", s)),
        ("nfkd", lambda s: unicodedata.normalize("NFKD", s)),
        ("squeeze", lambda s: " ".join(s.replace(SPACE_MARK, " ").split())),
        ("none", lambda s: s),
    ],
)
@given(raw=TEXT)
def test_the_text_is_that_of_the_plain_function(name: str, whole, raw: str) -> None:
    if name == "squeeze" and any(c in raw for c in "\x1c\x1d\x1e\x1f\x85"):
        raw = raw.translate(dict.fromkeys(map(ord, "\x1c\x1d\x1e\x1f\x85"), " "))
    assert transform(raw, name).text == transformed(raw, name) == whole(raw)


@given(raw=TEXT, name=st.sampled_from(["lower", "upper", "casefold", "nfc", "nfkc", "nfd"]))
def test_a_part_of_the_source_transforms_to_its_part_of_the_text(raw: str, name: str) -> None:
    """Cut at places where no character is shared: both sides, transformed alone, give the text again."""
    mapped = transform(raw, name)
    for k in range(1, len(mapped.text)):
        left, right = mapped.spans(np.array([[0, k], [k, len(mapped.text)]]))
        if left[1] == right[0]:
            alone = transform(raw[: left[1]], name).text + transform(raw[right[0] :], name).text
            assert alone.replace("ς", "σ") == mapped.text.replace("ς", "σ")


@given(
    words=st.lists(st.text("abcXYZéß'", min_size=1, max_size=6), min_size=1, max_size=6),
    gap=st.sampled_from([" ", "  ", " — ", "\t", " \n"]),
)
def test_the_span_of_a_word_is_the_word(words: list[str], gap: str) -> None:
    words = [re.sub("''+", "'", w).strip("'") or "a" for w in words]
    raw = gap + gap.join(words) + gap
    mapped = transform(raw, "lower+no_punct+squeeze")
    at, found = 0, []
    for word in mapped.text.split(" "):
        ((begin, end),) = mapped.spans(np.array([[at, at + len(word)]]))
        found.append(raw[begin:end])
        at += len(word) + 1
    assert found == words


def test_maps_worked_by_hand() -> None:
    mapped = transform(" «Straße» —  ﬁn", "casefold+no_punct+squeeze+nfkc")
    #                   012345678901234
    assert mapped.text == "strasse fin"
    assert mapped.source.tolist() == [
        [2, 3], [3, 4], [4, 5], [5, 6], [6, 7], [6, 7], [7, 8], [8, 13], [13, 14], [13, 14], [14, 15],
    ]  # fmt: skip
    assert mapped.spans(np.array([[4, 6], [7, 8], [0, 11]])).tolist() == [[6, 7], [8, 13], [2, 15]]


def test_characters_that_compose_share_their_range() -> None:
    mapped = transform("ae\u0301\u1100\u1161\u11a8z", "nfc")
    assert mapped.text == "aé각z"
    assert mapped.source.tolist() == [[0, 1], [1, 3], [3, 6], [6, 7]]
    back = transform("é각", "nfd")
    assert back.text == "e\u0301\u1100\u1161\u11a8"
    assert back.source.tolist() == [[0, 1], [0, 1], [1, 2], [1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Don’t stop, 'tis the dogs' well-known rock'n'roll!", "Don't stop tis the dogs well known rock'n'roll"),
        ("U.S. $5 … e\u0301's", "U S 5 e\u0301's"),
        ("你好，世界！😀", "你好 世界"),
        ("'", ""),
        ("''a''", "a"),
    ],
)
def test_punctuation_goes_and_apostrophes_inside_words_stay(raw: str, clean: str) -> None:
    assert transform(raw, "no_punct+squeeze").text == clean


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("THE CAT AND I'M HERE I SAID", "The cat and I'm here I said"),
        ("I", "I"),
        ("I'LL GO IF I’VE TO AND I'D", "I'll go if I’ve to and I'd"),
        ("A-I IS NOT I-BEAM", "A-i is not i-beam"),
        ("IN IT. IS IT? IT IS", "In it. Is it? It is"),
        ("'TWAS ÉTÉ", "'Twas été"),
        ("Already Mixed I'M", "Already Mixed I'M"),
        ("HAWAI'I IS", "Hawai'i is"),
        ("", ""),
        ("你好", "你好"),
    ],
)
def test_sentence_case(raw: str, sentence: str) -> None:
    mapped = transform(raw, "sentence_case")
    assert mapped.text == sentence
    assert mapped.source[:, 0].tolist() == list(range(len(raw)))


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"'lowwer'.*sentence_case, no_punct, squeeze"):
        transform("x", "squeeze+lowwer")


@given(st.text(alphabet="AI.!? '-M\t2", max_size=30) | st.text(alphabet=st.characters(max_codepoint=127), max_size=20))
def test_sentence_case_of_ascii_is_that_of_any_text(raw: str) -> None:
    """A letter in front that is not ASCII takes the general way; a full stop behind it makes them alike."""
    assert transform("É." + raw, "sentence_case").text[2:] == transform("A." + raw, "sentence_case").text[2:]

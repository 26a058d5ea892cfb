from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.data.errors import ConfigError, CorpusError
from stillhouse.data.units import BLANK, KINDS, UNKNOWN, Units, load_units, train_units

TEXTS = [
    "Hello, World! This is the Straße's test.",
    "Another line — of text, in the world",
    "你好 世界，你好 the end of the world",
    "Cafe\u0301 or café: the world's best?",
] * 4
TRANSFORM = "casefold+no_punct+squeeze"


@pytest.fixture(scope="module", params=KINDS)
def units(request: pytest.FixtureRequest) -> Units:
    return train_units(TEXTS, request.param, size=90, transform=TRANSFORM)


def spelled(units: Units, raw: str) -> list[tuple[str, str]]:
    encoded = units.encode(raw)
    return [(units.pieces[k], raw[a:b]) for k, (a, b) in zip(encoded.ids, encoded.spans, strict=True)]


KNOWN = sorted({c for text in TEXTS for c in text} | set("ABXYZ…\t\n 😀ñ▁"))


@given(raw=st.one_of(st.text(KNOWN, max_size=40), st.text(max_size=20)))
def test_spans_are_inside_the_raw_text_and_decode_gives_the_transformed_text(units: Units, raw: str) -> None:
    encoded = units.encode(raw)
    assert encoded.ids.dtype == encoded.spans.dtype == units.ids(raw).dtype == np.int32
    assert units.ids(raw).tolist() == encoded.ids.tolist()
    assert encoded.spans.shape == (len(encoded.ids), 2)
    assert (encoded.ids != BLANK).all()
    if len(encoded.ids):
        assert encoded.ids.max() < units.size
        assert encoded.spans.min() >= 0
        assert encoded.spans.max() <= len(raw)
        assert (encoded.spans[:, 0] <= encoded.spans[:, 1]).all()
        assert (np.diff(encoded.spans, axis=0) >= 0).all()
    if UNKNOWN not in encoded.ids:
        assert units.decode(encoded.ids.tolist()) == units.normalise(raw).text


@given(
    words=st.lists(
        st.sampled_from(["Hello", "World's", "STRASSE", "straße", "café", "cafe\u0301", "你好", "the", "line"]),
        min_size=1,
        max_size=5,
    )
)
def test_the_units_of_a_word_cover_the_word(words: list[str]) -> None:
    units = _both[0 if len(words) % 2 else 1]
    raw = "  " + " — ".join(words) + "!"
    groups: list[list[tuple[int, int]]] = [[]]
    encoded = units.encode(raw)
    for k, (a, b) in zip(encoded.ids, encoded.spans, strict=True):
        piece = units.pieces[k]
        if piece.startswith("▁") and groups[-1]:
            groups.append([])
        if piece != "▁":
            groups[-1].append((a, b))
    assert [raw[g[0][0] : g[-1][1]] for g in groups] == words


_both = [train_units(TEXTS, kind, size=90, transform=TRANSFORM) for kind in KINDS]


def test_spans_worked_by_hand() -> None:
    characters = train_units(["strasse fin's"], "characters", size=20, transform=TRANSFORM + "+nfkc")
    assert spelled(characters, "Die Straße, ﬁn") == [
        ("<unk>", "D"), ("i", "i"), ("e", "e"), ("▁", " "), ("s", "S"), ("t", "t"), ("r", "r"), ("a", "a"),
        ("s", "ß"), ("s", "ß"), ("e", "e"), ("▁", ", "), ("f", "ﬁ"), ("i", "ﬁ"), ("n", "n"),
    ]  # fmt: skip
    lines = ["the world of the world", "of the world's", "the end of then", "often, he held th world off"]
    pieces = train_units(lines * 9, size=60)
    assert pieces.decode(pieces.encode(" Of—THE  world's").ids) == "of the world's"
    found = spelled(pieces, " Of—THE  world's 😀Ωthe")
    assert found[:3] == [("▁of", "Of"), ("▁the", "THE"), ("▁world", "world")]
    assert found[3:] == [
        ("'", "'"), ("s", "s"), ("▁", " 😀"), ("<unk>", "Ω"), ("t", "t"), ("h", "h"), ("e", "e"),
    ]  # fmt: skip


def test_blank_is_unit_0_and_a_text_that_spells_it_does_not_reach_it(units: Units) -> None:
    assert units.pieces[:2] == ["<blank>", "<unk>"]
    assert (train_units(["abc", "cab"], units.kind, size=9, transform="none").encode("<blank>").ids == UNKNOWN).any()
    assert units.decode([0, 0]) == ""
    assert "⁇" in units.decode([1])
    with pytest.raises(ValueError, match="unit"):
        units.decode([units.size])


def test_a_saved_folder_is_the_same_units(units: Units, tmp_path: Path) -> None:
    units.save(tmp_path / "a b" / "units")
    again = load_units(tmp_path / "a b" / "units")
    assert again.fingerprint == units.fingerprint
    assert (again.size, again.kind, again.transform) == (units.size, units.kind, units.transform)
    assert spelled(again, TEXTS[2]) == spelled(units, TEXTS[2])
    assert pickle.loads(pickle.dumps(again)).fingerprint == units.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    units.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_lies_in_their_place_is_told(units: Units, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "units.json").mkdir(parents=True)
    for name in ("file", "folder"):
        with pytest.raises(CorpusError, match=f"{name}/[a-z.]+: the units cannot be written"):
            units.save(tmp_path / name)
    assert not list((tmp_path / "folder").glob(".*"))  # no draft


def test_training_again_gives_the_same_units(units: Units) -> None:
    again = train_units(TEXTS, units.kind, size=90, transform=TRANSFORM)
    other = train_units(TEXTS, units.kind, size=90, transform="nfc+" + TRANSFORM)
    assert again.fingerprint == units.fingerprint != other.fingerprint


def test_damaged_folders_are_refused(units: Units, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there are no units"):
        load_units(tmp_path)
    units.save(tmp_path)
    path = tmp_path / "units.json"
    good = path.read_text()
    head = json.loads(good)

    def refuse(text: str, match: str) -> None:
        path.write_text(text)
        with pytest.raises(CorpusError, match=match):
            load_units(tmp_path)
        path.write_text(good)

    refuse(good[: len(good) // 2], "damaged")
    refuse("[]", "damaged")
    refuse(json.dumps({**head, "transform": True}), "damaged.*transform is not a text")
    refuse(json.dumps({**head, "version": 99}), "version 99")
    refuse(json.dumps({k: v for k, v in head.items() if k != "pieces"}), "'pieces' is missing")
    refuse(json.dumps({**head, "pieces": [*head["pieces"][:-1], "x"]}), "fingerprint")
    refuse(json.dumps({**head, "pieces": [*head["pieces"][:-1], "\ud800"]}), "damaged.*surrogates")
    refuse(json.dumps({**head, "transform": "lowwer"}), "unknown text transform")
    if units.kind == "sentencepiece":
        model = tmp_path / "spm.model"
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
        with pytest.raises(CorpusError, match="fingerprint"):
            load_units(tmp_path)
        model.unlink()
        with pytest.raises(CorpusError, match="there are no units"):
            load_units(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_do_not_fit(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"5 units cannot hold the 9 characters.*--size 11"):
        train_units(["ab cd efgh"], kind, size=5)
    small = train_units(["ab cd efgh"], kind, size=5000)
    assert 11 <= small.size <= 60
    assert train_units(["ab cd efgh"], kind, size=small.size).size <= small.size
    with pytest.raises(CorpusError, match="no text"):
        train_units(["...", ""], kind)
    with pytest.raises(ConfigError, match="kind"):
        train_units(["a"], "words")


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_leaves_stray_characters_to_the_unknown_unit(kind: str) -> None:
    texts = ["the cat sat on the mat"] * 100 + ["ñandú"]
    units = train_units(texts, kind, size=40, coverage=0.999)
    assert UNKNOWN in units.encode("ñ").ids
    assert UNKNOWN not in train_units(texts, kind, size=40).encode("ñ").ids


def test_real_transcripts_round_trip(corpora: Path) -> None:
    lines = (corpora / "text" / "ljspeech.tsv").read_text(encoding="utf-8").splitlines()[:2000]
    texts = [line.split("\t")[1] for line in lines]
    units = train_units(texts, "sentencepiece", size=300)
    assert units.size == 300
    for text in texts[:300]:
        encoded = units.encode(text)
        assert units.decode(encoded.ids.tolist()) == units.normalise(text).text
        for k, (a, b) in zip(encoded.ids, encoded.spans, strict=True):
            piece = units.pieces[k].strip("▁'")  # an apostrophe at the edge is part of a word only in context
            assert units.normalise(text[a:b]).text.strip("'") == piece


@pytest.mark.parametrize("kind", KINDS)
def test_units_alone_are_those_with_spans_also_of_marks(kind: str) -> None:
    units = train_units([*TEXTS, "[noise] the <noise>"], kind, size=95, transform=TRANSFORM, marks=["[noise]"])
    for raw in ["[noise]the  WORLD [noise] é", "", " ", "<blank> [noise]", "7 <noise>▁x\n"]:
        assert units.ids(raw).tolist() == units.encode(raw).ids.tolist()
    assert units.pieces.index("[noise]") in units.ids("a [noise] b")

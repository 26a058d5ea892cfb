"""The space before a text: what --leading-space means, and that stores keep what they were made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stillhouse.data.errors import StaleError
from stillhouse.extract.inspect.facts.store import store_facts
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.teacher.text.spaces import writes_spaces

from ..conftest import loaded, make_corpus

TEXTS = [
    "the old kettle",
    "你好 世界",
    "ภาษาไทย",
    "ビール",
    "သည်",
    "ភាសា",
    "ພາສາ",
    "한국어 말",
    "1984",
    "1984年",
    "привет",
]
SPACED = [True, False, False, False, False, False, False, True, True, False, True]


def test_scripts() -> None:
    assert [writes_spaces(t) for t in TEXTS] == SPACED
    assert writes_spaces("") and writes_spaces("¡¿…") and not writes_spaces("「東京」 is big")


def test_the_three_choices(gpt2: Path, bert: Path) -> None:
    own = loaded(gpt2).tokeniser
    first = {c: [int(own.with_space(c).encode([t], "none").ids[0]) for t in TEXTS] for c in ("auto", "yes", "no")}
    begins = {c: [p[0] == "Ġ" for p in own.pieces(ids)] for c, ids in first.items()}
    assert begins == {"auto": SPACED, "yes": [True] * len(TEXTS), "no": [False] * len(TEXTS)}
    wordpieces = loaded(bert).tokeniser
    assert not wordpieces.with_space("auto").leading_space and wordpieces.with_space("yes").leading_space


def test_a_choice_is_part_of_a_view(gpt2: Path, tmp_path: Path) -> None:
    """The same command resumes; another choice is refused, and the default keeps what the store has."""
    corpus, request = make_corpus(["你好", "the old kettle"]), Request("t", [1], ["alone"])
    prints = {}
    for choice in ("auto", "yes", "no"):
        store = tmp_path / choice
        extract(store, corpus, loaded(gpt2), replace(request, leading_space=choice))
        record = Store.open(store).teacher("t").settings
        assert record.space_choice == store_facts(Store.open(store)).teachers[0].leading_space == choice
        prints[choice] = record.fingerprints["alone/1"]
        again = extract(store, corpus, loaded(gpt2), request)  # the default
        assert again.units_done_now == 0
    assert len(set(prints.values())) == 3
    with pytest.raises(StaleError, match=r"the leading space \(stored 'yes', now 'no'"):
        extract(tmp_path / "yes", corpus, loaded(gpt2), replace(request, leading_space="no"))


def test_stores_made_before_the_choice_go_on_as_they_were(gpt2: Path, tmp_path: Path) -> None:
    """They record that there is a space, and nothing of scripts. New texts get it too, whatever their script."""
    request, store = Request("t", [1], ["alone"], leading_space="yes"), tmp_path / "s"
    extract(store, make_corpus(["你好", "the old kettle"]), loaded(gpt2), request)
    for path in (store / "store.json", store / "data.zarr" / "t" / "zarr.json"):
        assert path.read_text().count('"space_by_script": false') == 1
        value = json.loads(path.read_text())
        records = value["teachers"] if path.name == "store.json" else value["attributes"]
        del records["t" if path.name == "store.json" else "stillhouse"]["space_by_script"]
        value.pop("crc32c", None)
        path.write_text(json.dumps(value))
    default = Request("t", [1], ["alone"])
    longer = make_corpus(["你好", "the old kettle", "世界"])
    assert extract(store, longer, loaded(gpt2), default, refresh=True).utterances == 3
    opened = Store.open(store)
    assert opened.teacher("t").settings.space_choice == "yes"
    _, ids, span = opened.tokens(["u2"], "t")
    assert loaded(gpt2).tokeniser.pieces(ids.tolist())[0].startswith("Ġ") and span[0].tolist() == [0, 0]

"""Stores that an earlier version planned, which did not compare batches with one text at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.data.errors import StaleError
from stillhouse.extract.inspect.facts.store import store_facts
from stillhouse.extract.inspect.show.facts import store as show_store
from stillhouse.extract.pipeline import generation
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.progress import render_status, status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.format.plan import read_plan
from stillhouse.extract.store.storage import open_files
from stillhouse.extract.teacher.model import load_teacher
from stillhouse.extract.teacher.passes import PADDED

from ..conftest import TEXTS, loaded, make_corpus
from .test_exact import check_against_transformers, mobilebert, modernbert, save

__all__ = ["mobilebert"]


def begun_by_an_earlier_version(root: Path, folder: Path, contexts: list[str], commit: bool = True) -> Request:
    """A store as it was made before batches were compared: with padding, whatever the model does with it."""
    request = Request("t", [2], contexts, dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "choose_passes", lambda *_: PADDED)
        teacher = load_teacher(str(folder), device="cpu")
        extract(root, make_corpus(TEXTS), teacher, request) if commit else make_plan(
            root, make_corpus(TEXTS), teacher, request
        )
    head = json.loads((root / "store.json").read_text())
    assert head.pop("compared") == ["t"]
    (root / "store.json").write_text(json.dumps(head))
    return request


def test_a_store_that_an_earlier_version_has_begun_is_refused_if_its_states_are_wrong(
    mobilebert: Path, tmp_path: Path
) -> None:
    request = begun_by_an_earlier_version(tmp_path / "s", mobilebert, ["alone"])
    teacher = load_teacher(str(mobilebert), device="cpu")
    for texts, refresh in ((TEXTS, False), (TEXTS[:-1], True)):
        with pytest.raises(StaleError, match="earlier version has begun the teacher 't' in batches with padding") as e:
            extract(tmp_path / "s", make_corpus(texts), teacher, request, refresh=refresh)
        assert "another store" in str(e.value.remedy) and "equal length" in e.value.what
    assert "t was planned by an earlier version" in render_status(status(tmp_path / "s"))
    facts = store_facts(Store.open(tmp_path / "s"))
    assert not facts.teachers[0].compared and "t was planned by an earlier" in " ".join(show_store(facts).split())


def test_a_store_that_an_earlier_version_has_planned_is_planned_again(mobilebert: Path, tmp_path: Path) -> None:
    request = begun_by_an_earlier_version(tmp_path / "s", mobilebert, ["alone"], commit=False)
    extract(tmp_path / "s", make_corpus(TEXTS), load_teacher(str(mobilebert), device="cpu"), request)
    check_against_transformers(tmp_path / "s", mobilebert)


@pytest.mark.parametrize("contexts", [["alone"], ["alone", "past:8+block"]])
def test_a_store_of_an_earlier_version_with_right_states_is_compared_once(
    contexts: list[str], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's mask of blocks is built otherwise now, and gives the same states."""
    request = begun_by_an_earlier_version(tmp_path / "s", bert, contexts)
    extract(tmp_path / "s", make_corpus(TEXTS), loaded(bert), request)
    assert read_plan(open_files(tmp_path / "s")).compared == ["t"]
    assert "was planned by" not in render_status(status(tmp_path / "s"))
    monkeypatch.setattr(generation, "choose_passes", None)
    extract(tmp_path / "s", make_corpus(TEXTS), loaded(bert), request)


def test_wide_blocks_of_an_earlier_version_are_refused(bert: Path, tmp_path: Path) -> None:
    """ModernBERT's windows were overwritten by a mask of blocks."""
    folder = save(tmp_path / "modernbert", bert, modernbert())
    request = begun_by_an_earlier_version(tmp_path / "s", folder, ["past:16+block"])
    with pytest.raises(StaleError, match="earlier version"):
        extract(tmp_path / "s", make_corpus(TEXTS), load_teacher(str(folder), device="cpu"), request)

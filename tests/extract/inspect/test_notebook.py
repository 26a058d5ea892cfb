"""repr and _repr_html_ of complete, partial, damaged and deleted stores, of views and of batches."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser

import pytest

from stillhouse.extract.store import Gathered, Store, View


class Strict(HTMLParser):
    """A parser that fails on unclosed tags and collects the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def test_a_store(store):
    text = repr(store)
    assert text.startswith("<Store '") and "store.zarr': 6 utterances, 6 views, complete>" in text
    assert "\n  known: 12 wide, 26 tokens, float16; alone, both:8; layers 0, 2, 4" in text
    page = Strict(store._repr_html_())
    assert "6 utterances, 6 views, complete" in page.text and "both:8" in page.text
    assert not re.search(r"https?:|<script|#[0-9a-f]{3}|rgb", store._repr_html_())


def test_an_unfinished_store(partial):
    assert f"450 utterances, {len(partial.views)} of 6 views complete" in repr(partial)


def test_names_are_escaped(store, tmp_path):
    path = tmp_path / "<b>&.zarr"
    path.symlink_to(store.path)
    page = Store.open(path)._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_showing_never_fails(store, tmp_path):
    """repr works even if the files have changed since the store was opened."""
    shutil.copytree(store.path, tmp_path / "s")
    damaged = Store.open(tmp_path / "s")
    for record in (tmp_path / "s" / "commits").rglob("*.json"):
        record.write_text("{", encoding="utf-8")
    assert repr(damaged).startswith("<Store ")
    vanished = Store.open(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    assert "utterances unknown" in repr(vanished) and "known: 12 wide" in repr(vanished)
    Strict(vanished._repr_html_())


def test_a_view():
    view = View("<t>", "past:8", 3)
    assert view._repr_html_() == "<code>&lt;t&gt;/past:8/3</code>" and eval(repr(view)) == view


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch(store, count):
    views = store.resolve("known/*/2")
    batch = store.gather(store.utterance_ids[:count], views)
    tokens = int(batch.lengths["known"].sum())
    assert repr(batch).splitlines()[0] == f"<Gathered {count} utterances, {tokens} tokens of known>"
    assert f"  known/both:8/2: [{tokens}, 12] float16" in repr(batch)
    assert f"[{tokens}, 12]" in Strict(batch._repr_html_()).text


def test_many_views_are_cut_short(store):
    batch = store.gather(store.utterance_ids[:1], store.views[:1])
    states = next(iter(batch.states.values()))
    many = Gathered(batch.lengths, {View("known", "alone", k): states for k in range(50)}, {}, {})
    assert "and 30 more" in many._repr_html_()

"""Stores in which one teacher has been refreshed, or both: utterances are matched by id and text, never by row, and all
commands count the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stillhouse.data.errors import NoStoreError, StaleError
from stillhouse.data.manifest import Corpus, write_manifest
from stillhouse.distill.teacher_states import TeacherStates
from stillhouse.extract.adapters.dataset import States
from stillhouse.extract.inspect.facts.diff import diff
from stillhouse.extract.inspect.facts.export import export
from stillhouse.extract.inspect.facts.store import utterance_facts
from stillhouse.extract.inspect.facts.utterance import show
from stillhouse.extract.inspect.numbers.neighbours import nearest
from stillhouse.extract.inspect.numbers.similarity import similarity
from stillhouse.extract.inspect.sample import available_rows, ids_of
from stillhouse.extract.inspect.show import page
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.batches import available_ids, batches

TEXTS = [" ".join(f"w{(i * 7 + j * j) % 300}" for j in range(8)) for i in range(40)]
CHANGED, LONGER, REMOVED, NEW = "s00-0001", "s06-0020", "s13-0039", "s13-0040"
TOKENS = 37 * 8 + 5 + 9 + 3  # of the later corpus
Stillhouse = Callable[..., SimpleNamespace]


def build(folder: Path, known: SimpleNamespace, *refreshed: str) -> Store:
    """Extract teachers a and b. Then two texts change, one utterance goes and one comes, and some are refreshed."""
    texts = list(TEXTS)
    first = known.corpus_of(folder, texts)
    texts[1], texts[20] = "w1 w2 w3 w4 w5", "w9 w8 w7 w6 w5 w4 w3 w2 w1"
    later = known.corpus_of(folder, [*texts, "w5 w5 w5"])
    later = Corpus(later.path, [u for u in later.utterances if u.id != REMOVED])
    write_manifest(later.path, later.utterances)
    for names, corpus in ((("a", "b"), first), (refreshed, later)):
        for name in names:
            teacher = known.Teacher(width=8 + 4 * (name == "a"))
            request = Request(name, [0, 2], ["alone", "both:8"], transform="lower")
            extract(folder / "store.zarr", corpus, teacher, request, refresh=corpus is later)
    return Store.open(folder / "store.zarr")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, known: SimpleNamespace) -> Store:
    return build(tmp_path_factory.mktemp("half"), known, "a")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, known: SimpleNamespace) -> Store:
    return build(tmp_path_factory.mktemp("both"), known, "a", "b")


def test_both_refreshed_lose_nothing(both: Store, tmp_path: Path) -> None:
    """Each refresh has given the changed utterances rows of its own."""
    ids = both.utterance_ids
    assert len(ids) == 40 and not np.array_equal(both.rows(ids, "a"), both.rows(ids, "b"))
    assert set(ids_of(both, available_rows(both, both.views))) == set(available_ids(both, both.views)) == set(ids)
    assert sum(len(part) for part, _ in batches(both, both.views)) == 40
    listed = {u.utterance: u for u in utterance_facts(both)}
    assert len(listed) == 40 and all(u.tokens["a"] == u.tokens["b"] > 0 and u.views == 8 for u in listed.values())
    assert [listed[i].tokens["a"] for i in (CHANGED, LONGER, NEW)] == [5, 9, 3]
    assert export(both, both.views, tmp_path / "s.npz").utterances == 40
    rows = both.rows([CHANGED, NEW])
    assert export(both, both.views, tmp_path / "t.npz", rows=rows).tokens == {"a": 8, "b": 8}
    assert [[t.piece for t in of.tokens] for of in show(both, CHANGED, both.views).teachers] == [
        ["w1", "w2", "w3", "w4", "w5"]
    ] * 2


def test_half_refreshed_leaves_out_what_differs(half: Store, tmp_path: Path) -> None:
    """CHANGED and LONGER have other texts in b, NEW is not in b, and REMOVED is only there."""
    alike = set(half.utterance_ids) - {CHANGED, LONGER, NEW}
    assert len(alike) == 37 and REMOVED not in alike
    assert set(ids_of(half, available_rows(half, half.views))) == set(available_ids(half, half.views)) == alike
    assert set(States(half, half.views).ids) == alike
    assert similarity(half, half.views, 5000).places <= 37 * 8
    exported = export(half, half.views, tmp_path / "s.npz")
    assert exported.utterances == 37 and exported.left_out == 3
    with pytest.raises(StaleError, match=rf"a and b have other texts of {CHANGED}; stillhouse extract .* --refresh"):
        States(half, half.views, [CHANGED])
    with pytest.raises(StaleError, match=CHANGED):
        next(batches(half, half.views, [CHANGED]))
    with pytest.raises(NoStoreError, match=NEW):
        States(half, half.views, [NEW])
    assert len(half.gather([CHANGED], half.resolve("a/*/*")).token_id["a"]) == 5
    assert len(half.gather([CHANGED], half.resolve("b/*/*")).token_id["b"]) == 8
    with pytest.raises(StaleError, match=CHANGED):
        half.check_texts([CHANGED], ["w1 w2 w3 w4 w5"])  # It is the text of `a` alone.
    listed = {u.utterance: u for u in utterance_facts(half)}
    assert [(listed[i].tokens, listed[i].views) for i in (CHANGED, NEW)] == [
        ({"a": 5, "b": 0}, 4),
        ({"a": 3, "b": 0}, 4),
    ]


def test_show_prints_no_other_text(half: Store, stillhouse: Stillhouse) -> None:
    shown = show(half, CHANGED, half.views, corpus=half.path.parent / "corpus.jsonl")
    assert shown.text == "w1 w2 w3 w4 w5" and [t.behind for t in shown.teachers] == [False, True]
    assert [t.text for t in shown.teachers[0].tokens] == shown.text.split() and not shown.teachers[1].tokens
    for name in (CHANGED, LONGER, NEW):
        said = stillhouse("inspect", "show", half.path, name)
        assert said.code == 0 and "b: not from this text" in said.out and "--refresh" in said.out
        assert not {"w7", "w16", "w140"} - {"w7" if name == LONGER else ""} & set(said.out.split())
        alone = stillhouse("inspect", "show", half.path, name, "--view", "b/*/*")
        assert alone.code == 12 and name in alone.err and not alone.out
    assert stillhouse("inspect", "show", half.path, "s00-0000").out.count("8 tokens") == 2


def test_all_commands_count_the_same(
    half: Store, both: Store, partial: Store, store: Store, stillhouse: Stillhouse
) -> None:
    """`info`, `ls`, `verify`, `--status` and `stats`, of whole, partial and refreshed stores."""
    for s in (store, partial, half, both):

        def told(*words: object, root: Path = s.path) -> dict:
            return json.loads(stillhouse(*words, "--json").out)

        info, verified = told("inspect", "info", s.path), told("inspect", "verify", s.path)
        status, views = (
            told("extract", s.path.parent / "corpus.jsonl", s.path, "--status"),
            told("inspect", "ls", s.path)["views"],
        )
        contexts = status["contexts"]
        for name, of in (("work_items", "done"), ("work_items_planned", "units")):
            count = sum(c[of] for c in contexts)
            assert verified[name] == count == sum(t[name] for t in info["teachers"])
            said = stillhouse("inspect", "verify", s.path).out
            assert f"{verified['work_items']} of {verified['work_items_planned']} work items" in said
        assert info["complete"] == verified["complete"] == status["complete"]
        late = {t["name"]: t["behind"] for t in info["teachers"] if t["behind"]}
        assert (
            late == verified["behind"] == status["behind"] == {v["teacher"]: v["behind"] for v in views if v["behind"]}
        )
        stats = {v["view"]: v for v in told("inspect", "stats", s.path, "--full")["views"]}
        for v in views:
            [c] = [c for c in contexts if (c["teacher"], c["context"]) == (v["teacher"], v["context"])]
            assert (v["tokens"], v["tokens_planned"]) == (c["tokens_done"], c["tokens"])
            of = stats[v["view"]]
            assert of["tokens"] + of["first_tokens"] == v["tokens"] and of["first_tokens"] == of["utterances"]
            assert v["tokens_planned"] == next(t["tokens"] for t in info["teachers"] if t["name"] == v["teacher"])
    assert [
        c["tokens"]
        for c in json.loads(
            stillhouse("extract", both.path.parent / "corpus.jsonl", both.path, "--status", "--json").out
        )["contexts"]
    ] == ([TOKENS] * 4)
    for words in (
        ("inspect", "info"),
        ("inspect", "ls"),
        ("inspect", "verify"),
        ("extract", half.path.parent / "corpus.jsonl"),
    ):
        said = stillhouse(*words, half.path, *(["--status"] if words[0] == "extract" else []))
        assert said.code == 0 and "b is behind the corpus: 4 utterances differ" in " ".join(said.out.split())


def test_the_rest_matches_by_text(half: Store, both: Store, tmp_path: Path) -> None:
    """A diff of two stores, neighbours, the report, and the control that takes the states of another utterance."""
    d = diff(half, both, full=True)
    assert not d.same and [(s.teacher, s.setting, s.a, s.b) for s in d.settings if "behind" in s.setting] == [
        ("b", "utterances behind the newest corpus", "4", "0")
    ]
    assert {n.view: n.tokens for n in d.numbers} == {
        v.address: TOKENS if v.teacher == "a" else 37 * 8 for v in both.views
    }
    near = nearest(both, View("a", "alone", 2), CHANGED, "1", 50)
    assert CHANGED not in {n.utterance for n in near.neighbours}
    for s in (half, both):
        page.write(page.collect(s), tmp_path / "page.html")
    states = TeacherStates(both, "a", "a", both.resolve("a/alone/2"), "shuffled")
    ids = both.utterance_ids
    assert states._partner is not None and (states._partner[both.rows(ids, "a")] != both.rows(ids, "a")).all()
    unlike = states.gather([CHANGED], [0]).states[0]
    assert not np.array_equal(
        unlike, both.gather([CHANGED], both.resolve("a/alone/2"), "float32").states[states.views[0]]
    )

"""Random changes of a corpus and its store. What can be read equals a new store of it, and the rest is named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.errors import StaleError
from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.maintain.combine import copy
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.maintain.remove import remove_utterances, remove_views
from stillhouse.extract.pipeline.corpus_diff import diff_corpus
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request, teacher_record
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.disk.layout import hash_text, to_float32
from stillhouse.extract.store.verify.stale import stale
from stillhouse.extract.store.verify.verify import verify

from ..conftest import TEXTS, loaded

WORDS = " ".join(TEXTS).split()


class Walk:
    """A corpus, its store, and the utterances that were deleted from the store."""

    def __init__(self, folder: Path, teacher: Path, contexts: list[str], seed: int) -> None:
        self.random, self.folder, self.teacher = random.Random(seed), folder, loaded(teacher)
        self.root, self.contexts, self.layers = folder / "s", contexts, [0, 2]
        self.number = 0
        self.utterances = [self.new(f"s{i // 5}") for i in range(25)]
        self.out: set[str] = set()
        extract(self.root, self.corpus, self.teacher, self.request)

    @property
    def corpus(self) -> Corpus:
        return Corpus(self.folder / "corpus.jsonl", self.utterances)

    @property
    def request(self) -> Request:
        return Request("t", self.layers, self.contexts)

    def text(self) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.choice([0, 1, 3, 8, 20])))

    def new(self, session: str | None) -> Utterance:
        self.number += 1
        return Utterance(id=f"u{self.number}", text=self.text(), session=session)

    def edit(self) -> None:
        """Change the corpus in one to three ways."""
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(self.utterances))
            here = self.utterances[at]
            what = self.random.choice(["add", "change", "remove", "move", "session", "sessions"])
            if what == "add":
                self.utterances.insert(at, self.new(here.session))
            elif what == "change":
                self.utterances[at] = here.model_copy(update={"text": self.text()})
            elif what == "remove" and len(self.utterances) > 10:
                del self.utterances[at]
            elif what == "move":
                self.utterances.insert(self.random.randrange(len(self.utterances)), self.utterances.pop(at))
            elif what == "session":
                name = self.random.choice([None, "s1", f"n{self.number}"])
                self.utterances += [self.new(name) for _ in range(self.random.randint(1, 3))]
            else:  # other order of the sessions
                names = list(dict.fromkeys(u.session for u in self.utterances))
                self.random.shuffle(names)
                self.utterances.sort(key=lambda u: names.index(u.session))

    def fresh(self) -> Store:
        """Return a new store of the corpus."""
        shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        extract(self.folder / "fresh", self.corpus, self.teacher, self.request)
        return Store.open(self.folder / "fresh")

    def check_change(self) -> None:
        """Compare what `extract` says has changed with what has changed."""
        fresh, store = self.fresh(), Store.open(self.root)
        record = teacher_record(self.teacher, self.request)
        change = diff_corpus(store.plan, self.corpus, record, self.teacher)
        texts = {u.id: hash_text(u.text) for u in self.utterances}
        known = [i for i in store.utterance_ids if i in texts]
        same = [i for i, h in zip(known, store.text_hash(known) if known else []) if int(h) == texts[i]]
        gone = {i for i in store.utterance_ids if i not in texts}
        told = {} if change is None else {c: {change.utterances[p].id for p in v} for c, v in change.stale.items()}
        for view in store.views:
            fed = store.input_hash(same, view) != fresh.input_hash(same, view) if same else []
            spoken = fresh.lengths("t")[fresh.rows(same)] > 0 if same else []
            expected = {i for i, x, y in zip(same, fed, spoken) if x and y}
            assert told.get(view.context, set()) == expected, view
        assert set(change.removed if change else []) == gone
        assert set(change.changed if change else []) == set(known) - set(same)
        said = [[(u.id, u.text) for u in (self.utterances[i] for i in s)] for s in self.corpus.sessions()]
        found = stale(store, store.views, said)
        for context in (c for c in self.contexts if c in ("past:4", "future:4")):  # one window for each utterance
            assert told.get(context, set()) <= {i for i, which in found.items() if context in which}
        named = gone | (set(known) - set(same)) | set().union(*told.values(), set())
        if named:
            with pytest.raises(StaleError) as e:
                extract(self.root, self.corpus, self.teacher, self.request)
            assert any(i in str(e.value) for i in named)

    def check(self) -> None:
        store = Store.open(self.root, checksums=True)
        assert verify(store) == []
        fresh = self.fresh()
        ids = [i for i in fresh.utterance_ids if i not in self.out]
        assert sorted(store.utterance_ids) == sorted(ids)
        if not self.out:
            assert store.utterance_ids == ids or store.plan.edition() == 0
        for view in store.views:
            assert np.array_equal(store.input_hash(ids, view), fresh.input_hash(ids, view)), view
            a, b = store.gather(ids, [view]), fresh.gather(ids, [view])
            assert np.array_equal(a.token_id["t"], b.token_id["t"]) and np.array_equal(a.span["t"], b.span["t"])
            left, right = (to_float32(g.states[view], "float16") for g in (a, b))
            assert np.allclose(left, right, atol=0.02, rtol=0.02), view
        said = [[(u.id, u.text) for u in (self.utterances[i] for i in s)] for s in self.corpus.sessions()]
        assert not set(stale(store, store.views, said)) - self.out  # training accepts all of it

    def step(self) -> None:
        what = self.random.choice(["edit", "edit", "edit", "gc", "utterances", "views", "copy"])
        if what == "edit":
            self.edit()
            if not self.out:
                self.check_change()
            if self.random.random() < 0.3:
                self.layers = [0, 1, 2]
            extract(self.root, self.corpus, self.teacher, self.request, refresh=True)
            self.out = set()
        elif what == "gc":
            served = Store.open(self.root).utterance_ids
            collect_garbage(self.root)
            assert Store.open(self.root).utterance_ids == served and collect_garbage(self.root).files == 0
        elif what == "utterances":
            ids = Store.open(self.root).utterance_ids
            chosen = self.random.sample(ids, k=min(3, len(ids) - 1))
            if any(
                int(Store.open(self.root).lengths("t")[Store.open(self.root).rows([i])[0]])
                for i in ids
                if i not in chosen
            ):
                remove_utterances(self.root, chosen)
                self.out |= set(chosen)
        elif what == "views":
            context = self.random.choice(self.contexts)
            if len(Store.open(self.root).views) > len(self.layers):
                remove_views(self.root, [f"t/{context}/*"])
                assert not [v for v in Store.open(self.root).views if v.context == context]
                if not self.out:
                    extract(self.root, self.corpus, self.teacher, self.request)
                    assert len(Store.open(self.root).views) == len(self.layers) * len(self.contexts)
        else:
            shutil.rmtree(self.folder / "copy", ignore_errors=True)
            copy(self.root, self.folder / "copy")
            shutil.rmtree(self.root)
            (self.folder / "copy").rename(self.root)


def walk(monkeypatch: pytest.MonkeyPatch, folder: Path, teacher: Path, contexts: list[str], seed: int, n: int) -> None:
    monkeypatch.setattr(layout, "MIN_SHARD_ROWS", 128)  # many shards of few utterances
    changes = Walk(folder, teacher, contexts, seed)
    for _ in range(n):
        changes.step()
        changes.check()


def test_an_encoder_store(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, tmp_path, bert, ["alone", "past:4", "both:4"], 1, 7)


def test_a_decoder_store(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, tmp_path, gpt2, ["past:8"], 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 22))
def test_longer_walks(seed: int, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(monkeypatch, tmp_path, bert, ["alone", "past:4", "future:4", "both:4", "past:6+block"], seed, 20)

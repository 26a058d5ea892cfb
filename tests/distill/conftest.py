"""A store in memory, with the names that `distill` uses of stillhouse.extract.store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from stillhouse.extract.store import Gathered, View, hash_text


@dataclass
class Teacher:
    """Tokens by utterance: lists of (token id, begin, end); states are random, or `planted` [ΣN, D] by view."""

    tokens: dict[str, list[tuple[int, int, int]]]
    width: int
    contexts: tuple[str, ...] = ("alone",)
    layers: tuple[int, ...] = (3, 6)
    dtype: str = "float16"


class FakeStore:
    def __init__(self, texts: dict[str, str], teachers: dict[str, Teacher], seed: int = 0) -> None:
        self.texts, self.teachers = dict(texts), teachers
        rng = np.random.default_rng(seed)
        self.views = [View(n, c, layer) for n, t in teachers.items() for c in t.contexts for layer in t.layers]
        self.states: dict[tuple[View, str], np.ndarray] = {}
        self.norms: dict[View, tuple[np.ndarray, np.ndarray]] = {}
        for view in self.views:
            t = teachers[view.teacher]
            for i, tokens in t.tokens.items():
                self.states[view, i] = rng.normal(1, 2, (len(tokens), t.width)).astype(np.float16)
            self.norms[view] = (
                rng.normal(size=t.width).astype(np.float32),
                rng.uniform(0.5, 2, t.width).astype(np.float32),
            )
        self.tables = {}
        for name, t in teachers.items():
            ids = sorted({token[0] for tokens in t.tokens.values() for token in tokens})
            self.tables[name] = (np.array(ids, np.int32), rng.normal(size=(len(ids), t.width)).astype(np.float16))

    def norm(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        return self.norms[view]

    def embedding(self, teacher: str) -> tuple[np.ndarray, np.ndarray]:
        return self.tables[teacher]

    def vocabulary_rows(self, teacher: str, token_id: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.tables[teacher][0], token_id)

    def teacher(self, name: str) -> SimpleNamespace:
        t = self.teachers[name]
        return SimpleNamespace(dtype=t.dtype, width=t.width, is_speech=False)

    def has(self, ids: Sequence[str], view: View) -> np.ndarray:
        return np.array([i in self.teachers[view.teacher].tokens for i in ids], bool)

    def text_hash(self, ids: Sequence[str], teacher: str | None = None) -> np.ndarray:
        return np.array([hash_text(self.texts[i]) for i in ids], np.uint64)

    def tokens(self, ids: Sequence[str], teacher: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = [self.teachers[teacher].tokens[i] for i in ids]
        flat = np.array([t for ts in tokens for t in ts], np.int32).reshape(-1, 3)
        return np.array([len(t) for t in tokens], np.int32), flat[:, 0], flat[:, 1:]

    def gather(self, ids: Sequence[str], views: Sequence[View]) -> Gathered:
        found = {name: self.tokens(ids, name) for name in dict.fromkeys(v.teacher for v in views)}
        lengths, token_id, span = ({name: parts[k] for name, parts in found.items()} for k in range(3))
        none = {v: np.zeros((0, self.teachers[v.teacher].width), np.float16) for v in views}
        states = {v: np.concatenate([none[v], *(self.states[v, i] for i in ids)]) for v in views}
        return Gathered(lengths, states, token_id, span)


def characters(text: str) -> np.ndarray:
    """Spans of ASR units that are the letters of a text, spaces left out."""
    return np.array([(i, i + 1) for i, c in enumerate(text) if not c.isspace()], np.int32).reshape(-1, 2)


def small_store(seed: int = 0) -> FakeStore:
    """Two teachers of different width and tokenisation over four utterances, one of them without words."""
    texts = {"a": "the cat sat", "b": "a cat", "c": "...", "d": ""}
    pieces = Teacher(
        {
            "a": [(1, 0, 3), (2, 4, 6), (3, 6, 7), (4, 8, 11)],
            "b": [(5, 0, 1), (2, 2, 4), (3, 4, 5)],
            "c": [(9, 0, 3)],
            "d": [],
        },
        width=6,
    )
    words = Teacher(
        {"a": [(70, 0, 3), (80, 3, 7), (90, 7, 11)], "b": [(60, 0, 1), (80, 1, 5)], "c": [(50, 0, 3)], "d": []},
        width=4,
        contexts=("alone", "both:8"),
        layers=(2,),
    )
    return FakeStore(texts, {"pieces": pieces, "words": words}, seed)


@pytest.fixture
def store() -> FakeStore:
    return small_store()


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """What the tests build stores of; conftest cannot be imported under --import-mode=importlib."""
    return SimpleNamespace(FakeStore=FakeStore, Teacher=Teacher, small_store=small_store, characters=characters)

"""Stores made by the real extraction from a teacher whose states are known by heart."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from stillhouse.data.manifest import Corpus, Utterance, write_manifest
from stillhouse.data.text import transform
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.teacher.tokenizer import Tokens

DEAD, OUTLIER = 0, 1  # dimensions


class WordTokeniser:
    """Words are tokens; an id is its word's place in `words`. Ids 1 and 2 stand around a text."""

    prefix, suffix, leading_space, hash = [1], [2], False, "words"
    # Of all tokenisers of a process, so that stores of different texts spell a word by the same id
    words: ClassVar[dict[int, str]] = {0: "[PAD]", 1: "[BEGIN]", 2: "[END]"}
    ids: ClassVar[dict[str, int]] = {}

    def join_ids(self, join: str) -> list[int]:
        return []

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.words[i] for i in ids]

    def id_of(self, word: str) -> int:
        """By the word itself, so that its vector does not depend on which test came first."""
        if word not in self.ids:
            number = word.removeprefix("w")
            at = 1000 + int(number) if number.isdecimal() else 3 + zlib.crc32(word.encode()) % 900
            while at in self.words:
                at += 1
            self.ids[word], self.words[at] = at, word
        return self.ids[word]

    def encode(self, texts: list[str], name: str) -> Tokens:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        lengths: list[int] = []
        for text in texts:
            mapped = transform(text, name)
            at = 0
            words = mapped.text.split()
            for word in words:
                begin = mapped.text.index(word, at)
                at = begin + len(word)
                ids.append(self.id_of(word))
                spans.append(tuple(mapped.spans(np.array([[begin, at]]))[0].tolist()))
            lengths.append(len(words))
        return Tokens(np.array(ids, np.int32), np.array(lengths, np.int32), np.array(spans, np.int32).reshape(-1, 2))


class KnownTeacher:
    """Layer k of a token: its word's own vector, plus k/10 of the mean of all that the pass saw.

    Dimension 0 is always 0.5; dimension 1 has 30 added. What is at the beginning is six times as long, if a decoder.
    """

    source, architecture, revision, dtype, device, depth = "known", "KnownModel", None, "float32", "cpu", 4
    about = "made up"

    def __init__(self, width: int = 12, kind: str = "encoder", window: int = 256, seed: int = 0) -> None:
        self.width, self.kind, self.window = width, kind, window
        self.tokeniser = WordTokeniser()
        self.table = np.random.default_rng(seed).normal(size=(40_000, width)).astype(np.float32)

    def clone_model(self) -> KnownTeacher:
        return self

    def weights_hash(self) -> str:
        return "known"

    def layer_numbers(self, asked: list[int]) -> list[int]:
        return sorted({k if k >= 0 else self.depth + 1 + k for k in asked})

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        return self.table[ids]

    def states(self, batch: list[Any], layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        longest = max(len(w.ids) for w in batch)
        out = {k: np.zeros((len(batch), longest, self.width), np.float32) for k in layers}
        for row, window in enumerate(batch):
            own = self.table[window.ids]
            for k in layers:
                state = own + k / 10 * own.mean(0)
                state[:, DEAD] = 0.5
                state[:, OUTLIER] += 30
                if self.kind == "decoder":
                    state[1] *= 6  # behind the token that stands before the text
                out[k][row, : len(window.ids)] = state
        return {k: torch.from_numpy(v) for k, v in out.items()}


TEXTS = [
    "THE RIVER BANK WAS WET",
    "HE SAT ON THE BANK",
    "IT RAINED ALL DAY",
    "THE BANK LENT HIM MONEY",
    "",
    "MONEY IN THE BANK IS 😀 SAFE",
]


def corpus_of(folder: Path, texts: list[str], per_session: int = 3) -> Corpus:
    utterances = [
        Utterance(id=f"s{i // per_session:02}-{i:04}", text=t, session=f"s{i // per_session:02}")
        for i, t in enumerate(texts)
    ]
    path = folder / "corpus.jsonl"
    write_manifest(path, utterances)
    return Corpus(path, utterances)


def build(
    folder: Path,
    texts: list[str] = TEXTS,
    *,
    layers: tuple[int, ...] = (0, 2, 4),
    contexts: tuple[str, ...] = ("alone", "both:8"),
    stop_after: int | None = None,
    teacher: KnownTeacher | None = None,
    per_session: int = 3,
    **request: Any,
) -> Store:
    """A store under `folder`; with `stop_after`, its extraction is interrupted when so many units are committed."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = corpus_of(folder, texts, per_session)

    def report(progress: Any) -> None:
        if stop_after is not None and progress.items >= stop_after:
            raise KeyboardInterrupt

    wanted = Request("known", layers, contexts, **{"transform": "lower", **request})
    try:
        extract(folder / "store.zarr", corpus, teacher or KnownTeacher(), wanted, report)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        assert stop_after is not None
    return Store.open(folder / "store.zarr")


@pytest.fixture(scope="session")
def known() -> SimpleNamespace:
    """What the tests build stores of; conftest cannot be imported under --import-mode=importlib."""
    return SimpleNamespace(
        build=build, corpus_of=corpus_of, Teacher=KnownTeacher, TEXTS=TEXTS, DEAD=DEAD, OUTLIER=OUTLIER
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six utterances in two sessions, two contexts, three layers."""
    return build(tmp_path_factory.mktemp("whole"))


LONG = [" ".join(f"w{(i * 7 + j * j) % 300}" for j in range(20)) for i in range(450)]


@pytest.fixture(scope="session")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """9,000 tokens in five shards; seven or eight of its ten work items are there: `alone` whole, `both:8` not."""
    return build(tmp_path_factory.mktemp("partial"), LONG, per_session=10, stop_after=7)


@pytest.fixture
def stillhouse(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process: exit code, stdout, stderr."""
    from stillhouse.cli import main

    def run(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        code: object = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as e:
            code = e.code
        found = capsys.readouterr()
        return SimpleNamespace(code=code, out=found.out, err=found.err)

    yield run
    assert sys.stdout is not None

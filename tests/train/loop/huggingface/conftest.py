"""Tiny random transducers of transformers, a tokenizer, and a store over transcripts with capitals and commas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import known_store
import parakeets
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")  # the first with AutoModelForRNNT

# As the teachers read them. The labels are in lower case without punctuation.
TEXTS = [
    "The river bank, was wet.",
    "He sat on the bank!",
    "It rained all day.",
    "The bank lent him money?",
    "Money in the bank: it is safe.",
    "All day it rained.",
    "The money was wet.",
    "He lent the bank money.",
]
FRAMES = 60


def inputs(units: list[list[int]], padding: int = -100, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random features of falling lengths, with these labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = FRAMES - 9 * torch.arange(len(units))
    longest = max(map(len, units))
    return {
        "input_features": torch.randn(len(units), FRAMES, parakeets.BINS, generator=generator),
        "attention_mask": (torch.arange(FRAMES) < lengths[:, None]).long(),
        "labels": torch.tensor([row + [padding] * (longest - len(row)) for row in units]),
    }


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Any, other: Any, tolerance: float = 1e-4) -> None:
    expected = gradients(other)
    assert gradients(ours).keys() == expected.keys() and expected
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the tests make models and batches of."""
    folder = tmp_path_factory.mktemp("store")
    store = known_store.build(folder, TEXTS)
    words = parakeets.tokenizer(TEXTS)
    ids = [u.id for u in known_store.corpus_of(folder, TEXTS).utterances]
    return SimpleNamespace(
        TEXTS=TEXTS, normal=parakeets.normal, assert_same_gradients=assert_same_gradients,
        model=parakeets.model, inputs=inputs, tokenizer=words, store=store, ids=ids,
        corpus=folder / "corpus.jsonl", zarr=folder / "store.zarr",
        student=lambda kind="tdt", **options: parakeets.model(
            kind, size=len(words), blank=len(words) - 1, pad=words.pad_token_id, **options
        ),
    )  # fmt: skip


@pytest.fixture(scope="session")
def examples(hf: SimpleNamespace) -> list[dict[str, Any]]:
    """A dataset: an id, features of other lengths, and labels from the normalised transcript."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "id": i,
            "input_features": torch.randn(FRAMES - 4 * k, parakeets.BINS, generator=generator),
            "labels": hf.tokenizer(parakeets.normal(text), add_special_tokens=False).input_ids,
        }
        for k, (i, text) in enumerate(zip(hf.ids, TEXTS, strict=True))
    ]


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator as users write it."""
    features = [e["input_features"] for e in examples]
    lengths = torch.tensor([len(f) for f in features])
    longest = max(len(e["labels"]) for e in examples)
    return {
        "input_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": torch.tensor([e["labels"] + [-100] * (longest - len(e["labels"])) for e in examples]),
    }


@pytest.fixture(scope="session")
def collate() -> Callable[..., Any]:
    return pad


@pytest.fixture
def settings(hf: SimpleNamespace) -> dict[str, Any]:
    """Two transfers by name from one store."""
    return {
        "stores": str(hf.zarr),
        "text": {"views": "known/*/4", "aligner": "occupancy", "distance": "contrastive", "weight": 0.3},
        "predictor": {"views": "known/alone/2", "aligner": "predictor", "weight": 0.1},
    }


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

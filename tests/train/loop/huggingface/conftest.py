"""Tiny random transducers of transformers, a tokenizer, and a store over transcripts with capitals and commas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import known_store
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
ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "subsampling_factor": 4, "subsampling_conv_channels": 4, "num_mel_bins": 16, "conv_kernel_size": 5,
    **dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout", "dropout_positions"), 0.0),
}  # fmt: skip
FRAMES = 60


def normal(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c == " ")


def tokenizer() -> Any:
    """A tokenizer like Parakeet's: BPE over words that begin with ▁, then <pad> and <blank>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        map(normal, TEXTS), trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>"], show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<blank>"]
    )


def model(kind: str = "rnnt", *, size: int = 12, blank: int = 11, pad: int = 2, seed: int = 0, **options: Any) -> Any:
    """A random ParakeetForRNNT or ParakeetForTDT in training mode. Options with encoder_ in front are the encoder's."""
    encoder = ENCODER | {k.removeprefix("encoder_"): v for k, v in options.items() if k.startswith("encoder_")}
    own = {k: v for k, v in options.items() if not k.startswith("encoder_")}
    config = {"rnnt": transformers.ParakeetRNNTConfig, "tdt": transformers.ParakeetTDTConfig}[kind]
    wanted = {
        "vocab_size": size, "decoder_hidden_size": 10, "num_decoder_layers": 1, "encoder_config": encoder,
        "pad_token_id": pad, "blank_token_id": blank, "decoder_start_token_id": blank, **own,
    }  # fmt: skip
    torch.manual_seed(seed)
    automatic = {"rnnt": transformers.AutoModelForRNNT, "tdt": transformers.AutoModelForTDT}[kind]
    return automatic.from_config(config(**wanted)).train()


def inputs(units: list[list[int]], padding: int = -100, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random features of falling lengths, with these labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = FRAMES - 9 * torch.arange(len(units))
    longest = max(map(len, units))
    return {
        "input_features": torch.randn(len(units), FRAMES, ENCODER["num_mel_bins"], generator=generator),
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
    words = tokenizer()
    ids = [u.id for u in known_store.corpus_of(folder, TEXTS).utterances]
    return SimpleNamespace(
        TEXTS=TEXTS, normal=normal, assert_same_gradients=assert_same_gradients,
        model=model, inputs=inputs, tokenizer=words, store=store, ids=ids,
        corpus=folder / "corpus.jsonl", zarr=folder / "store.zarr",
        student=lambda kind="tdt", **options: model(
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
            "input_features": torch.randn(FRAMES - 4 * k, ENCODER["num_mel_bins"], generator=generator),
            "labels": hf.tokenizer(normal(text), add_special_tokens=False).input_ids,
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

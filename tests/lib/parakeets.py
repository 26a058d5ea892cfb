"""Tiny random transducers of transformers, and folders of them as their users load.

Used by tests/train/loop/huggingface and by tests/docs/test_blocks.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

BINS = 16
ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "subsampling_factor": 4, "subsampling_conv_channels": 4, "num_mel_bins": BINS, "conv_kernel_size": 5,
    **dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout", "dropout_positions"), 0.0),
}  # fmt: skip


def normal(text: str) -> str:
    """Return a text in lower case without punctuation."""
    return "".join(c for c in text.lower() if c.isalnum() or c == " ")


def tokenizer(texts: Iterable[str], size: int = 40) -> Any:
    """A tokenizer like Parakeet's: BPE over words that begin with ▁, then <pad> and <blank>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import ParakeetTokenizer

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(map(normal, texts), trainer)
    return ParakeetTokenizer(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<blank>"]
    )


def model(kind: str = "rnnt", *, size: int = 12, blank: int = 11, pad: int = 2, seed: int = 0, **options: Any) -> Any:
    """A random ParakeetForRNNT or ParakeetForTDT in training mode. Options with encoder_ in front are the encoder's."""
    import transformers

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


def save(folder: Path, texts: Iterable[str]) -> Path:
    """Write a folder with a random token-and-duration transducer and its processor, and return it."""
    import transformers

    words = tokenizer(texts, 100)
    made = model("tdt", size=len(words), blank=len(words) - 1, pad=words.pad_token_id)
    # As the published models have it: the search must not take a duration for a unit.
    made.generation_config.suppress_tokens = list(range(len(words), len(words) + len(made.config.durations)))
    made.save_pretrained(folder)
    extractor = transformers.ParakeetFeatureExtractor(feature_size=BINS)
    transformers.ParakeetProcessor(extractor, words, decoder_type="tdt").save_pretrained(folder)
    return folder

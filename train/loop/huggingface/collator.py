"""A data collator that adds the targets of transfers to the batches of another one.

Guarantees: the targets belong to the utterances of the batch in their order. What goes wrong while they are read is
raised by the model in training, so that the same collator serves evaluation on utterances that no store has.
Try: `pytest tests/train/loop/huggingface/test_collator.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from ....data.errors import ConfigError, CorpusError, StillhouseError
from .heads import TransferHeads
from .parts import IGNORED, real_labels
from .spans import unit_spans


class TransferCollator:
    """Makes a batch by another collator, and adds the targets of the heads' transfers to it as "transfer".

    It also replaces the padding of the batch's labels by -100, so that the Trainer counts units without padding.

    Arguments:
        heads: what `attach_transfer` returned. The collator keeps its target readers and transcripts.
        tokenizer: the tokenizer that made the labels. The characters that a label stands for are found through it.
        collate: makes a batch with "labels" [B, U] of a list of examples, in their order.
        id_key: the key of the utterance's id in an example.

    Each example needs the utterance's id as the corpus spells it. An augmented copy has the id of its original, and for
    the aligner "frames" its "speed".
    """

    def __init__(
        self, heads: TransferHeads, tokenizer: Any, collate: Callable[[Sequence[Any]], Any], id_key: str = "id"
    ) -> None:
        self.tokenizer, self.collate, self.id_key = tokenizer, collate, id_key
        self.readers, self.texts = heads.readers, heads.texts
        pad = getattr(tokenizer, "pad_token_id", None)
        self.paddings = (*heads.paddings, *([] if pad is None else [pad]))
        self.corpus = heads.config.data.corpus
        self._spans: dict[tuple[str, bytes], np.ndarray] = {}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the other collator's batch of these examples, with the targets."""
        batch = self.collate(examples)
        labels, counts = real_labels(torch.as_tensor(batch["labels"]), self.paddings)
        padding = torch.arange(labels.shape[1]) >= counts[:, None]
        batch["labels"] = labels.masked_fill(padding, IGNORED)
        if self.readers:
            batch["transfer"] = self._targets(examples, labels, counts, _rows(batch))
        return batch

    def _targets(
        self, examples: Sequence[Mapping[str, Any]], labels: Tensor, counts: Tensor, lengths: np.ndarray | None
    ) -> dict[str, Any]:
        """Return the batch of each target reader by name, or the error that it raised."""
        try:
            ids = [self._id(example) for example in examples]
            texts = [self._text(i) for i in ids]
            rows = zip(ids, texts, labels.numpy(), counts.tolist(), strict=True)
            spans = [self._unit_spans(i, text, row[:count]) for i, text, row, count in rows]
        except StillhouseError as e:
            return dict.fromkeys(self.readers, e)
        # The views of the mixing "sample" are drawn by the batch, because a worker does not know the step.
        draw = crc32("\n".join(ids).encode())
        speeds = [float(example.get("speed", 1.0)) for example in examples]
        targets: dict[str, Any] = {}
        for name, reader in self.readers.items():
            try:
                targets[name] = reader.read(ids, texts, spans, step=draw, rows=lengths, speeds=speeds)
            except StillhouseError as e:
                targets[name] = e
        return targets

    def _id(self, example: Mapping[str, Any]) -> str:
        if self.id_key not in example:
            raise ConfigError(
                f"an example has no {self.id_key!r}, only {', '.join(map(str, example))}",
                expected="the id of its utterance in the corpus",
                remedy="keep it in the dataset; with the Trainer of transformers, set remove_unused_columns=False",
            )
        return str(example[self.id_key])

    def _text(self, utterance: str) -> str:
        if utterance not in self.texts:
            raise CorpusError(f"the corpus has no utterance {utterance!r}", where=self.corpus)
        return self.texts[utterance]

    def _unit_spans(self, utterance: str, text: str, labels: np.ndarray) -> np.ndarray:
        """Return the spans of an utterance's labels, which are computed once."""
        key = (text, labels.tobytes())
        if key not in self._spans:
            try:
                self._spans[key] = unit_spans(self.tokenizer, labels.tolist(), text)
            except CorpusError as e:
                raise CorpusError(e.what, where=utterance, expected="labels of its own transcript") from None
        return self._spans[key]


def _rows(batch: Mapping[str, Any]) -> np.ndarray | None:
    """Return the rows of features of each utterance, int64 [B], or None if the batch does not tell."""
    if batch.get("attention_mask") is not None:
        return torch.as_tensor(batch["attention_mask"]).sum(-1).long().numpy()
    if batch.get("input_features") is not None:
        features = torch.as_tensor(batch["input_features"])
        return np.full(len(features), features.shape[1], np.int64)
    return None

"""Batches of the collator: targets of the right utterances, and errors that training alone raises."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from stillhouse.data.errors import ConfigError, CorpusError, NoStoreError
from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.train import TransferCollator, attach_transfer

Settings = dict[str, Any]


@pytest.fixture
def attached(hf: SimpleNamespace, settings: Settings) -> SimpleNamespace:
    model = hf.student()
    return SimpleNamespace(model=model, heads=attach_transfer(model, settings, hf.corpus))


def test_targets_are_those_that_the_readers_read(
    hf: SimpleNamespace, attached: SimpleNamespace, collate: Callable, examples: list
) -> None:
    from stillhouse.train.loop.huggingface.spans import unit_spans

    chosen = [examples[k] for k in (5, 0, 3)]
    batch = TransferCollator(attached.heads, hf.tokenizer, collate)(chosen)
    texts = {u.id: u.text for u in read_manifest(hf.corpus).utterances}
    ids = [e["id"] for e in chosen]
    spans = [unit_spans(hf.tokenizer, e["labels"], texts[e["id"]]) for e in chosen]
    for name, reader in attached.heads.readers.items():
        expected = reader.read(ids, [texts[i] for i in ids], spans)
        found = batch["transfer"][name]
        assert found.targets.keys() == expected.targets.keys()
        assert all(torch.equal(found.targets[k], v) for k, v in expected.targets.items())
        positions = expected.positions["known"]
        assert torch.equal(found.positions["known"].unit_weight, positions.unit_weight)
        # The word "bank" of "He sat on the bank!" is that of its labels, whatever is between the words.
        assert positions.unit_weight.sum(-1).max() > 0.99


def test_padding_of_labels_becomes_minus_100(
    hf: SimpleNamespace, attached: SimpleNamespace, collate: Callable, examples: list
) -> None:
    def with_pads(chosen: Any) -> Any:
        batch = collate(chosen)
        pad = hf.tokenizer.pad_token_id
        return batch | {"labels": torch.nn.functional.pad(batch["labels"], (0, 2), value=-100).where(
            torch.nn.functional.pad(batch["labels"], (0, 2), value=-100) != -100, torch.tensor(pad)
        )}  # fmt: skip

    found, plain = (TransferCollator(attached.heads, hf.tokenizer, c)(examples[:3]) for c in (with_pads, collate))
    assert torch.equal(found["labels"], plain["labels"])
    assert (found["labels"] == -100).any()
    assert torch.equal(attached.model(**found).loss, attached.model(**plain).loss)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_raised_in_training_alone(
    hf: SimpleNamespace, attached: SimpleNamespace, collate: Callable, examples: list, workers: int
) -> None:
    nameless = [{k: v for k, v in e.items() if k != "id"} for e in examples[:2]]
    unknown = [e | {"id": "elsewhere-1"} for e in examples[:2]]
    other = [examples[0] | {"id": examples[2]["id"]}, examples[1]]
    collator = TransferCollator(attached.heads, hf.tokenizer, collate)
    for wrong, error, text in (
        (nameless, ConfigError, "has no 'id', only input_features, labels.*remove_unused_columns=False"),
        (unknown, CorpusError, "no utterance 'elsewhere-1'"),
        (other, CorpusError, f"{examples[2]['id']}: the labels spell 'the river bank was wet', but"),
    ):
        (batch,) = DataLoader(wrong, batch_size=2, collate_fn=collator, num_workers=workers)
        attached.model.train()
        with pytest.raises(error, match=text):
            attached.model(**batch)
        attached.model.eval()
        assert torch.isfinite(attached.model(**batch).loss)
    (batch,) = DataLoader(examples[:2], batch_size=2, collate_fn=collator, num_workers=workers)
    assert torch.isfinite(attached.model.train()(**batch).loss)


def test_an_utterance_that_the_store_lacks(
    hf: SimpleNamespace, collate: Callable, examples: list, settings: Settings, tmp_path: Any
) -> None:
    more = [*read_manifest(hf.corpus).utterances]
    added = type(more[0])(id="new-1", text="the bank", session="new")
    write_manifest(tmp_path / "corpus.jsonl", [*more, added])
    labels = hf.tokenizer("the bank", add_special_tokens=False).input_ids
    batch = [examples[0], examples[1] | {"id": "new-1", "labels": labels}]
    for on_missing in ("error", "skip"):
        model = hf.student()
        heads = attach_transfer(model, settings | {"on_missing": on_missing}, tmp_path / "corpus.jsonl")
        made = TransferCollator(heads, hf.tokenizer, collate)(batch)
        if on_missing == "error":
            with pytest.raises(NoStoreError, match="new-1"):
                model(**made)
        else:
            assert made["transfer"]["text"].skipped == 1
            model(**made).loss.backward()


def test_sampled_views_and_a_copy_for_a_worker(hf: SimpleNamespace, collate: Callable, examples: list) -> None:
    settings = {"stores": str(hf.zarr), "views": "known/*/*", "mixing": "sample", "sample": 2}
    model = hf.student()
    heads = attach_transfer(model, settings, hf.corpus)
    collator = TransferCollator(heads, hf.tokenizer, collate)
    copied = pickle.loads(pickle.dumps(collator))
    drawn = set()
    for first in range(6):
        one, two = (c(examples[first : first + 2])["transfer"][""] for c in (collator, copied))
        assert len(one.targets) == 2 and one.targets.keys() == two.targets.keys()
        drawn |= one.targets.keys()
    assert len(drawn) > 3
    assert not [v for v in vars(copied).values() if isinstance(v, torch.nn.Module)]

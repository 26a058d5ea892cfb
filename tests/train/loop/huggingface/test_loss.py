"""Our losses in transducers of transformers, against those of transformers themselves.

Guarantees: the oracle is the model before the transfer was attached, or its logits and our own losses of logits.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.data.errors import ConfigError
from stillhouse.train import attach_transfer
from stillhouse.train.loop.huggingface.parts import fused_activation
from stillhouse.train.model import losses
from stillhouse.train.rnnt import rnnt_loss

UNITS = [[3, 4, 5, 6, 6], [7, 3], [8, 9, 10]]


def theirs(model: Any, batch: dict[str, Tensor], padding: int, **options: Any) -> Any:
    """The output of transformers' own forward pass, which needs its own padding and the decoder's inputs."""
    labels = batch["labels"].where(batch["labels"] != -100, padding)
    start = labels.new_full((len(labels), 1), model.config.blank_token_id)
    return model(**batch | {"labels": labels, "decoder_input_ids": torch.cat([start, labels], 1)}, **options)


@pytest.mark.parametrize("blank", [11, 0, 5])
@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_loss_and_gradients_equal_theirs(hf: SimpleNamespace, kind: str, blank: int) -> None:
    plain = hf.model(kind, blank=blank, pad=2)
    ours = copy.deepcopy(plain)
    attach_transfer(ours)
    batch = hf.inputs([[u if u != blank else 1 for u in row] for row in UNITS])
    expected = theirs(plain, batch, 2 if kind == "tdt" else blank)
    expected.loss.backward()
    found = ours(**batch)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert found.logits is None and torch.equal(found.last_hidden_state, expected.last_hidden_state)
    hf.assert_same_gradients(ours, plain)


@pytest.mark.parametrize("reduction", ["mean_volume", "mean_batch", "mean", "sum"])
@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_reductions_and_sigma_equal_theirs(hf: SimpleNamespace, kind: str, reduction: str) -> None:
    plain = hf.model(kind)
    ours = copy.deepcopy(plain)
    attach_transfer(ours, reduction=reduction, sigma=0.05 if kind == "tdt" else 0.0)
    batch = hf.inputs(UNITS)
    more = {"sigma": 0.05} if kind == "tdt" else {}
    expected = theirs(plain, batch, 2 if kind == "tdt" else 11, reduction=reduction, **more).loss
    torch.testing.assert_close(ours(**batch).loss, expected, rtol=1e-5, atol=1e-5)
    attach_transfer(plain)
    torch.testing.assert_close(plain(**batch, reduction=reduction, **more).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_every_padding_of_labels_is_the_same(hf: SimpleNamespace, kind: str) -> None:
    model = hf.model(kind)
    attach_transfer(model)
    first = model(**hf.inputs(UNITS)).loss
    for padding in [11] + ([2] if kind == "tdt" else []):
        assert torch.equal(model(**hf.inputs(UNITS, padding)).loss, first)
    wide = hf.inputs([[*UNITS[0], -100, -100], *UNITS[1:]])
    assert torch.equal(model(**wide).loss, first)
    with pytest.raises(ValueError, match="row 1 have padding, -100, between units, at position 0"):
        model(**hf.inputs([[3, 4], [-100, 3]]))


def test_an_empty_transcript_costs_its_blanks(hf: SimpleNamespace) -> None:
    model = hf.model("tdt")
    attach_transfer(model, reduction="sum")
    alone = model(**hf.inputs([[3, 4]])).loss
    both = model(**hf.inputs([[3, 4], []])).loss
    assert torch.isfinite(both) and both > alone
    assert torch.isfinite(model(**hf.inputs([[], []]), reduction="mean").loss)


def test_without_an_attention_mask_every_frame_counts(hf: SimpleNamespace) -> None:
    model = hf.model("rnnt")
    attach_transfer(model)
    batch = hf.inputs([UNITS[0]])  # the mask of a single utterance is all ones
    expected = model(**batch).loss
    del batch["attention_mask"]
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_joints_with_another_activation(hf: SimpleNamespace, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf.model("rnnt", hidden_act=activation)
    ours = copy.deepcopy(plain)
    attach_transfer(ours)
    assert fused_activation(ours) == ("tanh" if activation == "tanh" else None)
    monkeypatch.setattr(losses, "MOST_LOGITS", 1)  # one utterance at a time
    expected = theirs(plain, hf.inputs(UNITS), 11)
    expected.loss.backward()
    found = ours(**hf.inputs(UNITS))
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    hf.assert_same_gradients(ours, plain)


def test_a_joint_that_computes_something_else_is_not_fused(hf: SimpleNamespace) -> None:
    model = hf.model("rnnt")

    class Scaled(type(model.joint)):  # type: ignore[misc]
        def forward(self, decoder_hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self.head(self.activation(2 * encoder_hidden_states + decoder_hidden_states))

    model.joint.__class__ = Scaled
    plain = copy.deepcopy(model)
    attach_transfer(model)
    assert fused_activation(model) is None
    torch.testing.assert_close(model(**hf.inputs(UNITS)).loss, theirs(plain, hf.inputs(UNITS), 11).loss)


def test_occupancies_are_those_of_the_logits(hf: SimpleNamespace) -> None:
    plain = hf.model("rnnt")
    ours = copy.deepcopy(plain)
    attach_transfer(ours)
    batch = hf.inputs(UNITS)
    logits = theirs(plain, batch, 11).logits
    lengths = plain.get_audio_features(batch["input_features"], batch["attention_mask"]).attention_mask.sum(-1)
    found = ours(**batch, return_occupancy=True).occupancy
    counts = torch.tensor([len(row) for row in UNITS])
    targets = batch["labels"].clamp_min(0)
    _, expected = rnnt_loss(logits, targets, lengths, counts, blank=11, return_occupancy=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.sum(-1)[0], torch.ones(5), atol=1e-4)


def test_bfloat16_and_autocast_compute_the_loss_in_float32(hf: SimpleNamespace) -> None:
    for kind in ("rnnt", "tdt"):
        model = hf.model(kind)
        attach_transfer(model)
        exact = model(**hf.inputs(UNITS)).loss
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**hf.inputs(UNITS)).loss
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.03, atol=0)
        found.backward()
        half = hf.model(kind).to(torch.bfloat16)
        attach_transfer(half)
        batch = hf.inputs(UNITS)
        loss = half(**batch | {"input_features": batch["input_features"].bfloat16()}).loss
        loss.backward()
        torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)
        assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in half.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(hf: SimpleNamespace, reentrant: bool) -> None:
    plain, ours = hf.model("tdt"), hf.model("tdt")
    for model in (plain, ours):
        attach_transfer(model)
    ours.activation_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, ours):
        model(**hf.inputs(UNITS)).loss.backward()
    hf.assert_same_gradients(ours, plain, 1e-6)


@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_evaluation_and_generate_are_those_of_the_plain_model(hf: SimpleNamespace, kind: str) -> None:
    plain = hf.model(kind).eval()
    ours = copy.deepcopy(plain)
    attach_transfer(ours)
    assert not ours.stillhouse.training
    batch = hf.inputs(UNITS)
    labels = batch.pop("labels")
    with torch.no_grad():
        # The search of transformers would take a duration of a random model for a unit.
        more = {"suppress_tokens": list(range(12, 17))} if kind == "tdt" else {}
        found, expected = (m.generate(**batch, max_new_tokens=150, **more) for m in (ours, plain))
        assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.durations, expected.durations)
        start = torch.full((3, 1), 11)
        one, other = (m(**batch, decoder_input_ids=start).logits for m in (ours, plain))
        assert torch.equal(one, other)
        found = ours(**batch, labels=labels)
        expected = theirs(plain, batch | {"labels": labels}, 2 if kind == "tdt" else 11)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
        assert found.losses is None
        assert torch.equal(ours(**batch, labels=labels, return_dict=False)[2], found.loss)


def test_streaming_models_whose_own_loss_is_that_of_a_language_model(hf: SimpleNamespace) -> None:
    import transformers

    torch.manual_seed(0)
    encoder = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 4, "conv_kernel_size": 5,
        **dict.fromkeys(("dropout", "layerdrop", "activation_dropout", "attention_dropout", "dropout_positions"), 0.0),
    }  # fmt: skip
    config = transformers.NemotronAsrStreamingConfig(
        vocab_size=12, decoder_hidden_size=10, num_decoder_layers=1, encoder_config=encoder, blank_token_id=11
    )
    model = transformers.AutoModelForRNNT.from_config(config).train()
    batch = hf.inputs(UNITS)
    start = torch.cat([torch.full((3, 1), 11), batch["labels"].clamp_min(0)], 1)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    plain = model(**inputs, decoder_input_ids=start, num_lookahead_tokens=3)
    lengths = model.get_audio_features(**inputs, num_lookahead_tokens=3).attention_mask.sum(-1)
    counts = torch.tensor([len(row) for row in UNITS])
    expected = rnnt_loss(plain.logits, batch["labels"].clamp_min(0), lengths, counts, 11, reduction="mean_volume")
    attach_transfer(model)
    found = model(**batch, num_lookahead_tokens=3).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward()


def test_what_is_no_transducer_of_transformers_is_refused(hf: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"Linear has no config, encoder, decoder, joint.*AutoModelForRNNT"):
        attach_transfer(nn.Linear(2, 2))
    model = hf.model()
    attach_transfer(model)
    with pytest.raises(ConfigError, match="has a transfer already"):
        attach_transfer(model)
    with pytest.raises(ConfigError, match=r"no reduction 'median'.*mean_volume"):
        attach_transfer(hf.model(), reduction="median")

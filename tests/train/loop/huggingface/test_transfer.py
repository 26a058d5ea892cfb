"""Transfers in a transducer of transformers: what reaches the heads, what reaches the student, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stillhouse.data.errors import ConfigError, NoStoreError
from stillhouse.distill import Transfer
from stillhouse.train import TransferCollator, attach_transfer
from stillhouse.train.loop.huggingface.parts import tapped

Settings = dict[str, Any]


@pytest.fixture
def attached(hf: SimpleNamespace, collate: Callable, settings: Settings, examples: list) -> Callable[..., Any]:
    """Return a model with the transfers, its heads, and a collator."""

    def attach(kind: str = "tdt", transfer: Settings = settings, model: Any = None, **options: Any) -> SimpleNamespace:
        model = hf.student(kind) if model is None else model
        heads = attach_transfer(model, transfer, hf.corpus, **options)
        collator = TransferCollator(heads, hf.tokenizer, collate)
        return SimpleNamespace(model=model, heads=heads, collate=collator, batch=collator(examples[:4]))

    return attach


@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_the_loss_is_the_transducers_plus_each_transfer_times_its_lambda(attached: Callable, kind: str) -> None:
    a = attached(kind)
    output = a.model(**a.batch)
    parts = output.losses
    expected = parts["transducer"] + 0.3 * parts["transfer.text"] + 0.1 * parts["transfer.predictor"]
    torch.testing.assert_close(output.loss.detach(), expected)
    views = {"transfer.text/known/alone/4", "transfer.text/known/both:8/4", "transfer.predictor/known/alone/2"}
    assert views <= parts.keys()
    a.model.training = False  # batch norms still normalise by the batch
    plain = a.model(**a.batch)
    torch.testing.assert_close(plain.loss, parts["transducer"])


def test_what_the_transfer_gets_are_the_students_states(
    hf: SimpleNamespace, attached: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    own = Transfer.forward

    def spy(self: Transfer, encoder: Any, lengths: Any, batch: Any, occupancy: Any, predictor: Any) -> Any:
        seen[self.addresses[0]] = (encoder, lengths, occupancy, predictor)
        return own(self, encoder, lengths, batch, occupancy, predictor)

    monkeypatch.setattr(Transfer, "forward", spy)
    text = {"stores": str(hf.zarr), "text": {"views": "known/alone/4", "layers": [1, 3]}}
    a = attached("rnnt", text)
    output = a.model(**a.batch, return_occupancy=True, output_hidden_states=True)
    taps, lengths, occupancy, predictor = seen["known/alone/4"]
    assert torch.equal(taps[0], output.hidden_states[1]) and torch.equal(taps[1], output.last_hidden_state)
    assert torch.equal(occupancy, output.occupancy)
    encoder = a.model.encoder(a.batch["input_features"], a.batch["attention_mask"])
    assert torch.equal(lengths, encoder.attention_mask.sum(-1))
    labels = a.batch["labels"].clamp_min(0)
    blank = labels.new_full((4, 1), a.model.config.blank_token_id)
    real = (a.batch["labels"] != -100).sum(1)
    states = a.model.decoder(torch.cat([blank, labels], 1))
    for row in range(4):  # states in the padding may be any
        torch.testing.assert_close(predictor[row, : real[row] + 1], states[row, : real[row] + 1])


def test_taps_of_layers_that_layer_drop_skips(hf: SimpleNamespace) -> None:
    model = hf.model(encoder_num_hidden_layers=4)
    encoder, batch = model.encoder, hf.inputs([[3], [4]])
    arguments = (batch["input_features"], batch["attention_mask"])
    layers = [*encoder.layers]
    for skipped in ((), (1,), (0, 1), (2, 3), (0, 1, 2, 3)):
        expected, x = {}, None
        with tapped(encoder.layers, {1, 2, 3, 4}) as states:
            kept = nn.ModuleList(layer for number, layer in enumerate(layers) if number not in skipped)
            encoder.layers = kept
            output = encoder(*arguments, output_hidden_states=True)
            encoder.layers = nn.ModuleList(layers)
        behind = list(output.hidden_states) if kept else [output.last_hidden_state]
        for number in range(4):
            x = behind[sum(n not in skipped for n in range(number + 1))]
            expected[number + 1] = x
        for number, state in expected.items():
            assert torch.equal(states.get(number, output.last_hidden_state), state), (skipped, number)


@pytest.mark.parametrize("aligner", ["occupancy", "attention", "transport", "cif", "predictor"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_parameter_gets_a_gradient(
    hf: SimpleNamespace, attached: Callable, aligner: str, checkpointed: bool
) -> None:
    inner = {} if aligner == "predictor" else {"layers": [2]}
    a = attached("tdt", {"stores": str(hf.zarr), "views": "known/*/4", "aligner": aligner, "weight": 0.5, **inner})
    if checkpointed:
        a.model.activation_checkpointing_enable()
    a.model(**a.batch).loss.backward()
    absent = [name for name, p in a.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Biases in front of a batch norm, and of attention's keys, change nothing.
    assert not [name for name in absent if not name.endswith(("depthwise_conv.bias", "k_proj.bias", "bias_u"))], absent


def test_inner_states_get_the_same_gradient_with_checkpointing(hf: SimpleNamespace, attached: Callable) -> None:
    settings = {"stores": str(hf.zarr), "views": "known/alone/4", "layers": [1, 2], "weight": 5.0}
    models = []
    for reentrant in (None, False, True):
        a = attached("rnnt", settings)
        if reentrant is not None:
            a.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        a.model(**a.batch).loss.backward()
        models.append(a.model)
    hf.assert_same_gradients(models[1], models[0])
    hf.assert_same_gradients(models[2], models[0])


def test_autocast_leaves_the_transfer_in_float32(attached: Callable) -> None:
    a = attached()
    exact = a.model(**a.batch).losses
    with torch.autocast("cpu", torch.bfloat16):
        found = a.model(**a.batch)
    found.loss.backward()
    for name, value in exact.items():
        assert found.losses[name].dtype == torch.float32
        torch.testing.assert_close(found.losses[name], value, rtol=0.1, atol=0.02)
    half = attached(model=a.model.__class__.__bases__[0](a.model.config).to(torch.bfloat16).train())
    half.model.to(torch.bfloat16)  # the heads, too
    half.model(**half.batch | {"input_features": half.batch["input_features"].bfloat16()}).loss.backward()


def test_parts_of_a_step_add_up_to_the_whole_batch(hf: SimpleNamespace, collate: Callable, examples: list) -> None:
    """As the Trainer accumulates gradients: RNN-T by the units of the step, TDT by the number of its batches."""
    for kind in ("rnnt", "tdt"):
        whole = hf.student(kind)
        for module in whole.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        parts = copy.deepcopy(whole)
        for model in (whole, parts):
            attach_transfer(model)
        assert parts.accepts_loss_kwargs is (kind == "rnnt")
        units = sum(len(e["labels"]) for e in examples)
        whole(**collate(examples)).loss.backward()
        for half in (examples[:4], examples[4:]):
            more = {"num_items_in_batch": torch.tensor(units)} if kind == "rnnt" else {}
            loss = parts(**collate(half), **more).loss
            (loss if more else loss / 2).backward()
        hf.assert_same_gradients(parts, whole)


def test_padding_that_the_trainer_counts_as_units_is_told(hf: SimpleNamespace) -> None:
    model = hf.model("rnnt")
    attach_transfer(model)
    model(**hf.inputs([[3, 4], [5]]), num_items_in_batch=3)
    with pytest.warns(UserWarning, match=r"counts the padding of labels as units. Pad them with -100"):
        model(**hf.inputs([[3, 4], [5]], padding=11), num_items_in_batch=4)


def test_a_transfer_weighs_as_much_as_its_batch_in_a_step(attached: Callable) -> None:
    a = attached("rnnt")
    units = int((a.batch["labels"] != -100).sum())
    alone = a.model(**a.batch)
    half = a.model(**a.batch, num_items_in_batch=2 * units)
    torch.testing.assert_close(half.loss, alone.loss / 2)
    summed = a.model(**a.batch, reduction="sum")
    torch.testing.assert_close(summed.loss, alone.loss * units)


def test_lambda_follows_its_schedule(hf: SimpleNamespace, attached: Callable) -> None:
    a = attached("rnnt", {"stores": str(hf.zarr), "views": "known/alone/4", "weight": 2.0, "warmup_steps": 4})
    for step in (1, 2, 3, 4, 4):
        output = a.model(**a.batch)
        added = output.loss.detach() - output.losses["transducer"]
        torch.testing.assert_close(added, 2.0 * step / 4 * output.losses["transfer"])
    a.heads.step.fill_(0)
    output = a.model(**a.batch)
    torch.testing.assert_close(output.loss.detach() - output.losses["transducer"], 0.5 * output.losses["transfer"])


def test_distributed_data_parallel_finds_no_unused_parameter(attached: Callable, examples: list, tmp_path: Any) -> None:
    a = attached()
    # A batch for which the store has nothing: every head has a gradient all the same.
    a.heads.readers["text"].on_missing = a.heads.readers["predictor"].on_missing = "skip"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(a.model)
        for number in (0, 1, 2):
            batch = a.collate(examples[2 * number : 2 * number + 2])
            wrapped(**batch).loss.backward()  # raises if the step before left a parameter unused
    finally:
        torch.distributed.destroy_process_group()


def test_a_frozen_encoder_trains_the_rest_and_warns(attached: Callable) -> None:
    a = attached()
    a.model.encoder.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"transfer.text reads states of the encoder, which is frozen"):
        a.model(**a.batch).loss.backward()
    assert all(p.grad is None for p in a.model.encoder.parameters())
    assert all(p.grad is not None for p in a.model.decoder.parameters())
    assert all(p.grad is not None for p in a.heads.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.model(**a.batch)  # once is enough


def test_heads_begin_alike_whatever_was_drawn_before(attached: Callable) -> None:
    first = attached().heads.state_dict()
    torch.manual_seed(5)
    model = attached(seed=0).heads.state_dict()
    assert all(torch.equal(first[name], value) for name, value in model.items())
    assert not torch.equal(
        first["modules_by_name.text.heads.0.weight"], attached(seed=1).heads.modules_by_name["text"].heads[0].weight
    )


def test_wrong_settings_are_named(hf: SimpleNamespace) -> None:
    store = {"stores": str(hf.zarr)}
    with pytest.raises(ConfigError, match=r"transfer.text.aligner.*got 'occupance'"):
        attach_transfer(hf.student(), store | {"text": {"views": "known/*/4", "aligner": "occupance"}}, hf.corpus)
    with pytest.raises(ConfigError, match=r"transfer.layers has 7, but with model.layers = 3"):
        attach_transfer(hf.student(), store | {"views": "known/*/4", "layers": [7]}, hf.corpus)
    with pytest.raises(NoStoreError, match=r"no view matches.*known/alone/4"):
        attach_transfer(hf.student(), store | {"views": "bert/*/4"}, hf.corpus)
    with pytest.raises(ConfigError, match="a transfer without a corpus"):
        attach_transfer(hf.student(), store | {"views": "known/*/4"})
    model = hf.student()
    with pytest.raises(ConfigError):
        attach_transfer(model, store | {"weigth": 2}, hf.corpus)
    assert not hasattr(model, "stillhouse")


def test_training_without_targets_is_an_error_and_evaluation_is_not(
    attached: Callable, collate: Callable, examples: list
) -> None:
    a = attached()
    plain = collate(examples[:2])
    with pytest.raises(ConfigError, match=r"without the targets of the transfer.*remove_unused_columns=False"):
        a.model(**plain)
    a.model.eval()
    assert torch.isfinite(a.model(**plain).loss)

"""Give a transducer of transformers our losses and the heads of transfers, in place.

The model's class becomes a subclass of itself. It computes the loss of `labels` without the logits of the whole
lattice, and adds the transfer losses in training. All else, such as generate and save_pretrained, is inherited.
Guarantees: loss and gradients without a transfer equal those of transformers. What save_pretrained writes, plain
transformers loads, without a trace of the heads.
Try: `pytest tests/train/loop/huggingface`.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....data.errors import ConfigError
from ....data.manifest import read_manifest
from ...config import Config, in_transfer, validated
from ...model.build import build_transfers
from ...model.losses import transducer_costs
from .heads import TransferHeads
from .parts import (
    IGNORED,
    PretrainedJoint,
    fused_activation,
    paddings,
    real_labels,
    refuse_other_models,
    state_times,
    tapped,
)

REDUCTIONS = ("mean_volume", "mean_batch", "mean", "sum")
_CARRIED = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")  # from the encoder's output
_OURS = ("decoder_input_ids", "decoder_cache", "use_decoder_cache", "encoder_outputs", "labels", "return_dict")


def attach_transfer(
    model: Any, transfer: Mapping[str, Any] | None = None, corpus: Path | str | None = None, *,
    reduction: str | None = None, sigma: float = 0.0, fastemit: float = 0.0, seed: int = 0, frame_hz: float = 100.0,
) -> TransferHeads:  # fmt: skip
    """Give a model of AutoModelForRNNT or AutoModelForTDT our loss, and the heads of one or several transfers.

    The model changes in place, before it is given to a Trainer, to accelerate or to DistributedDataParallel. With
    `labels`, its `loss` is then the transducer loss of train.rnnt, plus in training the transfer losses times their
    lambdas. Its `logits` are None, because the loss does without them.

    Arguments:
        model: ParakeetForRNNT, ParakeetForTDT, or another transducer with their parts.
        transfer: the settings of the section [transfer] of a recipe, such as {"stores": "teacher.zarr", "views":
            "minilm/*/last"}, or with several transfers {"stores": …, "text": {"views": …}, …}. None: our loss alone.
        corpus: the manifest with the transcripts that the teachers read. A transfer needs it.
        reduction: "mean_volume" (over all units), "mean" (over units, then over utterances), "mean_batch" (over
            utterances) or "sum". None: what transformers does, "mean" with durations and else "mean_volume".
        sigma: lowers each arc's log-probability, with durations.
        fastemit: lambda of FastEmit.
        seed: of the first weights of the heads.
        frame_hz: rows of features in a second, which the aligner "frames" needs.

    Returns:
        The heads, which are the model's submodule `stillhouse`.

    Raises:
        ConfigError: the model is no transducer of transformers, or has a transfer already, or a setting is wrong.
        NoStoreError: there is no store, or it has no such view.
    """
    if hasattr(model, "stillhouse"):
        raise ConfigError(f"{type(model).__name__} has a transfer already", expected="a model as transformers loads it")
    refuse_other_models(model)
    reduction = reduction or ("mean" if getattr(model.config, "durations", None) else "mean_volume")
    if reduction not in REDUCTIONS:
        raise ConfigError(f"there is no reduction {reduction!r}", expected=", ".join(REDUCTIONS))
    if transfer and corpus is None:
        raise ConfigError("a transfer without a corpus", expected="the manifest that the stores were extracted from")
    # Of the student only the depth and the width of the prediction network are read.
    student = {"layers": len(model.encoder.layers)}
    given = {
        "data": {"corpus": corpus or "-", "features": "-", "units": "-"},
        "loss": {"sigma": sigma, "fastemit": fastemit},
        # Batches are pinned by the DataLoader, whose workers have no CUDA.
        "run": {"seed": seed, "device": "cpu"},
    }
    settings = given | {"model": student, "transfer": transfer or {}}
    config = validated(Config, [("attach_transfer", settings)])
    config.model.predictor_dim = int(model.config.decoder_hidden_size)
    width = int(model.config.encoder_config.hidden_size)
    transfers, readers = build_transfers(config, width, state_times(model, frame_hz))
    texts = {u.id: u.text for u in read_manifest(config.data.corpus).utterances} if transfers else {}
    heads = TransferHeads(config, transfers, readers, texts, paddings(model.config)).to(model.device)
    heads.train(model.training)
    kept_apart = {f"stillhouse.{name}" for name in heads.state_dict()}
    model.stillhouse = heads
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | kept_apart
    model.__class__ = _student_class(model.__class__)
    heads.reduction, heads.fused = reduction, fused_activation(model)
    # The Trainer then gives the units of all batches of a step, or else divides each loss by the number of batches.
    model.accepts_loss_kwargs = reduction == "mean_volume"
    return heads


@cache
def _student_class(base: Any) -> Any:
    """Return the subclass of a transformers model whose forward pass computes our losses."""
    signature = inspect.signature(base.forward)
    output = dataclasses.make_dataclass(
        "TransferOutput",
        [("occupancy", Tensor | None, None), ("losses", dict | None, None)],
        bases=(signature.return_annotation,),
        namespace={"__module__": __name__},
    )
    sole = inspect.Parameter("transfer", inspect.Parameter.KEYWORD_ONLY, default=None)
    *usual, rest = signature.parameters.values()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        targets = kwargs.pop("transfer", None)
        bound = signature.bind(self, *args, **kwargs).arguments
        if bound.get("labels") is None:
            return base.forward(self, *args, **kwargs)
        given = {name: value for name, value in bound.items() if name not in (usual[0].name, rest.name)}
        result = output(**_losses(self, given | bound.get(rest.name, {}), targets))
        returned = kwargs.get("return_dict")
        return result if (self.config.return_dict if returned is None else returned) else result.to_tuple()

    forward.__signature__ = signature.replace(parameters=[*usual, sole, rest])  # type: ignore[attr-defined]
    names = {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), names)


def _losses(model: Any, given: dict[str, Any], targets: Any) -> dict[str, Any]:
    """Return the fields of the output of a forward pass with labels."""
    heads: TransferHeads = model.stillhouse
    reduction, sigma = given.pop("reduction", heads.reduction), given.pop("sigma", heads.config.loss.sigma)
    units_of_step, want_occupancy = given.pop("num_items_in_batch", None), given.pop("return_occupancy", False)
    if reduction not in REDUCTIONS:
        raise ConfigError(f"there is no reduction {reduction!r}", expected=", ".join(REDUCTIONS))
    labels, counts = real_labels(given["labels"], heads.paddings)
    transferring = model.training and bool(heads.readers)
    settings = heads.config.transfer.transfers if transferring else {}
    wanted = {layer for t in settings.values() for layer in t.layers}
    encoded = given.get("encoder_outputs")
    with tapped(model.encoder.layers, wanted) as states:
        if encoded is None:
            encoded = model.get_audio_features(**{k: v for k, v in given.items() if k not in _OURS}, return_dict=True)
        elif wanted:
            raise ConfigError("a transfer reads inner encoder layers", expected="input_features, not encoder_outputs")
    encoder, mask = encoded.pooler_output, getattr(encoded, "attention_mask", None)
    device = encoder.device
    lengths = labels.new_full((len(encoder),), encoder.shape[1]) if mask is None else mask.sum(-1).cpu()
    blank = int(model.config.blank_token_id)
    read = torch.cat([labels.new_full((len(labels), 1), blank), labels], dim=1)
    # oneDNN has no bfloat16 LSTM on some processors.
    with torch.autocast("cpu", enabled=False):
        predictor = model.decoder(read.to(device))
    costs, occupancy = transducer_costs(
        PretrainedJoint(model, heads.fused), encoder, predictor, labels.int(), lengths.int(), counts,
        eps=heads.config.loss.eps, fastemit=heads.config.loss.fastemit, sigma=sigma, blank=blank,
        want_occupancy=want_occupancy or any(heads.transfers[name].needs_occupancy for name in settings),
    )  # fmt: skip
    if units_of_step is not None and int((given["labels"] != IGNORED).sum()) > int(counts.sum()):
        _warn_once(
            heads, "the Trainer counts the padding of labels as units. Pad them with -100, as TransferCollator does."
        )
    loss, share = _reduced(costs, counts, reduction, units_of_step)
    parts = {"transducer": loss.detach()}
    if transferring:
        added, more = heads(encoded.last_hidden_state, states, lengths.to(device), predictor, occupancy, targets)
        _warn_of_idle(heads, encoded.last_hidden_state, predictor)
        loss, parts = loss + share * added, parts | more
        heads.means.add(parts)
    fields = {name: getattr(encoded, name, None) for name in _CARRIED}
    return fields | {
        "loss": loss,
        "occupancy": occupancy if want_occupancy else None,
        "losses": parts if model.training else None,
    }


def _reduced(costs: Tensor, counts: Tensor, reduction: str, units_of_step: Any) -> tuple[Tensor, Tensor | float]:
    """Return the loss of costs [B], and what a mean over the units of this batch is multiplied by to be added to it."""
    units, own = int(counts.sum()), counts.to(costs.device)
    if reduction == "sum":
        return costs.sum(), float(units)
    if reduction == "mean_batch":
        return costs.mean(), units / len(costs)
    if reduction == "mean":
        return (costs / own.clamp_min(1)).mean(), 1.0
    if units_of_step is None:
        return costs.sum() / max(1, units), 1.0
    # One step of the optimiser sums the losses of several batches, each divided by the units of all of them.
    total = torch.as_tensor(units_of_step, device=costs.device).reshape(-1)[0].clamp_min(1)
    return costs.sum() / total, units / total


def _warn_of_idle(heads: TransferHeads, encoder: Tensor, predictor: Tensor) -> None:
    """Warn once of each transfer that reads states without a gradient, because it trains its heads alone."""
    for name, transfer in heads.transfers.items():
        read, part = (predictor, "decoder") if transfer.needs_predictor else (encoder, "encoder")
        if not read.requires_grad:
            _warn_once(
                heads,
                f"{in_transfer('transfer', name)} reads states of the {part}, which is frozen, so it trains its heads "
                f"alone. Train some of the {part}'s layers, or leave this transfer out.",
            )


def _warn_once(heads: TransferHeads, text: str) -> None:
    if text not in heads.warned:
        heads.warned.add(text)
        warnings.warn(text, stacklevel=3)

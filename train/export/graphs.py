"""The graphs of a trained transducer that leave the house: encoder, prediction network ("decoder") and joiner.

Inputs, outputs and metadata are those that sherpa-onnx reads (its csrc/offline-transducer-model.cc and
online-conformer-transducer-model.cc), so that one set of graphs serves it, plain onnxruntime and torch.export.

Invariant: the graphs hold what inference needs and no more: no transfer head, no CTC or simple head, no dropout; the
normalisation of the features and the joint's projections are in them, so that plain fbank goes in and logits come out.
Exercised by `stillhouse export`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..model.transducer import BLANK, LstmPredictor, StatelessPredictor, Transducer

Axes = Mapping[int, str]  # axis -> name, of the axes whose size is free


@dataclass(frozen=True)
class Graph:
    """A module with named inputs and outputs. `inputs(n)` are random ones for a batch of n."""

    name: str
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)


class EncoderGraph(nn.Module):
    """Plain fbank [N, T, bins], lengths [N] -> projected states [N, T' * repeat, joint_dim] and their lengths."""

    def __init__(self, model: Transducer, repeat: int) -> None:
        super().__init__()
        self.encoder, self.projection, self.repeat = model.encoder, model.joint.encoder, repeat

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        states, lengths, _ = self.encoder(self.encoder.normalise(x, x_lens), x_lens)
        return repeated(self.projection(states), self.repeat), lengths * self.repeat


class DecoderGraph(nn.Module):
    """The last units int64 [N, context] -> projected state [N, joint_dim]; -1, where there is none yet, is blank."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.predictor, self.projection = model.predictor, model.joint.predictor

    def forward(self, y: Tensor) -> Tensor:
        return self.projection(self.predictor.step(y.clamp(min=BLANK)))


class LstmDecoderGraph(nn.Module):
    """The last unit int64 [N] (blank at the beginning) and the state h, c [N, dim] (zeros at the beginning) ->
    projected state [N, joint_dim] and the next h, c."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.predictor, self.projection = model.predictor, model.joint.predictor

    def forward(self, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        everywhere = torch.ones_like(y, dtype=torch.bool)
        state = self.predictor.advance((h, h, c), y, everywhere)
        return self.projection(self.predictor.step(state)), state[1], state[2]


class JoinerGraph(nn.Module):
    """Projected encoder and prediction states [N, joint_dim] -> logits [N, V]; where the model chooses durations too
    (TDT), their logits [N, D] as well."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.joint = copy.copy(model.joint)
        self.joint._modules = {**model.joint._modules, "encoder": None, "predictor": None}  # they are in the others

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        both = self.joint.with_durations if self.joint.durations is not None else self.joint
        return both(encoder_out, decoder_out)


def repeated(states: Tensor, times: int) -> Tensor:
    """Each frame `times` times over: a search that takes one unit a frame then takes up to `times` of a real one.

    After a blank the prediction network has not moved, so the copies that are left say blank too.
    """
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def offline_graph(model: Transducer, *, symbols: int) -> Graph:
    """The encoder of whole utterances; `symbols`: units that one state may give at most."""
    bins = len(model.encoder.feature_mean)

    def inputs(n: int) -> dict[str, Tensor]:
        lengths = torch.randint(20, 90, (n,))
        return {"x": 8 * torch.rand(n, int(lengths.max()), bins) - 12, "x_lens": lengths}

    return Graph(
        "encoder",
        EncoderGraph(model, symbols),
        inputs,
        {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}},
        ("encoder_out", "encoder_out_lens"),
        about(model, symbols),
    )


def search_graphs(model: Transducer) -> list[Graph]:
    """decoder and joiner."""
    if isinstance(model.predictor, StatelessPredictor):
        context = model.predictor.context
        decoder = Graph(
            "decoder",
            DecoderGraph(model),
            lambda n: {"y": torch.randint(-1, model.size, (n, context))},
            {"y": {0: "N"}},
            ("decoder_out",),
            {"context_size": str(context), "vocab_size": str(model.size)},
        )
    else:
        dim = model.predictor.dim
        decoder = Graph(
            "decoder",
            LstmDecoderGraph(model),
            lambda n: {"y": torch.randint(0, model.size, (n,)), "h": torch.randn(n, dim), "c": torch.randn(n, dim)},
            {name: {0: "N"} for name in ("y", "h", "c")},
            ("decoder_out", "next_h", "next_c"),
            {"state_dim": str(dim), "vocab_size": str(model.size)},
        )
    joint_dim, durations = model.joint.output.in_features, model.durations
    joiner = Graph(
        "joiner",
        JoinerGraph(model),
        lambda n: {"encoder_out": torch.randn(n, joint_dim), "decoder_out": torch.randn(n, joint_dim)},
        {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}},
        ("logit", "duration_logit") if durations else ("logit",),
        {"joiner_dim": str(joint_dim)} | ({"durations": ",".join(map(str, durations))} if durations else {}),
    )
    return [decoder, joiner]


def unfit_for_sherpa(model: Transducer) -> str | None:
    """Why sherpa-onnx cannot run this model, in words; None where it can."""
    if isinstance(model.predictor, LstmPredictor):
        return "its transducers have a stateless prediction network (model.predictor), this one an LSTM"
    if model.durations:
        return "its greedy search for this kind of model knows no durations, and this one is a TDT"
    return None


def about(model: Transducer, symbols: int) -> dict[str, str]:
    """What a reader of the encoder alone would ask. sherpa-onnx needs model_type only, so that a model that it cannot
    run has none."""
    return ({} if unfit_for_sherpa(model) else {"model_type": "conformer"}) | {
        "version": "1",
        "model_author": "stillhouse",
        "comment": "log mel energies of samples in [-1, 1] go in; normalisation and projection are inside",
        "feature_dim": str(len(model.encoder.feature_mean)),
        "subsampling_factor": str(model.encoder.subsampling),
        "symbols_per_frame": str(symbols),
    }

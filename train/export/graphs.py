"""The graphs of a trained transducer that are exported: encoder, prediction network ("decoder") and joiner.

Inputs, outputs and metadata are those that sherpa-onnx reads (its csrc/offline-transducer-model.cc and
online-conformer-transducer-model.cc). The same graphs serve sherpa-onnx, plain onnxruntime and torch.export.

Guarantees: the graphs hold what inference needs and nothing else: no transfer head, no CTC or simple head, no dropout.
They include the normalisation of the features and the joint's projections: fbank goes in, logits come out.
Try: `stillhouse export RUN --format onnx --out FOLDER`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..model.transducer import BLANK, LstmPredictor, StatelessPredictor, Transducer

Axes = Mapping[int, str]  # {axis of free size: its name}


@dataclass(frozen=True)
class Graph:
    """A module with named inputs and outputs. `inputs(n)` returns random inputs for a batch of n.

    of_largest: whether differences of outputs count as shares of the largest one, as for states of any size.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    of_largest: bool = False


class EncoderGraph(nn.Module):
    """Plain fbank [N, T, bins], lengths [N] -> projected states [N, T' * repeat, joint_dim] and their lengths."""

    def __init__(self, model: Transducer, repeat: int) -> None:
        super().__init__()
        self.encoder, self.projection, self.repeat = model.encoder, model.joint.encoder, repeat

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        states, lengths, _ = self.encoder(self.encoder.normalise(x, x_lens), x_lens)
        return repeat_frames(self.projection(states), self.repeat), lengths * self.repeat


class DecoderGraph(nn.Module):
    """The last units int64 [N, context] -> projected state [N, joint_dim]. -1, for no unit yet, counts as blank."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.predictor, self.projection = model.predictor, model.joint.predictor

    def forward(self, y: Tensor) -> Tensor:
        return self.projection(self.predictor.step(y.clamp(min=BLANK)))


class LstmDecoderGraph(DecoderGraph):
    """The last unit int64 [N] and the state h, c [N, dim] -> projected state [N, joint_dim] and the next h, c.

    At the start the unit is blank and the state zero.
    """

    def forward(self, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        everywhere = torch.ones_like(y, dtype=torch.bool)
        state = self.predictor.advance((h, h, c), y, everywhere)
        return self.projection(self.predictor.step(state)), state[1], state[2]


class JoinerGraph(nn.Module):
    """Projected encoder and prediction states [N, joint_dim] -> logits [N, V], and for TDT also [N, D] of durations."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.joint = copy.deepcopy(model.joint)
        del self.joint.encoder, self.joint.predictor  # The other graphs have these two.
        if model.one_unit:
            self.joint.durations = None

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        both = self.joint.with_durations if self.joint.durations is not None else self.joint
        return both(encoder_out, decoder_out)


class SpreadJoinerGraph(JoinerGraph):
    """The joiner for a beam search of one unit in each of `repeat` copies of a state.

    Each copy gives blank with the root of degree `repeat` of P(blank), so that blanks in all copies have P(blank)
    together. The units share the rest as before. A beam search over the copies then has the probabilities of the model:
    exactly for a state without a unit, and closely for one or two units.
    """

    def __init__(self, model: Transducer, repeat: int) -> None:
        super().__init__(model)
        self.repeat = repeat

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        logp = self.joint(encoder_out, decoder_out).log_softmax(-1)
        blank = logp[:, :1].clamp(max=-1e-6)  # Else the logarithm of 1 - P(blank) is infinite.
        units = logp[:, 1:] - torch.log(-torch.expm1(blank))
        blank = blank / self.repeat
        return torch.cat([blank, units + torch.log(-torch.expm1(blank))], dim=-1)


def repeat_frames(states: Tensor, times: int) -> Tensor:
    """Repeat each frame, so that a search for one unit in a frame can find up to `times` units in a real one.

    After a blank the prediction network is in the same state, so the remaining copies give blank, too.
    """
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def offline_graph(model: Transducer, *, symbols: int) -> Graph:
    """Return the encoder of whole utterances. `symbols`: largest number of units in one state."""
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
        encoder_metadata(model, symbols),
    )


def search_graphs(model: Transducer, *, symbols: int = 1) -> list[Graph]:
    """Return the graphs of decoder and joiner, and with several `symbols` a joiner for a beam search over copies."""
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
    joint_dim, durations = model.joint.output.in_features, () if model.one_unit else model.durations
    joiner = Graph(
        "joiner",
        JoinerGraph(model),
        lambda n: {"encoder_out": torch.randn(n, joint_dim), "decoder_out": torch.randn(n, joint_dim)},
        {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}},
        ("logit", "duration_logit") if durations else ("logit",),
        {"joiner_dim": str(joint_dim)} | ({"durations": ",".join(map(str, durations))} if durations else {}),
    )
    if symbols == 1:
        return [decoder, joiner]
    return [decoder, joiner, replace(joiner, name="joiner.beam", module=SpreadJoinerGraph(model, symbols))]


def unfit_for_sherpa(model: Transducer) -> str | None:
    """Return why sherpa-onnx cannot run this model, or None if it can."""
    if isinstance(model.predictor, LstmPredictor):
        return "it needs a stateless prediction network (model.predictor), and this model has an LSTM"
    if model.durations and not model.one_unit:
        return "its greedy search for this kind of model has no durations, and this model is a TDT"
    return None


def encoder_metadata(model: Transducer, symbols: int) -> dict[str, str]:
    """Return the metadata of the encoder. Only a model that sherpa-onnx can run has the model_type that it needs."""
    return ({} if unfit_for_sherpa(model) else {"model_type": "conformer"}) | {
        "version": "1",
        "model_author": "stillhouse",
        "comment": "log mel energies of samples in [-1, 1] go in; normalisation and projection are inside",
        "feature_dim": str(len(model.encoder.feature_mean)),
        "subsampling_factor": str(model.encoder.subsampling),
        "symbols_per_frame": str(symbols),
    }

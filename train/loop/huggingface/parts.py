"""The parts of a transformers transducer that our losses need: joint network, padding of labels, and encoder layers.

Guarantees: a fused loss is chosen only for a joint network that computes what the fused loss computes.
Try: `pytest tests/train/loop/huggingface/test_loss.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....data.errors import ConfigError
from ....distill.frames import StudentTimes

IGNORED = -100  # what collators of transformers put behind the labels of a short utterance
_FUSED = {nn.ReLU: "relu", nn.Tanh: "tanh"}


class PretrainedJoint:
    """A transformers transducer as a `JointModel` of `transducer_costs`. Its projections are the model's own.

    `fused` is what `fused_activation` found before anything could wrap the joint network's layers.
    """

    combine = "add"

    def __init__(self, model: Any, fused: str | None) -> None:
        self._network = model.joint
        self.size: int = model.config.vocab_size
        self.durations = tuple(int(d) for d in getattr(model.config, "durations", None) or ())
        self.output: Any = model.joint.head
        self.activation = fused if type(self.output) is nn.Linear else None

    @property
    def joint(self) -> PretrainedJoint:
        return self

    def __call__(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Return logits [..., V + D] of projected states, in float32."""
        dtype = next(self._network.parameters()).dtype
        states = {"encoder_hidden_states": encoder.to(dtype), "decoder_hidden_states": predictor.to(dtype)}
        return self._network(**states).float()

    def with_durations(self, encoder: Tensor, predictor: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the units [..., V] and of the durations [..., D]."""
        logits = self(encoder, predictor)
        return logits[..., : self.size], logits[..., self.size :]


def fused_activation(model: Any) -> str | None:
    """Return the activation if the joint network is head(activation(encoder + predictor)), and None for any other."""
    activation, head = getattr(model.joint, "activation", None), model.joint.head
    if activation is None or type(activation) not in _FUSED or type(head) is not nn.Linear:
        return None
    joint = PretrainedJoint(model, None)
    with torch.no_grad():
        states = torch.linspace(-1, 1, 2 * head.in_features, device=head.weight.device).view(2, 1, 1, 1, -1)
        expected = head(activation(states.sum(0).to(head.weight.dtype))).float()
        same = torch.allclose(joint(*states), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    return _FUSED[type(activation)] if same else None


def state_times(model: Any, frame_hz: float) -> StudentTimes:
    """Return when the encoder states are, if features have `frame_hz` rows in a second, centred on multiples of it."""
    rows, shift = 1, 0
    for layer in getattr(model.encoder, "subsampling", nn.Identity()).modules():
        if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1:
            before = getattr(layer, "left_pad_init", layer.padding[0])  # of a causal convolution, or of a centred one
            shift += rows * ((layer.kernel_size[0] - 1) // 2 - int(before))
            rows *= layer.stride[0]
    return StudentTimes(rows, frame_hz, -0.5 / frame_hz, shift)


def refuse_other_models(model: Any) -> None:
    """Raise ConfigError unless the model has the parts of a transducer of transformers."""
    needed = ("config", "encoder", "decoder", "joint", "get_audio_features")
    absent = [name for name in needed if not hasattr(model, name)]
    absent += [f"config.{n}" for n in ("blank_token_id", "vocab_size") if not hasattr(getattr(model, "config", 0), n)]
    absent += [] if hasattr(getattr(model, "joint", None), "head") else ["joint.head"]
    absent += (
        []
        if isinstance(getattr(getattr(model, "encoder", None), "layers", None), nn.ModuleList)
        else ["encoder.layers"]
    )
    if absent:
        raise ConfigError(
            f"{type(model).__name__} has no {', '.join(absent)}",
            expected="a model of transformers' AutoModelForRNNT or AutoModelForTDT",
            remedy="attach the transfer before DistributedDataParallel, accelerate or peft wrap the model",
        )


def paddings(config: Any) -> tuple[int, ...]:
    """Return the ids that stand behind the labels of a short utterance in a batch of this model.

    They are -100 and those that the model's own loss knows: the blank, and for durations the id of padding.
    """
    pad = getattr(config, "pad_token_id", None)
    also = [pad] if pad is not None and getattr(config, "durations", None) else []
    return (IGNORED, int(config.blank_token_id), *also)


def real_labels(labels: Tensor, padding: Collection[int]) -> tuple[Tensor, Tensor]:
    """Return labels int64 [B, U] without the columns that are padding in all rows, and their numbers int32 [B].

    Both are on the CPU. Padding becomes 0. Raises ValueError for padding between labels.
    """
    labels = labels.detach().cpu().long()
    if labels.dim() != 2:
        raise ValueError(f"labels have shape {tuple(labels.shape)}. Expected [batch, units].")
    real = ~torch.isin(labels, torch.tensor(sorted(padding)))
    counts = real.sum(1)
    inside = torch.arange(labels.shape[1]) < counts[:, None]
    if not torch.equal(real, inside):
        row, column = (real != inside).nonzero()[0].tolist()
        raise ValueError(
            f"labels of row {row} have padding, {int(labels[row, column])}, between units, at position {column}. "
            f"Expected padding ({', '.join(map(str, padding))}) behind the last unit."
        )
    longest = int(counts.max()) if len(counts) else 0
    return labels.where(real, 0)[:, :longest], counts.int()


@contextmanager
def tapped(layers: nn.ModuleList, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Catch the states [B, T, H] behind the encoder layers `wanted`, from 1, of the forward passes in the block.

    A layer that layer drop skips changes no state, so the states are caught where the next layer that runs reads them.
    States behind the last layer that runs are not caught: they are the encoder's output.
    """
    states: dict[int, Tensor] = {}

    def catch(before: int, read: Tensor) -> None:
        for layer in wanted:
            if layer <= before:
                states.setdefault(layer, read)

    hooks = []
    if wanted:
        for number, layer in enumerate(layers):

            def hook(_: Any, given: tuple, named: dict, number: int = number) -> None:
                catch(number, given[0] if given else named["hidden_states"])

            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield states
    finally:
        for handle in hooks:
            handle.remove()

"""A speech encoder up to one layer, as a module that torch can trace: what its feature extractor gives goes in.

Guarantees: on noise, its states are those of `SpeechEncoder.states`.
Try: `stillhouse export RUN --format onnx --frontend --out FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...data.errors import ExportError
from .encoder import SpeechEncoder

MASKED = ("wav2vec2-bert", "parakeet_encoder")  # Their extractors pad, so that a mask is part of the input.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class FrontGraph:
    """A module of one utterance in a pass.

    inputs    returns the inputs of random audio of several lengths, by number
    axes      {input: {axis of free size: its name}}
    """

    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    axes: Mapping[str, Mapping[int, str]]


class _UpTo(nn.Module):
    """The encoder's input, and its mask if it needs one -> hidden states [1, T, D] of a layer."""

    def __init__(self, encoder: nn.Module, layer: int, name: str) -> None:
        super().__init__()
        self.encoder, self.layer, self.name = encoder, layer, name

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        named = {self.name: x} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        states: Tensor = self.encoder(**named, output_hidden_states=True).hidden_states[self.layer]
        return states


class _Whisper(nn.Module):
    """Whisper's log mel frames [1, bins, 2 T] -> hidden states [1, T, D] of a layer, for any T that has positions."""

    def __init__(self, encoder: nn.Module, layer: int, positions: Tensor) -> None:
        super().__init__()
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2
        self.layers = nn.ModuleList(list(encoder.layers)[:layer])  # type: ignore[arg-type]
        self.norm = encoder.layer_norm if layer == len(encoder.layers) else nn.Identity()  # type: ignore[arg-type]
        self.register_buffer("positions", positions)

    def forward(self, mel: Tensor) -> Tensor:
        x = nn.functional.gelu(self.conv1(mel))  # type: ignore[operator]
        x = nn.functional.gelu(self.conv2(x)).transpose(1, 2)  # type: ignore[operator]
        x = x + self.positions[: x.shape[1]]  # type: ignore[index]
        for layer in self.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        states: Tensor = self.norm(x)  # type: ignore[operator]
        return states


def front_graph(encoder: SpeechEncoder, layer: int) -> FrontGraph:
    """Return the graph of a layer of an encoder on the CPU.

    Raises ExportError if its states are not those of `encoder`.
    """
    sample = encoder.inputs(_noise(encoder, 1.0))
    names = [name for name in sample if name != "attention_mask" or encoder.kind in MASKED]

    def inputs(number: int) -> dict[str, Tensor]:
        found = encoder.inputs(_noise(encoder, 0.7 + 0.37 * number))
        return {name: found[name] for name in names}

    if encoder.kind == "whisper":
        module: nn.Module = _Whisper(encoder.encoder, layer, encoder.positions)
        axes = {names[0]: {2: "T"}}
    else:
        module = _UpTo(encoder.encoder, layer, names[0])
        axes = {name: {1: "T"} for name in names}
    samples = _noise(encoder, 1.23)
    known = encoder.tensors(samples, [layer])[layer]
    given = encoder.inputs(samples)
    with torch.no_grad():
        found = module.eval()(*(given[name] for name in names))[0, : len(known)]
    gap = float((found - known).abs().max() / known.abs().max())
    if not gap <= TOLERANCE:
        what = f"as a graph its states differ by {gap:.1e} of the largest"
        raise ExportError(what, where=encoder.source, expected=f"{TOLERANCE:.0e}", remedy="export without --frontend")
    return FrontGraph(module, inputs, axes)


def _noise(encoder: SpeechEncoder, seconds: float) -> np.ndarray:
    count = int(min(seconds, encoder.longest_s) * encoder.sample_rate_hz)
    return 0.1 * torch.randn(count).numpy()

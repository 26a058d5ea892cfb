"""The streaming encoder as a graph: a chunk of fbank and two caches go in, states and the next caches come out.

sherpa-onnx's online conformer transducer (its csrc/online-conformer-transducer-model.cc) keeps two tensors that start
as zeros: [num_encoder_layers, left_context, N, encoder_dim] and [num_encoder_layers, cnn_module_kernel - 1, N,
encoder_dim]. It passes them back unchanged, with the number of earlier frames of 10 ms. `Encoder.stream_state` also
starts as zeros, so it is stored in these two tensors, flattened. The metadata has the sizes.

Guarantees: chunk by chunk the graph gives the same states as `Encoder.stream`.
Try: `stillhouse export RUN --format onnx --streaming --out FOLDER`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.transducer import Transducer
from .graphs import Graph, encoder_metadata, repeat_frames

ATTENTION = ("keys", "values")  # These parts of the state are in the first tensor, the others in the second.


class StreamGraph(nn.Module):
    """x [N, T, bins], caches, processed_lens int64 [N] -> projected states [N, T' * repeat, joint_dim], new caches.

    T is chunk_frames in every call. processed_lens is the number of frames in earlier chunks.
    """

    def __init__(
        self, model: Transducer, repeat: int, chunk_frames: int | None = None, left_chunks: int | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.projection, self.repeat = model.encoder, model.joint.encoder, repeat
        self.chunk_frames = model.encoder.chunk_frames if chunk_frames is None else chunk_frames
        state = model.encoder.stream_state(1, chunk_frames=self.chunk_frames, left_chunks=left_chunks)
        self.shapes = {name: tuple(value.shape[1:]) for name, value in state.items() if name != "processed"}
        self.layers, self.dim = max(1, len(model.encoder.blocks)), model.encoder.dim
        self.names = [ATTENTION, tuple(name for name in self.shapes if name not in ATTENTION)]
        # Each cache has so many rows of `dim` numbers in each layer, at least one, because no tensor may be empty.
        self.rows = [
            max(1, math.ceil(sum(math.prod(self.shapes[n]) for n in names) / (self.layers * self.dim)))
            for names in self.names
        ]

    def caches(self, n: int) -> list[Tensor]:
        """Return the caches of n streams at their start."""
        return [torch.zeros(self.layers, rows, n, self.dim) for rows in self.rows]

    def forward(
        self, x: Tensor, cached_attn: Tensor, cached_conv: Tensor, processed_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = {"processed": processed_lens // self.encoder.subsampling}
        for names, cache in zip(self.names, (cached_attn, cached_conv)):
            flat = cache.permute(2, 0, 1, 3).reshape(x.shape[0], -1)
            sizes = [math.prod(self.shapes[name]) for name in names]
            parts = flat[:, : sum(sizes)].split(sizes, dim=1)
            state |= {name: part.reshape(x.shape[0], *self.shapes[name]) for name, part in zip(names, parts)}
        states, new = self.encoder.stream(x, state)
        caches = []
        for names, rows in zip(self.names, self.rows):
            flat = torch.cat([new[name].reshape(x.shape[0], -1) for name in names], dim=1)
            flat = F.pad(flat, (0, self.layers * rows * self.dim - flat.shape[1]))
            caches.append(flat.reshape(x.shape[0], self.layers, rows, self.dim).permute(1, 2, 0, 3))
        return repeat_frames(self.projection(states), self.repeat), caches[0], caches[1]


def stream_graph(
    model: Transducer, *, symbols: int, chunk_frames: int | None = None, left_chunks: int | None = None
) -> Graph:
    """Return the encoder that is fed chunk by chunk. Raises ConfigError if the model cannot stream."""
    module = StreamGraph(model, symbols, chunk_frames, left_chunks)
    chunk, bins = module.chunk_frames, len(model.encoder.feature_mean)

    def inputs(n: int) -> dict[str, Tensor]:
        attention, convolution = module.caches(n)
        return {
            "x": 8 * torch.rand(n, chunk, bins) - 12,
            "cached_attn": torch.randn_like(attention),
            "cached_conv": torch.randn_like(convolution),
            "processed_lens": chunk * torch.randint(0, 9, (n,)),
        }

    return Graph(
        "encoder",
        module,
        inputs,
        {"x": {0: "N"}, "cached_attn": {2: "N"}, "cached_conv": {2: "N"}, "processed_lens": {0: "N"}},
        ("encoder_out", "new_cached_attn", "new_cached_conv"),
        {
            **encoder_metadata(model, symbols),
            "T": str(chunk),
            "decode_chunk_len": str(chunk),
            "pad_length": "0",
            "num_encoder_layers": str(module.layers),
            "left_context": str(module.rows[0]),
            "cnn_module_kernel": str(module.rows[1] + 1),
            "encoder_dim": str(module.dim),
        },
    )

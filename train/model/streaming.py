"""An encoder that takes frames as they arrive.

Guarantees: the states are those of the whole utterance (to float rounding), however its frames arrive. The states of a
chunk come out as soon as its last frame has come.
Try: `pytest tests/train/model/test_streaming.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .transducer import Encoder

FRAME_MS = 10.0
WINDOW_MS = 25.0


def latency_ms(chunk_frames: int) -> float:
    """Return how much audio is needed, from a chunk's first sample on, before its states can be computed.

    The last frame's window of 25 ms reaches 7.5 ms beyond the chunk.
    """
    return chunk_frames * FRAME_MS + (WINDOW_MS - FRAME_MS) / 2


class EncoderStream:
    """An encoder in eval mode that takes one utterance after the other, in parts of any size.

    `chunk_frames` and `left_chunks` replace the model's own. The constructor raises what `Encoder.stream_state` raises.
    """

    def __init__(self, encoder: Encoder, *, chunk_frames: int | None = None, left_chunks: int | None = None) -> None:
        self.encoder = encoder
        self.chunk_frames = encoder.chunk_frames if chunk_frames is None else chunk_frames
        self._first = encoder.stream_state(1, chunk_frames=self.chunk_frames, left_chunks=left_chunks)
        self._begin()

    def _begin(self) -> None:
        self._state = self._first
        self._waiting = self.encoder.feature_mean.new_zeros(0, len(self.encoder.feature_mean))

    @torch.no_grad()
    def push(self, features: Tensor) -> Tensor:
        """Take plain fbank [n, bins], and return the states [m, dim] of the chunks that are now full."""
        self._waiting = torch.cat([self._waiting, features.to(self._waiting)])
        full = len(self._waiting) // self.chunk_frames * self.chunk_frames
        chunks, self._waiting = self._waiting[:full].split(self.chunk_frames), self._waiting[full:]
        return self._joined([self._step(chunk, self.chunk_frames) for chunk in chunks if len(chunk)])

    @torch.no_grad()
    def finish(self) -> Tensor:
        """End the utterance, and return the states [m, dim] of the frames that are left. A new utterance may follow."""
        count = len(self._waiting)
        chunk = F.pad(self._waiting, (0, 0, 0, self.chunk_frames - count))
        states = [self._step(chunk, count)] if count else []
        self._begin()
        return self._joined(states)

    def _step(self, chunk: Tensor, count: int) -> Tensor:
        lengths = torch.tensor([count], device=chunk.device)
        states, self._state = self.encoder.stream(chunk[None], self._state, lengths)
        return states[0, : -(-count // self.encoder.subsampling)]

    def _joined(self, states: list[Tensor]) -> Tensor:
        return torch.cat([self._waiting.new_zeros(0, self.encoder.dim), *states])

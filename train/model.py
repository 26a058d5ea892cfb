"""The transducer: encoder, prediction network, joint; plain fbank in, unit log-probabilities out.

Invariant: the model holds everything that inference needs (feature normalisation included) and nothing of the
transfer. Blank is unit 0. Exercised by `stillhouse train` and `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ConformerBlock, Dropout, Subsampling, length_mask, rotary

BLANK = 0


class Encoder(nn.Module):
    """fbank [B, T, bins] and lengths [B] -> states [B, T', dim] and lengths, T' = ceil(T / subsampling)."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        *,
        bins: int = 80,
        dim: int = 176,
        layers: int = 6,
        heads: int = 4,
        inner: int = 704,
        kernel: int = 15,
        subsampling: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim, self.subsampling, self.head_dim = dim, subsampling, dim // heads
        self.register_buffer("feature_mean", torch.zeros(bins))
        self.register_buffer("feature_std", torch.ones(bins))
        self.front = Subsampling(bins, dim, subsampling, dropout)
        self.blocks = nn.ModuleList(ConformerBlock(dim, heads, inner, kernel, dropout) for _ in range(layers))

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Lengths of the states of utterances of `lengths` frames."""
        return (lengths + self.subsampling - 1) // self.subsampling

    def normalise(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Mean and variance normalisation with the training set's statistics; padding becomes 0."""
        mask = length_mask(lengths, features.shape[1])[:, :, None]
        return torch.where(mask, (features - self.feature_mean) / self.feature_std, 0.0)

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[int] = ()) -> tuple[Tensor, Tensor, dict]:
        """`features` already normalised. Returns states, lengths and {layer: states [B, T', dim]} of the layers
        in `taps` (1 is the first block's output)."""
        x, lengths = self.front(features, lengths)
        inside = length_mask(lengths, x.shape[1])
        mask = inside[:, :, None].to(x.dtype)
        bias = torch.zeros(inside.shape, device=x.device).masked_fill_(~inside, float("-inf"))[:, None, None, :]
        positions = rotary(x.shape[1], self.head_dim, x.device)
        tapped = {}
        for number, block in enumerate(self.blocks, 1):
            x = block(x, mask, bias, positions)
            if number in taps:
                tapped[number] = x * mask
        return x * mask, lengths, tapped


class StatelessPredictor(nn.Module):
    """The last `context` units, embedded and mixed by a depthwise convolution (Ghodsi et al. 2020, icassp).

    State for decoding: int64 [B, context], the last units, blank where there is none yet.
    """

    def __init__(self, size: int, dim: int, context: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.context = dim, context
        self.embedding = nn.Embedding(size, dim)
        self.mix = nn.Conv1d(dim, dim, context, groups=dim, bias=False)
        self.drop = Dropout(dropout)

    def _states(self, units: Tensor) -> Tensor:
        x = self.drop(self.embedding(units)).transpose(1, 2)
        return F.relu(self.mix(x).transpose(1, 2))

    def forward(self, targets: Tensor) -> Tensor:
        """targets [B, U] -> states [B, U + 1, dim]; state u has seen the first u units."""
        return self._states(F.pad(targets.long(), (self.context, 0), value=BLANK))

    def initial(self, batch: int, device: torch.device) -> Any:
        return torch.full((batch, self.context), BLANK, dtype=torch.int64, device=device)

    def step(self, state: Any) -> Tensor:
        """[B, dim] for the units in `state`."""
        return self._states(state)[:, 0]

    def advance(self, state: Any, units: Tensor, where: Tensor) -> Any:
        """`state` after `units` [B], only where `where` [B]."""
        moved = torch.cat([state[:, 1:], units[:, None]], dim=1)
        return torch.where(where[:, None], moved, state)


class LstmPredictor(nn.Module):
    """Embedding and one LSTM layer over all units so far. State: (output [B, dim], h [B, dim], c [B, dim])."""

    def __init__(self, size: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(size, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.drop = Dropout(dropout)

    def forward(self, targets: Tensor) -> Tensor:
        """targets [B, U] -> states [B, U + 1, dim]; state u has seen the first u units."""
        units = F.pad(targets.long(), (1, 0), value=BLANK)
        return self.lstm(self.drop(self.embedding(units)))[0]

    def initial(self, batch: int, device: torch.device) -> Any:
        zero = torch.zeros(batch, self.dim, device=device)
        blank = torch.full((batch,), BLANK, dtype=torch.int64, device=device)
        return self.advance((zero, zero, zero), blank, torch.ones(batch, dtype=torch.bool, device=device))

    def step(self, state: Any) -> Tensor:
        return state[0]

    def advance(self, state: Any, units: Tensor, where: Tensor) -> Any:
        x = self.embedding(units)[:, None]
        output, (h, c) = self.lstm(x, (state[1][None].contiguous(), state[2][None].contiguous()))
        new = (output[:, 0], h[0], c[0])
        return tuple(torch.where(where[:, None], n, s) for n, s in zip(new, state))


class Joint(nn.Module):
    """Additive joint: out(tanh(encoder(e) + predictor(p))). The projections are apart so that the loss can fuse."""

    def __init__(self, encoder_dim: int, predictor_dim: int, dim: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(encoder_dim, dim)
        self.predictor = nn.Linear(predictor_dim, dim, bias=False)
        self.output = nn.Linear(dim, size)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Projected encoder and predictor states that broadcast against each other -> logits [..., V]."""
        return self.output(torch.tanh(encoder + predictor))


class SimpleJoint(nn.Module):
    """Unit scores of encoder and predictor apart, whose sum chooses the pruned loss's band; training only."""

    def __init__(self, encoder_dim: int, predictor_dim: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(encoder_dim, size)
        self.predictor = nn.Linear(predictor_dim, size, bias=False)

    def forward(self, encoder: Tensor, predictor: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T, dim] and [B, U+1, dim] -> scores [B, T, V] and [B, U+1, V]."""
        return self.encoder(encoder), self.predictor(predictor)


class Transducer(nn.Module):
    """Encoder, prediction network and joint over `size` units, blank included; an optional CTC head."""

    def __init__(
        self,
        size: int,
        encoder: dict,
        *,
        predictor: str = "stateless",
        predictor_dim: int = 192,
        predictor_context: int = 2,
        joint_dim: int = 256,
        ctc: bool = True,
        pruned: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.size = size
        self.encoder = Encoder(**encoder, dropout=dropout)
        self.predictor: StatelessPredictor | LstmPredictor
        if predictor == "stateless":
            self.predictor = StatelessPredictor(size, predictor_dim, predictor_context, dropout)
        else:
            self.predictor = LstmPredictor(size, predictor_dim, dropout)
        self.joint = Joint(self.encoder.dim, predictor_dim, joint_dim, size)
        self.ctc = nn.Linear(self.encoder.dim, size) if ctc else None
        self.simple = SimpleJoint(self.encoder.dim, predictor_dim, size) if pruned else None

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Plain fbank [B, T, bins] -> encoder states [B, T', dim], lengths [B]; for inference."""
        states, lengths, _ = self.encoder(self.encoder.normalise(features, lengths), lengths)
        return states, lengths

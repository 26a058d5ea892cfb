"""From encoder frames to one student state a transfer position.

Invariant: what a position gets is a mixture of the *values of encoder frames* of its own utterance. The text
chooses where to look (through queries that know no context) and never enters the state, or a head could tell
the target from the transcript without hearing anything. Padding of frames and positions changes nothing.
Exercised by: pytest tests/distill/test_aligners.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.errors import ConfigError
from .batch import Positions

ALIGNERS = ("attention", "occupancy", "cif", "predictor")
_OCTAVES = 6


class Attention(nn.Module):
    """Cross-attention; queries are the positions' stored input embeddings, keys and values the encoder
    frames.

    `embeddings` holds one float table [K, D] a teacher, frozen and not saved with the model. Keys and values
    are shared by all teachers, so a teacher more costs its queries and one attention. The same word twice has
    the same embedding, so queries and keys also carry where they are: the fraction of the transcript, of the
    frames. After Sunder et al. 2022, "Tokenwise contrastive pretraining".
    """

    def __init__(
        self, encoder_dim: int, embeddings: Mapping[str, Tensor], *, dim: int | None = None, heads: int = 4
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim or encoder_dim, heads
        if self.dim % heads:
            raise ConfigError(f"the aligner's width {self.dim} is not a multiple of its {heads} heads")
        self.teachers = list(embeddings)
        for number, table in enumerate(embeddings.values()):
            self.register_buffer(f"table{number}", torch.as_tensor(table), persistent=False)
        widths = [table.shape[1] for table in embeddings.values()]
        self.query = nn.ModuleList(nn.Linear(width, self.dim) for width in widths)
        self.key, self.value = nn.Linear(encoder_dim, self.dim), nn.Linear(encoder_dim, self.dim)
        # One projection for both sides, of such a scale that at the start the scores are the waves' own kernel
        # Σ cos(π 2^k (p - t)): attention leans to the diagonal, as speech does, and is free to leave it.
        self.place = nn.Linear(2 * _OCTAVES, self.dim, bias=False)
        nn.init.normal_(self.place.weight, std=(self.dim / heads) ** -0.25)

    @property
    def width(self) -> int:
        return self.dim

    def frames(self, encoder: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """encoder [B, T, H] with zeros in the padding -> keys and values [B, heads, T, A / heads], mask [B,
        1, 1, T].
        """
        batch, frames, _ = encoder.shape
        frame = torch.arange(frames, device=encoder.device)
        mask = frame < lengths[:, None]  # (B, T)
        place = (frame + 0.5) / lengths.clamp_min(1)[:, None]
        key = self.key(encoder) + self.place(_waves(place)).to(encoder.dtype)
        split = (batch, frames, self.heads, self.dim // self.heads)
        key, value = key.view(split).transpose(1, 2), self.value(encoder).view(split).transpose(1, 2)
        return key, value, mask[:, None, None]

    def forward(self, frames: tuple[Tensor, Tensor, Tensor], positions: Positions, teacher: str) -> Tensor:
        """What `frames` returned -> states [M, A]."""
        key, value, mask = frames
        query = self._query(positions, teacher).to(key.dtype)  # (M, A)
        grid = query.new_zeros(len(key) * positions.grid, self.dim).index_copy(0, positions.row, query)
        grid = grid.view(len(key), positions.grid, self.heads, -1).transpose(1, 2)  # (B, heads, P, A / heads)
        state = F.scaled_dot_product_attention(grid, key, value, attn_mask=mask)
        return state.transpose(1, 2).reshape(-1, self.dim)[positions.row]

    def weights(self, encoder: Tensor, lengths: Tensor, positions: Positions, teacher: str) -> Tensor:
        """Where each position looks, averaged over heads: [M, T]; for plots and tests, not for training."""
        key, _, mask = self.frames(encoder, lengths)
        query = self._query(positions, teacher).view(-1, self.heads, 1, self.dim // self.heads)
        of = positions.row // positions.grid
        scores = (query * key[of]).sum(-1) / math.sqrt(query.shape[-1])  # (M, heads, T)
        return scores.masked_fill(~mask[of, :, 0], float("-inf")).softmax(-1).mean(1)

    def _query(self, positions: Positions, teacher: str) -> Tensor:
        number = self.teachers.index(teacher)
        table: Tensor = getattr(self, f"table{number}")
        if positions.query_start is None or positions.query_weight is None:
            embedding = table[positions.query_row]
        else:
            embedding = F.embedding_bag(
                positions.query_row,
                table,
                positions.query_start,
                mode="sum",
                per_sample_weights=positions.query_weight.to(table.dtype),
            )
        # Tables of different teachers differ tenfold in scale; one learning rate serves all.
        embedding = F.layer_norm(embedding.float(), embedding.shape[-1:])
        return self.query[number](embedding) + self.place(_waves(positions.place))


class Occupancy(nn.Module):
    """Frames averaged with the transducer's posterior of emitting, there, the units that the position spans.

    No parameters. Gradients reach the frames and stop at the weights: the loss that made the weights is the
    one to say where a unit is. Source: occupancies γ(b, u, t) of our own RNN-T loss, `return_occupancy=True`.
    """

    def __init__(self, encoder_dim: int) -> None:
        super().__init__()
        self.width = encoder_dim

    def frames(self, encoder: Tensor, occupancy: Tensor) -> Tensor:
        """encoder [B, T, H], occupancy [B, U, T] with zeros in the padding -> the mean frame of each unit
        [B, U, H].
        """
        if occupancy.shape[-1] != encoder.shape[1]:
            raise ValueError(f"an occupancy of {occupancy.shape[-1]} frames for an encoder's {encoder.shape[1]}")
        weight = occupancy.detach().to(encoder.dtype)
        # Rows sum to 1 up to rounding; rows of padded units sum to 0 and must stay 0
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
        return weight @ encoder

    def forward(self, units: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """What `frames` returned -> states [M', H] and which M' of the M kept positions have units, int64 [M']."""
        return of_units(units, positions)


class Cif(nn.Module):
    """Continuous integrate-and-fire: each frame has a weight, positions take the frames in which the sum passes them.

    The weights of an utterance are scaled so that they sum to its number of positions: position p is the mean of the
    frames over which the running sum goes from p to p + 1. Monotonic by construction; the weights are learned from
    the transfer loss. After Dong and Xu 2020, "CIF", as used for transfer by Han et al. 2023 and Deng et al. 2022.
    """

    def __init__(self, encoder_dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.width = encoder_dim
        self.weigh = nn.Conv1d(encoder_dim, 1, kernel, padding=kernel // 2)

    def frames(self, encoder: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """encoder [B, T, H] with zeros in the padding -> itself and the running share [B, T] of the weights, to 1."""
        mask = torch.arange(encoder.shape[1], device=encoder.device) < lengths[:, None]
        weight = torch.sigmoid(self.weigh(encoder.transpose(1, 2))[:, 0].float()) * mask
        # Sums of many small shares: float32 whatever autocast does, or late positions miss their frames
        running = weight.cumsum(1)
        return encoder, running / running[:, -1:].clamp_min(1e-6)

    def weights(self, share: Tensor, positions: Positions) -> Tensor:
        """[B, P, T]: how much of position p lies in frame t; rows of positions that exist sum to 1."""
        end = share * positions.lengths[:, None]
        begin = F.pad(end[:, :-1], (1, 0))
        place = torch.arange(positions.grid, device=share.device)[None, :, None]
        return (torch.minimum(end[:, None], place + 1) - torch.maximum(begin[:, None], place)).clamp_min(0)

    def forward(self, frames: tuple[Tensor, Tensor], positions: Positions) -> Tensor:
        """What `frames` returned -> states [M, H]."""
        encoder, share = frames
        return (self.weights(share, positions).to(encoder.dtype) @ encoder).flatten(0, 1)[positions.row]


class Predictor(nn.Module):
    """The prediction network's states instead of the encoder's: it, too, may learn what a language model knows.

    `after`: the state that has read the unit, else the one that expects it (and cannot copy it). A position takes the
    mean over the units that it spans. After Kubo et al. 2022, "Knowledge transfer from large-scale pretrained language
    models to end-to-end speech recognizers".
    """

    def __init__(self, predictor_dim: int, after: bool = True) -> None:
        super().__init__()
        self.width, self.after = predictor_dim, after

    def frames(self, predictor: Tensor) -> Tensor:
        """predictor [B, U + 1, W]: state u has read u units -> [B, U, W]: one a unit."""
        return predictor[:, 1:] if self.after else predictor[:, :-1]

    def forward(self, units: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """What `frames` returned -> states [M', W] and which of the M kept positions have units, int64 [M']."""
        return of_units(units, positions)


def of_units(units: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Means of unit vectors [B, U, W] over the units of each position -> [M', W], and which positions, int64 [M']."""
    if positions.unit_weight is None or positions.unit_rows is None:
        raise ValueError("this aligner needs unit_spans: give them to TargetReader.read")
    padded = units.shape[1] - positions.unit_weight.shape[2]
    if padded < 0:
        raise ValueError(f"{positions.unit_weight.shape[2]} units in the spans, {units.shape[1]} in the model's output")
    # Rows of `units` in the padding may hold anything
    weight = positions.unit_weight.to(units.dtype)
    units = units[:, : weight.shape[2]].masked_fill(weight.sum(1)[..., None] == 0, 0)
    return (weight @ units).flatten(0, 1)[positions.row[positions.unit_rows]], positions.unit_rows


def _waves(place: Tensor) -> Tensor:
    """Fractions in [0, 1], any shape -> sines and cosines of 1, 2, 4, … half turns, [..., 12]."""
    angle = place[..., None] * (math.pi * 2.0 ** torch.arange(_OCTAVES, device=place.device))
    return torch.cat([angle.sin(), angle.cos()], -1)

"""Aligners: from the student's frames or units to one state for each transfer position.

An aligner prepares a batch once (`frames`) and is then called for the positions of each teacher. It returns states
[M', width] and which of the M kept positions they belong to, int64 [M'], or None if to all.
Guarantees: all but the predictor mix *values of encoder frames* of the position's own utterance. The text
chooses frames (through queries without context) and never enters the state, or a head could predict the target from
the transcript without the audio. Padding of frames and positions changes nothing.
Try: `pytest tests/distill/test_aligners.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.errors import ConfigError
from .batch import Positions

ALIGNERS = ("attention", "occupancy", "cif", "transport", "predictor", "frames")
NEED_EMBEDDINGS = ("attention", "transport")
_OCTAVES = 6
_NOTHING = -1e9  # a logarithm of nothing

Aligned = tuple[Tensor, Tensor | None]  # states [M', width], and their kept positions int64 [M'], None if all


class QueryAligner(nn.Module):
    """The aligners that compare frames with the positions' stored input embeddings, which know no context.

    Arguments:
        embeddings: a float table [K, D] for each teacher. The tables are not trained and not saved with the model.
        dim: A, the width of queries and keys.
    """

    width: int

    def __init__(self, encoder_dim: int, embeddings: Mapping[str, Tensor], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.teachers = list(embeddings)
        for number, table in enumerate(embeddings.values()):
            self.register_buffer(f"table{number}", torch.as_tensor(table), persistent=False)
        self.query = nn.ModuleList(nn.Linear(table.shape[1], dim) for table in embeddings.values())
        self.key = nn.Linear(encoder_dim, dim)

    def projected(self, positions: Positions, teacher: str) -> Tensor:
        """Return the projected embedding of each kept position, [M, A]."""
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
        # Tables of different teachers differ tenfold in scale, but all have one learning rate.
        return self.query[number](F.layer_norm(embedding.float(), embedding.shape[-1:]))


class Attention(QueryAligner):
    """Cross-attention from the positions' stored input embeddings (queries) to encoder frames (keys and values).

    All teachers share keys and values, so one more teacher costs its queries and one attention. Two equal words have
    equal embeddings, so queries and keys also carry their place, as a fraction of the transcript or of the frames.
    After Sunder et al. 2022, "Tokenwise contrastive pretraining".

    Arguments:
        encoder_dim: H, the width of the encoder frames.
        dim: A, the width of the states, a multiple of `heads`. None: encoder_dim.
    """

    def __init__(
        self, encoder_dim: int, embeddings: Mapping[str, Tensor], *, dim: int | None = None, heads: int = 4
    ) -> None:
        super().__init__(encoder_dim, embeddings, dim or encoder_dim)
        self.width, self.heads = self.dim, heads
        if self.dim % heads:
            raise ConfigError(f"the aligner's width {self.dim} is not a multiple of its {heads} heads")
        self.value = nn.Linear(encoder_dim, self.dim)
        # Both sides share one projection. With this scale the scores begin as the waves' own kernel,
        # Σ cos(π 2^k (p - t)): attention prefers the diagonal, as speech does, and can leave it.
        self.place = nn.Linear(2 * _OCTAVES, self.dim, bias=False)
        nn.init.normal_(self.place.weight, std=(self.dim / heads) ** -0.25)

    def frames(self, encoder: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [B, heads, T, A / heads] and a mask [B, 1, 1, T] of the encoder [B, T, H].

        The encoder must be 0 in the padding.
        """
        batch, frames, _ = encoder.shape
        mask, place = _places_of_frames(encoder, lengths)
        key = self.key(encoder) + self.place(_waves(place)).to(encoder.dtype)
        split = (batch, frames, self.heads, self.dim // self.heads)
        key, value = key.view(split).transpose(1, 2), self.value(encoder).view(split).transpose(1, 2)
        return key, value, mask[:, None, None]

    def forward(self, frames: tuple[Tensor, Tensor, Tensor], positions: Positions, teacher: str) -> Aligned:
        """Return states [M, A]. `frames` is what the method `frames` returned."""
        key, value, mask = frames
        query = self._query(positions, teacher).to(key.dtype)  # (M, A)
        grid = _on_grid(query, positions, len(key))
        grid = grid.view(len(key), positions.grid, self.heads, -1).transpose(1, 2)  # (B, heads, P, A / heads)
        state = F.scaled_dot_product_attention(grid, key, value, attn_mask=mask)
        return state.transpose(1, 2).reshape(-1, self.dim)[positions.row], None

    def _query(self, positions: Positions, teacher: str) -> Tensor:
        return self.projected(positions, teacher) + self.place(_waves(positions.place))


class Transport(QueryAligner):
    """Entropic optimal transport from frames to positions, which prefers the temporal order and leaves silence out.

    The cost of a frame and a position is one minus the cosine of the frame's key and the position's query.
    The plan minimises

        sum(plan * cost) + blur * KL(plan | order) + slack * KL(sum over positions of plan | uniform)

    where every position receives its equal share, and `order` is a Gaussian in the distance of their places, as
    fractions of the frames and of the transcript. With a finite slack a frame may give less than its share, so silence
    needs no partner. A position's state is the mean of the encoder frames, weighted with its column of the plan.
    After Lu et al. 2023 (arXiv 2309.16093), 2024 (2409.02239) and 2025 (2509.05609). `rounds` of the scaling algorithm
    of Chizat et al. 2018 (arXiv 1607.05816) compute the plan, and gradients flow through them.

    Arguments:
        encoder_dim: H, the width of the encoder frames.
        dim: A, the width of queries and keys. None: encoder_dim.
        blur: above 0. A smaller one gives sharper plans.
        spread: standard deviation of the order, as a fraction of the utterance.
        slack: above 0. A larger one makes frames give their share.
    """

    def __init__(
        self, encoder_dim: int, embeddings: Mapping[str, Tensor], *, dim: int | None = None,
        blur: float = 0.1, spread: float = 0.1, slack: float = 0.1, rounds: int = 20,
    ) -> None:  # fmt: skip
        super().__init__(encoder_dim, embeddings, dim or encoder_dim)
        self.width = encoder_dim
        self.blur, self.spread, self.slack, self.rounds = blur, spread, slack, rounds

    def frames(self, encoder: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the encoder [B, T, H], its keys [B, T, A] of length 1, a mask and the places of frames [B, T].

        The encoder must be 0 in the padding.
        """
        mask, place = _places_of_frames(encoder, lengths)
        return encoder, F.normalize(self.key(encoder).float(), dim=-1), mask, place

    def plan(self, frames: tuple[Tensor, Tensor, Tensor, Tensor], positions: Positions, teacher: str = "") -> Tensor:
        """Return the weight of each frame for each position, float32 [B, T, P]. Columns of kept positions sum to 1."""
        _, key, mask, place = frames
        batch = len(key)
        with torch.autocast(key.device.type, enabled=False):
            query = _on_grid(F.normalize(self.projected(positions, teacher).float(), dim=-1), positions, batch)
            there = _on_grid(torch.ones_like(positions.place), positions, batch) > 0  # (B, P)
            middle = _on_grid(positions.place, positions, batch)
            cost = 1 - key @ query.transpose(1, 2)
            kernel = -cost / self.blur - ((place[..., None] - middle[:, None]) / self.spread).square() / 2
            # The sums over a batch's padding must not count, and a finite number keeps gradients from becoming NaN.
            kernel = kernel.masked_fill(~(mask[..., None] & there[:, None]), _NOTHING)
            share = -mask.sum(1).clamp_min(1).log()[:, None]  # the logarithm of a frame's
            wanted = -there.sum(1).clamp_min(1).log()[:, None]  # and of a position's
            yielding = self.slack / (self.slack + self.blur)
            of_position = torch.zeros_like(middle)
            for _ in range(self.rounds):
                of_frame = yielding * (share - (kernel + of_position[:, None]).logsumexp(2))
                of_frame = of_frame.masked_fill(~mask, 0)
                of_position = wanted - (kernel + of_frame[..., None]).logsumexp(1)
                of_position = of_position.masked_fill(~there, 0)
            return (kernel + of_frame[..., None]).softmax(1)

    def forward(
        self, frames: tuple[Tensor, Tensor, Tensor, Tensor], positions: Positions, teacher: str = ""
    ) -> Aligned:
        """Return states [M, H]. `frames` is what the method `frames` returned."""
        weight = self.plan(frames, positions, teacher).to(frames[0].dtype)
        return (weight.transpose(1, 2) @ frames[0]).flatten(0, 1)[positions.row], None


class UnitAligner(nn.Module):
    """The aligners that have one vector [B, U, W] for each ASR unit. A position takes the mean of its units."""

    width: int

    def forward(self, units: Tensor, positions: Positions, teacher: str = "") -> Aligned:
        """Return states [M', W] of the positions that have units. `units` is what `frames` returned."""
        if positions.unit_weight is None or positions.unit_rows is None:
            raise ValueError("this aligner needs unit_spans: give them to TargetReader.read")
        spanned = positions.unit_weight.shape[2]
        if units.shape[1] < spanned:
            raise ValueError(f"there are {spanned} units in the spans, {units.shape[1]} in the model's output")
        weight = positions.unit_weight.to(units.dtype)
        # Rows of `units` in the padding may hold anything.
        units = units[:, :spanned].masked_fill(weight.sum(1)[..., None] == 0, 0)
        return (weight @ units).flatten(0, 1)[positions.row[positions.unit_rows]], positions.unit_rows


class Occupancy(UnitAligner):
    """Means of encoder frames, weighted with the transducer's posterior of emitting a position's units there.

    It has no parameters. Gradients reach the frames and stop at the weights, because the transducer's own loss alone
    decides where a unit is. The weights are the occupancies of our RNN-T loss (`return_occupancy=True`).
    """

    def __init__(self, encoder_dim: int) -> None:
        super().__init__()
        self.width = encoder_dim

    def frames(self, encoder: Tensor, occupancy: Tensor) -> Tensor:
        """Return the mean frame of each unit [B, U, H] of the encoder [B, T, H].

        Both the encoder and the occupancy [B, U, T] must be 0 in the padding.
        """
        if occupancy.shape[-1] != encoder.shape[1]:
            raise ValueError(f"an occupancy of {occupancy.shape[-1]} frames for an encoder's {encoder.shape[1]}")
        weight = occupancy.detach().to(encoder.dtype)
        # Rows sum to 1 up to rounding. Rows of padded units sum to 0 and must stay 0.
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
        return weight @ encoder


class Cif(nn.Module):
    """Continuous integrate-and-fire: each frame has a weight, and the running sum of weights defines the positions.

    The weights of an utterance are scaled to sum to its number of positions. Position p is the mean of the frames over
    which the running sum goes from p to p + 1. The alignment is monotonic, and the transfer loss trains the weights.
    After Dong and Xu 2020, "CIF", as used for transfer by Han et al. 2023 and Deng et al. 2022.
    """

    def __init__(self, encoder_dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.width = encoder_dim
        self.weigh = nn.Conv1d(encoder_dim, 1, kernel, padding=kernel // 2)

    def frames(self, encoder: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder [B, T, H], which must be 0 in the padding, and the running share [B, T] of its weights."""
        mask = torch.arange(encoder.shape[1], device=encoder.device) < lengths[:, None]
        weight = torch.sigmoid(self.weigh(encoder.transpose(1, 2))[:, 0].float()) * mask
        # Many small shares are summed in float32 whatever autocast does, or late positions would miss their frames.
        running = weight.cumsum(1)
        return encoder, running / running[:, -1:].clamp_min(1e-6)

    def weights(self, share: Tensor, positions: Positions) -> Tensor:
        """Return how much of position p is in frame t, [B, P, T]. Rows of positions that exist sum to 1."""
        end = share * positions.lengths[:, None]
        begin = F.pad(end[:, :-1], (1, 0))
        place = torch.arange(positions.grid, device=share.device)[None, :, None]
        return (torch.minimum(end[:, None], place + 1) - torch.maximum(begin[:, None], place)).clamp_min(0)

    def forward(self, frames: tuple[Tensor, Tensor], positions: Positions, teacher: str = "") -> Aligned:
        """Return states [M, H]. `frames` is what the method `frames` returned."""
        encoder, share = frames
        return (self.weights(share, positions).to(encoder.dtype) @ encoder).flatten(0, 1)[positions.row], None


class Predictor(UnitAligner):
    """The prediction network's states instead of the encoder's, so that it can learn what a language model knows.

    With `after`, a unit has the state that has read it, otherwise the state that predicts it and cannot copy it.
    After Kubo et al. 2022, "Knowledge transfer from large-scale pretrained language models to end-to-end speech
    recognizers".
    """

    def __init__(self, predictor_dim: int, after: bool = True) -> None:
        super().__init__()
        self.width, self.after = predictor_dim, after

    def frames(self, predictor: Tensor) -> Tensor:
        """Return one state for each unit, [B, U, W], of states [B, U + 1, W], where state u has read u units."""
        return predictor[:, 1:] if self.after else predictor[:, :-1]


class Frames(nn.Module):
    """The encoder states themselves, for speech teachers, whose frames the reader maps to the states by time.

    It has no parameters. A state's target is what the teacher's frames hold in the state's own stretch of time, so the
    student can use all that the state holds. With the frames as positions, states would have to be interpolated.
    """

    def __init__(self, encoder_dim: int) -> None:
        super().__init__()
        self.width = encoder_dim

    def frames(self, encoder: Tensor, lengths: Tensor) -> Tensor:
        """Return the encoder [B, T, H] itself."""
        return encoder

    def forward(self, frames: Tensor, positions: Positions, teacher: str = "") -> Aligned:
        """Return the states [M, H] of the positions. `frames` is what the method `frames` returned."""
        if positions.grid > frames.shape[1]:
            raise ValueError(f"there are {positions.grid} states in the positions, {frames.shape[1]} in the encoder")
        utterance = positions.row // positions.grid
        return frames[utterance, positions.row - utterance * positions.grid], None


def _places_of_frames(encoder: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Which frames exist, bool [B, T], and the middle of each as a fraction of the utterance, [B, T]."""
    frame = torch.arange(encoder.shape[1], device=encoder.device)
    return frame < lengths[:, None], (frame + 0.5) / lengths.clamp_min(1)[:, None]


def _on_grid(values: Tensor, positions: Positions, batch: int) -> Tensor:
    """Values [M, …] of the kept positions on the padded grid [B, P, …], 0 elsewhere."""
    shape = values.shape[1:]
    grid = values.new_zeros(batch * positions.grid, *shape).index_copy(0, positions.row, values)
    return grid.view(batch, positions.grid, *shape)


def _waves(place: Tensor) -> Tensor:
    """Return sines and cosines of 1, 2, 4, … half turns, [..., 12], of fractions in [0, 1], of any shape."""
    angle = place[..., None] * (math.pi * 2.0 ** torch.arange(_OCTAVES, device=place.device))
    return torch.cat([angle.sin(), angle.cos()], -1)

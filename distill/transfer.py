"""The transfer loss: student states at the transfer positions, pulled towards what the teachers hold there.

Invariant: every head gets a gradient in every step (zero where a batch has nothing for it), so data-parallel
training never waits for one; each utterance contributes what it would alone; nothing here is part of the
exported model.
Exercised by: pytest tests/distill/test_transfer.py; `stillhouse train CONFIG --set transfer.…`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..data.errors import ConfigError
from .aligners import ALIGNERS, Attention, Cif, Occupancy, Predictor
from .batch import Positions, TransferBatch
from .distances import distance_named
from .mixing import Mixing
from .targets import ViewSpec


@dataclass(frozen=True)
class RankTotals:
    """What a part of a batch, shared out among ranks, must know of the whole: then the parts' losses, and their
    gradients, add up to the whole batch's.

    counts     positions that enter the loss, by teacher, over all parts (the sum of what Transfer.counts gives)
    gather     (teacher, rows [M, …] of this part) -> the rows of the other parts
    """

    counts: Mapping[str, int]
    gather: Callable[[str, Tensor], list[Tensor]]


@dataclass(frozen=True)
class TransferLoss:
    """`loss` is to be multiplied by λ and added; the other tensors are detached scalars for the log."""

    loss: Tensor
    per_view: dict[str, Tensor]
    positions: int  # that entered the loss, over all teachers of the batch
    masked: int  # that no teacher token (`occupancy`: or no ASR unit) overlaps
    skipped: int = 0  # utterances that a teacher lacked
    weights: dict[str, Tensor] = field(default_factory=dict)  # of `learned` mixing


class Transfer(nn.Module):
    """One aligner, one linear head a view (student width → teacher width), one distance, one mixing.

    views             what TargetReader.views holds
    encoder_dim       H of the tapped encoder layer, or layers
    aligner           "attention" (needs `embeddings`, TargetReader.embeddings), "occupancy", "cif" or "predictor"
                      (needs `predictor_dim`; `predictor_after` False: the state that expects the unit)
    taps              how many encoder layers forward gets; their softmax-weighted mean is what is aligned
    distance          "cosine", "l1", "smooth_l1", "mse" or "contrastive" (`temperature`)
    mixing            "mean", "learned" or "sample" (the reader draws the views: TargetReader(sample=k))
    attention_dim, attention_heads     of the attention aligner; None: encoder_dim
    """

    def __init__(
        self,
        views: Sequence[ViewSpec],
        encoder_dim: int,
        *,
        aligner: str = "attention",
        distance: str = "cosine",
        mixing: str = "mean",
        embeddings: Mapping[str, Tensor] | None = None,
        temperature: float = 0.1,
        attention_dim: int | None = None,
        attention_heads: int = 4,
        predictor_dim: int | None = None,
        predictor_after: bool = True,
        taps: int = 1,
    ) -> None:
        super().__init__()
        if not views:
            raise ConfigError("a transfer without views", remedy="name at least one view, or leave the transfer out")
        self.addresses = [view.address for view in views]
        self.of_teacher: dict[str, list[int]] = {}
        for number, view in enumerate(views):
            self.of_teacher.setdefault(view.teacher, []).append(number)
        self.aligner: Attention | Occupancy | Cif | Predictor
        if aligner == "attention":
            absent = self.of_teacher.keys() - (embeddings or {}).keys()
            if embeddings is None or absent:
                raise ConfigError(f"no input embeddings of {', '.join(sorted(absent))} for the attention aligner")
            tables = {name: torch.as_tensor(embeddings[name]) for name in self.of_teacher}
            self.aligner = Attention(encoder_dim, tables, dim=attention_dim, heads=attention_heads)
        elif aligner == "occupancy":
            self.aligner = Occupancy(encoder_dim)
        elif aligner == "cif":
            self.aligner = Cif(encoder_dim)
        elif aligner == "predictor":
            if predictor_dim is None:
                raise ConfigError("the predictor aligner needs the width of the prediction network's states")
            if taps > 1:
                raise ConfigError("the predictor aligner taps no encoder layer", remedy="set taps to 1")
            self.aligner = Predictor(predictor_dim, predictor_after)
        else:
            raise ConfigError(f"no aligner {aligner!r}", expected=", ".join(ALIGNERS))
        self.heads = nn.ModuleList(nn.Linear(self.aligner.width, view.width) for view in views)
        self.distance = distance_named(distance, temperature=temperature)
        self.contrasts = distance == "contrastive"
        self.mixing = Mixing(mixing, len(views))
        self.tap_logits = nn.Parameter(torch.zeros(taps)) if taps > 1 else None

    @property
    def needs_occupancy(self) -> bool:
        return isinstance(self.aligner, Occupancy)

    @property
    def needs_predictor(self) -> bool:
        return isinstance(self.aligner, Predictor)

    def counts(self, batch: TransferBatch) -> dict[str, int]:
        """Positions of `batch` that enter the loss, by teacher."""
        of_units = isinstance(self.aligner, (Occupancy, Predictor))
        found = {name: batch.positions[name] for name in self.of_teacher}
        return {n: len(p.unit_rows if of_units and p.unit_rows is not None else p.row) for n, p in found.items()}

    def forward(
        self,
        encoder: Tensor | Sequence[Tensor],
        encoder_lengths: Tensor,
        batch: TransferBatch,
        occupancy: Tensor | None = None,
        predictor: Tensor | None = None,
        whole: RankTotals | None = None,
    ) -> TransferLoss:
        """encoder float [B, T, H], or one such tensor a tap; encoder_lengths int [B] (same device); occupancy float
        [B, U, T] and predictor float [B, U + 1, W] for the aligners that need them; `whole` where `batch` is a part.

        `batch` on the same device. Frames beyond an utterance's length may hold anything, NaN included.
        """
        encoder = self._tapped(encoder, encoder_lengths)
        if len(encoder) != batch.utterances:
            raise ValueError(f"{len(encoder)} utterances in the encoder's output, {batch.utterances} in the targets")
        states, rows = self._align(encoder, encoder_lengths, batch, occupancy, predictor)
        losses: list[Tensor] = []
        index: list[int] = []
        idle = encoder.new_zeros((), dtype=torch.float32)  # nothing, with every unused parameter behind it
        kept = masked = 0
        for teacher, numbers in self.of_teacher.items():
            state, row, positions = states[teacher], rows[teacher], batch.positions[teacher]
            key = positions.key if row is None else positions.key[row]
            kept += len(state)
            masked += positions.masked + positions.kept - len(state)
            count = len(state) if whole is None else whole.counts[teacher]
            others = whole if self.contrasts and count else None
            keys = [key] if others is None else [key, *others.gather(teacher, key)]
            for number in numbers:
                target = batch.targets.get(self.addresses[number])
                if target is None or not count:
                    idle = idle + self.heads[number](state[:0]).float().sum()
                    continue
                prediction = self.heads[number](state).float()
                targets = [(target if row is None else target[row]).float()]
                if others is not None:  # on every rank or on none, whoever has rows: to gather is to wait
                    targets += others.gather(teacher, targets[0])
                with torch.autocast(encoder.device.type, enabled=False):
                    each = self.distance(prediction, torch.cat(targets), torch.cat(keys))
                losses.append(each.sum() / count)
                index.append(number)
        loss = self.mixing(losses, index) + idle if losses else idle + self.mixing.idle()
        per_view = {self.addresses[n]: value.detach() for n, value in zip(index, losses, strict=True)}
        weights = self.mixing.logged(self.addresses)
        return TransferLoss(loss, per_view, kept, masked, batch.skipped, weights)

    def _tapped(self, encoder: Tensor | Sequence[Tensor], lengths: Tensor) -> Tensor:
        """[B, T, H], zero beyond each utterance's length: before the taps are mixed, so that what lies there stays out
        of the gradient of their weights too.
        """
        taps = [encoder] if isinstance(encoder, Tensor) else list(encoder)
        expected = 1 if self.tap_logits is None else len(self.tap_logits)
        if len(taps) != expected:
            raise ValueError(f"{len(taps)} taps of the encoder, {expected} expected")
        padding = torch.arange(taps[0].shape[1], device=taps[0].device) >= lengths[:, None]
        taps = [tap.masked_fill(padding[..., None], 0) for tap in taps]
        if self.tap_logits is None:
            return taps[0]
        weights = torch.softmax(self.tap_logits.float(), 0).to(taps[0].dtype)
        return torch.stack([w * tap for w, tap in zip(weights, taps, strict=True)]).sum(0)

    def _align(
        self,
        encoder: Tensor,
        lengths: Tensor,
        batch: TransferBatch,
        occupancy: Tensor | None,
        predictor: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """States [M, width] by teacher, and which of its kept positions they are (None: all)."""
        absent = self.of_teacher.keys() - batch.positions.keys()
        if absent:
            raise ValueError(f"the batch holds no positions of {', '.join(sorted(absent))}")
        used: dict[str, Positions] = {name: batch.positions[name] for name in self.of_teacher}
        if isinstance(self.aligner, Attention):
            frames = self.aligner.frames(encoder, lengths)
            return {name: self.aligner(frames, p, name) for name, p in used.items()}, dict.fromkeys(used)
        if isinstance(self.aligner, Cif):
            shares = self.aligner.frames(encoder, lengths)
            return {name: self.aligner(shares, p) for name, p in used.items()}, dict.fromkeys(used)
        if isinstance(self.aligner, Occupancy):
            if occupancy is None:
                raise ValueError("it needs the loss's occupancy: rnnt_loss(…, return_occupancy=True)")
            units = self.aligner.frames(encoder, occupancy)
        else:
            if predictor is None:
                raise ValueError("the predictor aligner needs the prediction network's states")
            units = self.aligner.frames(predictor)
        aligned = {name: self.aligner(units, p) for name, p in used.items()}
        return {n: state for n, (state, _) in aligned.items()}, {n: row for n, (_, row) in aligned.items()}

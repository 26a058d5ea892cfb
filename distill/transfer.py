"""The transfer loss: heads predict, from student states at the transfer positions, what the teachers hold there.

Guarantees: each head gets a gradient in each step (zero if a batch has nothing for it), so data-parallel training never
waits for one. Each utterance contributes what it would contribute alone. Nothing here is part of an exported model.
Try: `pytest tests/distill/test_transfer.py`, or `stillhouse train CONFIG --set transfer.…`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data.errors import ConfigError
from .aligners import (
    ALIGNERS,
    NEED_EMBEDDINGS,
    Aligned,
    Attention,
    Cif,
    Frames,
    Occupancy,
    Predictor,
    Transport,
    UnitAligner,
)
from .batch import TransferBatch
from .distances import distance_named
from .mixing import Mixing
from .targets import ViewSpec


@dataclass(frozen=True)
class RankTotals:
    """What a rank must know of the whole batch if it computes a part, so that the parts' losses and gradients add up.

    `gather(teacher, rows [M, …])` returns the rows of the other parts.
    """

    counts: Mapping[str, int]  # by teacher, positions of all parts that enter the loss: the sum of Transfer.counts
    gather: Callable[[str, Tensor], list[Tensor]]


@dataclass(frozen=True)
class TransferLoss:
    """The transfer loss of a batch: multiply `loss` by λ and add it. The other tensors are detached, for the log."""

    loss: Tensor
    per_view: dict[str, Tensor]
    positions: int  # positions that entered the loss, of all teachers
    masked: int  # positions that no teacher token overlaps (occupancy, predictor: or no ASR unit)
    skipped: int = 0  # utterances that a teacher lacks
    weights: dict[str, Tensor] = field(default_factory=dict)  # the views' weights by mixing "learned"


class Transfer(nn.Module):
    """The transfer's trained parts: one aligner, a linear head for each view, and the weights of the views.

    Arguments:
        views: the `views` of a TargetReader.
        encoder_dim: H, the width of the encoder states.
        aligner: "occupancy", "attention" or "transport" (need `embeddings`), "cif", "predictor" (needs
            `predictor_dim`), or "frames" for the position "state".
        distance: "cosine", "l1", "smooth_l1", "mse", "contrastive" or "codes" (needs TargetReader(codes=True)).
        mixing: "mean", "sum", "learned" or "sample". For "sample" the reader draws the views, TargetReader(sample=k).
        embeddings: the `embeddings` of a TargetReader.
        temperature: above 0, of the distance "contrastive".
        attention_dim, attention_heads: width (None: encoder_dim) and heads of attention. `transport` has the width.
        predictor_dim: W, the width of the prediction network's states.
        predictor_after: take the state that has read a unit. False: the one that predicts it.
        taps: the number of encoder layers that `forward` gets. Their softmax-weighted mean is aligned.

    Raises:
        ConfigError: a choice is unknown, or lacks what it needs.
    """

    def __init__(
        self, views: Sequence[ViewSpec], encoder_dim: int, *,
        aligner: str = "occupancy", distance: str = "cosine", mixing: str = "mean",
        embeddings: Mapping[str, Tensor] | None = None, temperature: float = 0.1, attention_dim: int | None = None,
        attention_heads: int = 4, predictor_dim: int | None = None, predictor_after: bool = True, taps: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if not views:
            raise ConfigError("a transfer without views", remedy="name at least one view, or leave the transfer out")
        self.addresses = [view.address for view in views]
        self.of_teacher: dict[str, list[int]] = {}
        for number, view in enumerate(views):
            self.of_teacher.setdefault(view.teacher, []).append(number)
        self.aligner: Attention | Transport | Occupancy | Cif | Predictor | Frames
        if aligner in NEED_EMBEDDINGS:
            tables = embeddings or {}
            absent = ", ".join(sorted(self.of_teacher.keys() - tables.keys()))
            if absent:
                raise ConfigError(f"there are no input embeddings of {absent} for the {aligner} aligner")
            tables = {name: tables[name] for name in self.of_teacher}
            if aligner == "attention":
                self.aligner = Attention(encoder_dim, tables, dim=attention_dim, heads=attention_heads)
            else:
                self.aligner = Transport(encoder_dim, tables, dim=attention_dim)
        elif aligner == "occupancy":
            self.aligner = Occupancy(encoder_dim)
        elif aligner == "cif":
            self.aligner = Cif(encoder_dim)
        elif aligner == "frames":
            self.aligner = Frames(encoder_dim)
        elif aligner == "predictor":
            if predictor_dim is None:
                raise ConfigError("the predictor aligner needs the width of the prediction network's states")
            if taps > 1:
                raise ConfigError("the predictor aligner taps no encoder layer", remedy="set taps to 1")
            self.aligner = Predictor(predictor_dim, predictor_after)
        else:
            raise ConfigError(f"there is no aligner {aligner!r}", expected=", ".join(ALIGNERS))
        self.heads = nn.ModuleList(nn.Linear(self.aligner.width, view.width) for view in views)
        self.distance = distance_named(distance, temperature=temperature)
        self.contrasts, self.of_codes = distance == "contrastive", distance == "codes"
        for view in views:
            if bool(view.codebooks) != self.of_codes:
                what = "codes" if view.codebooks else "states"
                raise ConfigError(f"the targets of {view.address} are {what}", where=f"distance {distance}")
        self.mixing = Mixing(mixing, len(views))
        self.tap_logits = nn.Parameter(torch.zeros(taps)) if taps > 1 else None

    @property
    def needs_occupancy(self) -> bool:
        """Whether `forward` needs the occupancies of the RNN-T loss."""
        return isinstance(self.aligner, Occupancy)

    @property
    def needs_predictor(self) -> bool:
        """Whether `forward` needs the states of the prediction network."""
        return isinstance(self.aligner, Predictor)

    def counts(self, batch: TransferBatch) -> dict[str, int]:
        """Return how many positions of the batch enter the loss, by teacher."""
        positions = {name: batch.positions[name] for name in self.of_teacher}
        if isinstance(self.aligner, UnitAligner):
            return {n: p.kept if p.unit_rows is None else len(p.unit_rows) for n, p in positions.items()}
        return {n: p.kept for n, p in positions.items()}

    def forward(
        self, encoder: Tensor | Sequence[Tensor], encoder_lengths: Tensor, batch: TransferBatch,
        occupancy: Tensor | None = None, predictor: Tensor | None = None, rank_totals: RankTotals | None = None,
    ) -> TransferLoss:  # fmt: skip
        """Return the transfer loss of a batch. All tensors are on one device.

        Arguments:
            encoder: float [B, T, H], or one such tensor for each tap. Frames beyond an utterance's length may hold
                anything, NaN included.
            encoder_lengths: int [B].
            batch: what a TargetReader has read.
            occupancy: float [B, U, T], for the aligner "occupancy".
            predictor: float [B, U + 1, W], for the aligner "predictor".
            rank_totals: numbers of the whole batch if this is a part of it.

        Raises:
            ValueError: the tensors do not belong together, or one that the aligner needs is absent.
        """
        encoder = self._tapped(encoder, encoder_lengths)
        if len(encoder) != batch.utterances:
            raise ValueError(f"{len(encoder)} utterances in the encoder's output, {batch.utterances} in the targets")
        aligned = self._align(encoder, encoder_lengths, batch, occupancy, predictor)
        losses: list[Tensor] = []
        index: list[int] = []
        idle = encoder.new_zeros((), dtype=torch.float32)  # 0, with all unused parameters in its graph
        kept = masked = 0
        for teacher, numbers in self.of_teacher.items():
            (state, row), positions = aligned[teacher], batch.positions[teacher]
            key = positions.key if row is None else positions.key[row]
            kept += len(state)
            masked += positions.masked + positions.kept - len(state)
            count = len(state) if rank_totals is None else rank_totals.counts[teacher]
            others = rank_totals if self.contrasts and count else None
            keys = [key] if others is None else [key, *others.gather(teacher, key)]
            for number in numbers:
                target = batch.targets.get(self.addresses[number])
                if target is None or not count:
                    idle = idle + self.heads[number](state[:0]).float().sum()
                    continue
                prediction = self.heads[number](state).float()
                target = target if row is None else target[row]
                with torch.autocast(encoder.device.type, enabled=False):
                    if self.of_codes:
                        assert positions.share is not None
                        share = positions.share if row is None else positions.share[row]
                        each = self.distance(prediction, target, share)
                    elif self.contrasts:
                        # All ranks gather or none does, even one without rows, because they wait.
                        targets = [] if others is None else others.gather(teacher, target.float())
                        all_targets = torch.cat([target.float(), *targets])
                        each = self.distance(prediction, all_targets, torch.cat(keys), positions.reach)
                    else:
                        each = self.distance(prediction, target.float(), key)
                losses.append(each.sum() / count)
                index.append(number)
        loss = self.mixing(losses, index) + idle if losses else idle + self.mixing.idle()
        per_view = {self.addresses[n]: value.detach() for n, value in zip(index, losses, strict=True)}
        weights = self.mixing.logged(self.addresses)
        return TransferLoss(loss, per_view, kept, masked, batch.skipped, weights)

    def _tapped(self, encoder: Tensor | Sequence[Tensor], lengths: Tensor) -> Tensor:
        """Return the mean of the taps [B, T, H], 0 beyond each utterance's length.

        The zeros are set before the taps are mixed, so the padding has no part in the gradient of the taps' weights.
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
        self, encoder: Tensor, lengths: Tensor, batch: TransferBatch, occupancy: Tensor | None, predictor: Tensor | None
    ) -> dict[str, Aligned]:
        """Return states [M, width] by teacher, and the kept positions that they belong to (None: all)."""
        absent = self.of_teacher.keys() - batch.positions.keys()
        if absent:
            raise ValueError(f"the batch holds no positions of {', '.join(sorted(absent))}")
        if isinstance(self.aligner, Occupancy):
            if occupancy is None:
                raise ValueError("this aligner needs the loss's occupancy: rnnt_loss(…, return_occupancy=True)")
            frames: Any = self.aligner.frames(encoder, occupancy)
        elif isinstance(self.aligner, Predictor):
            if predictor is None:
                raise ValueError("the predictor aligner needs the prediction network's states")
            frames = self.aligner.frames(predictor)
        else:
            frames = self.aligner.frames(encoder, lengths)
        return {name: self.aligner(frames, batch.positions[name], name) for name in self.of_teacher}

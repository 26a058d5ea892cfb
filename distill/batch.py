"""What a step of training gets of its teachers: positions, targets and the maps between them, as torch
tensors.

Invariant: everything that varies in length is packed (ΣM rows, no padding); which rows of the padded [B, P]
grid they are is known on the CPU, so that the forward never waits for the device. Exercised by: pytest
tests/distill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """The transfer positions of one teacher in one batch; M of them are kept, the others are masked."""

    lengths: Tensor  # int64 [B]: positions of each utterance, masked ones included
    grid: int  # P ≥ 1: the longest utterance's positions
    row: Tensor  # int64 [M]: b * P + p of each kept position
    key: Tensor  # int64 [M]: equal numbers are occurrences of the same token, word or unit
    place: Tensor  # float32 [M]: the middle of the position's span over the transcript's length, in [0, 1]
    query_row: Tensor  # int64 [E]: rows of the teacher's embedding table
    query_start: Tensor | None  # int64 [M]: where each position's entries begin; None: one entry a position
    query_weight: Tensor | None  # float32 [E]
    unit_weight: Tensor | None  # float32 [B, P, U]: row-stochastic map from ASR units to positions
    unit_rows: Tensor | None  # int64 [M']: which of the M kept positions some ASR unit overlaps
    masked: int  # positions that no teacher token overlaps

    @property
    def kept(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class TransferBatch:
    """Targets float32 [M, D] by view address, standardised, and the positions that they belong to by
    teacher.
    """

    utterances: int
    positions: dict[str, Positions]
    targets: dict[str, Tensor]
    skipped: int  # utterances that at least one teacher lacks (on_missing="skip")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TransferBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TransferBatch:
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> TransferBatch:
        def moved(p: Positions) -> Positions:
            values = {f.name: getattr(p, f.name) for f in fields(p)}
            changes: dict[str, Any] = {k: move(v) for k, v in values.items() if isinstance(v, Tensor)}
            return replace(p, **changes)

        return TransferBatch(
            self.utterances,
            {name: moved(p) for name, p in self.positions.items()},
            {address: move(t) for address, t in self.targets.items()},
            self.skipped,
        )

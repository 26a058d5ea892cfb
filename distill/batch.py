"""The transfer's part of a training batch: positions, targets and the maps between them, as torch tensors.

Guarantees: all that varies in length is packed, ΣM rows without padding. The CPU knows which rows of the padded grid
[B, P] they are, so the forward pass never waits for the device.
Try: `pytest tests/distill/test_targets.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """The transfer positions of one teacher in one batch. M of them are kept, the others are masked or not drawn."""

    lengths: Tensor  # int64 [B]: positions of each utterance, masked ones included
    grid: int  # P ≥ 1: the positions of the longest utterance
    row: Tensor  # int64 [M]: b * P + p of each kept position
    key: Tensor  # int64 [M]: equal numbers are occurrences of the same token, word or unit; see also `reach`
    place: Tensor  # float32 [M]: the middle of the position's span, as a fraction of the transcript's length
    query_row: Tensor  # int64 [E]: rows of the teacher's embedding table
    query_start: Tensor | None  # int64 [M]: where the entries of each position begin, None if each has one
    query_weight: Tensor | None  # float32 [E]
    unit_weight: Tensor | None  # float32 [B, P, U]: row-stochastic map from ASR units to positions
    unit_rows: Tensor | None  # int64 [M']: those of the M kept positions that an ASR unit overlaps
    masked: int  # positions that no teacher token or frame overlaps
    share: Tensor | None = None  # float32 [M, K]: shares of the tokens or frames behind each position, for codes
    reach: int = 0  # Keys that are at most so far apart are no contrast of each other.

    @property
    def kept(self) -> int:
        """M, the number of kept positions."""
        return len(self.row)


@dataclass(frozen=True)
class TransferBatch:
    """Standardised targets float32 [M, D], or codes uint8 [M, K, C], by view address; their positions by teacher."""

    utterances: int
    positions: dict[str, Positions]
    targets: dict[str, Tensor]
    skipped: int  # utterances that at least one teacher lacks (on_missing="skip")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TransferBatch:
        """Return the batch on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TransferBatch:
        """Return the batch in pinned memory, from which a CUDA device copies without waiting."""
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

"""A batch shared out among ranks: what each part must know of the whole, so that the parts' losses add up to its loss.

Invariant: the sum over ranks of a loss, and of its gradient, is what one process computes from the whole batch; the
part of a stand-in (`Batch.share` 0) counts nothing. Exercised by `torchrun … -m stillhouse.cli train`; pytest
tests/train/run/test_ranks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...data.batches.loader import Batch
from ..model.transducer import Transducer
from ..run.ranks import ALONE, Ranks


@dataclass(frozen=True)
class PartSizes:
    """What losses are divided by: ASR units, and positions of the transfer by teacher; `band`: how many units a frame
    of the pruned loss needs at least for the transcripts to fit.
    """

    units: int
    band: int
    positions: dict[str, int]


@dataclass(frozen=True)
class GlobalBatch:
    """The whole batch, as the sizes of its `parts`, by rank."""

    parts: Sequence[PartSizes]
    ranks: Ranks = ALONE

    @property
    def units(self) -> int:
        return sum(part.units for part in self.parts)

    @property
    def band(self) -> int:
        return max(part.band for part in self.parts)

    @property
    def transfer(self) -> Any:
        """distill.transfer.Whole, or None where there is but one part."""
        if len(self.parts) == 1:
            return None
        from ...distill.transfer import RankTotals as Transferred

        counts = {teacher: sum(part.positions[teacher] for part in self.parts) for teacher in self.parts[0].positions}
        return Transferred(counts, self._others)

    def _others(self, teacher: str, rows: Tensor) -> list[Tensor]:
        found = self.ranks.gather_rows(rows, [part.positions[teacher] for part in self.parts])
        return [part for rank, part in enumerate(found) if rank != self.ranks.rank and len(part)]


def part_sizes(model: Transducer, transfer: Any, batch: Batch) -> PartSizes:
    """Of the part that `batch` is. `transfer` is a distill.Transfer or None."""
    band = 0
    if model.simple is not None:
        frames = model.encoder.output_lengths(batch.feature_lengths)
        band = int((-(-batch.target_lengths // frames)).max()) + 1  # T frames of w units get past T * (w - 1) units
    positions = {} if transfer is None else transfer.counts(batch.transfer)
    if not batch.share:
        return PartSizes(0, 0, dict.fromkeys(positions, 0))
    return PartSizes(int(batch.target_lengths.sum()), band, positions)

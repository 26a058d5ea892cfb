"""The sizes of a batch that ranks share, by which each rank divides the losses of its part.

Guarantees: the sum over ranks of a loss, and of its gradient, is what one process computes from the whole batch. A
stand-in part (`Batch.share` 0) adds nothing.
Try: `pytest tests/train/run/test_ranks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches.loader import Batch
from ...data.batches.sampler import BatchSampler
from ...data.errors import UsageError
from ..config import Config
from ..model.transducer import Transducer
from ..run.identity import weights_hash
from ..run.ranks import ALONE, Ranks


@dataclass(frozen=True)
class PartSizes:
    """What the losses of a part are divided by: its ASR units, and its positions by transfer and teacher.

    `band` is the number of units in a frame that the pruned loss needs at least for the transcripts to fit.
    """

    units: int
    band: int
    positions: dict[str, dict[str, int]]


@dataclass(frozen=True)
class GlobalBatch:
    """The whole batch, as the sizes of its parts by rank."""

    parts: Sequence[PartSizes]
    ranks: Ranks = ALONE

    @property
    def units(self) -> int:
        return sum(part.units for part in self.parts)

    @property
    def band(self) -> int:
        return max(part.band for part in self.parts)

    def transfer(self, name: str) -> Any:
        """Return a distill.transfer.RankTotals of a transfer, or None if there is one part only."""
        if len(self.parts) == 1:
            return None
        from ...distill.transfer import RankTotals

        parts = [part.positions[name] for part in self.parts]

        def other_rows(teacher: str, rows: Tensor) -> list[Tensor]:
            of_ranks = self.ranks.gather_rows(rows, [part[teacher] for part in parts])
            return [part for rank, part in enumerate(of_ranks) if rank != self.ranks.rank and len(part)]

        return RankTotals({teacher: sum(part[teacher] for part in parts) for teacher in parts[0]}, other_rows)


def part_sizes(model: Transducer, transfers: Mapping[str, Any], batch: Batch) -> PartSizes:
    """Return the sizes of a batch, or of the part of one. `transfers` are distill.Transfers by name."""
    band = 0
    if model.simple is not None and batch.features.shape[1]:
        frames = model.encoder.output_lengths(batch.feature_lengths)
        band = int((-(-batch.target_lengths // frames)).max()) + 1  # T frames of w units advance by T * (w - 1)
    positions = {name: transfer.counts(batch.transfer[name]) for name, transfer in transfers.items()}
    if not batch.share:
        return PartSizes(0, 0, {name: dict.fromkeys(counts, 0) for name, counts in positions.items()})
    return PartSizes(int(batch.target_lengths.sum()), band, positions)


def refuse_unlike_ranks(
    ranks: Ranks,
    config: Config,
    run: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    sampler: BatchSampler,
    on_progress: Callable[[str], None],
) -> None:
    """Check, before anything is written, that all ranks mean the same run and that each has work.

    `run` is its identity. Raises RankError or UsageError.
    """
    if ranks.size == 1:
        return
    own_per_machine = {"run.device", "run.threads", "run.backend", "run.timeout_s"}
    own = {name: value for name, value in config.flat().items() if name not in own_per_machine}
    own |= {f"data {k}": v for k, v in run["data"].items()}
    own |= {f"text {k}": v for k, v in run.get("text", {}).items()}
    own |= {"first weights": run["initialisation"], "torch": torch.__version__}
    own |= {name: weights_hash(module) for name, module in modules.items() if name != "model"}
    ranks.refuse_unlike(own)
    counts = [len(plan.indices) for plan in sampler.epoch(0)]
    if max(counts) < ranks.size:
        raise UsageError(
            f"there are {ranks.size} ranks, but no batch has more than {max(counts)} utterances",
            remedy="raise data.batch_frames, the size of the batch that ranks share, or start fewer ranks",
        )
    if few := sum(count < ranks.size for count in counts):
        some = f"{few} of {len(counts)} batches have fewer than {ranks.size} utterances"
        on_progress(f"{some}, so some ranks will be idle")

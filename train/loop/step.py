"""The losses of one training step: of the speech, of text without sound, or of both.

Guarantees: the random draws of a step depend on seed, step and rank alone. Those of the speech are the same with text
and without it.
Try: `pytest tests/train/loop/test_text_run.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.batches.loader import Batch
from ...extract.cpu_matmul import float32_products
from ..config import Config, transfer_weights
from ..model.transducer import Transducer
from ..run.ranks import Ranks
from .batch_share import GlobalBatch, PartSizes, part_sizes
from .objective import Losses, Timed, losses
from .text import text_losses


class StepLosses:
    """Computes the losses of each step, of a `speech` batch, of a `text` batch, or of both.

    A text loss is the language model's and the lambdas times the transfers'. Beside the speech, text.weight multiplies
    all of it. In a step of text alone nothing does.
    """

    def __init__(
        self, model: Transducer, transfers: Mapping[str, Any], config: Config, ranks: Ranks, precision: str
    ) -> None:
        self.model, self.transfers, self.config, self.ranks, self.precision = model, transfers, config, ranks, precision
        self.of_text = {name: t for name, t in transfers.items() if t.needs_predictor}

    def sizes(self, speech: Batch | None, text: Batch | None) -> list[PartSizes | None]:
        """Return the sizes of this rank's parts."""
        of = ((speech, self.transfers), (text, self.of_text))
        return [None if batch is None else part_sizes(self.model, ts, batch) for batch, ts in of]

    def __call__(
        self,
        step: int,
        speech: Batch | None,
        text: Batch | None,
        sizes: Sequence[Sequence[PartSizes | None]],
        timed: Timed,
    ) -> tuple[Losses, tuple[Batch, Tensor]]:
        """Return the losses of step `step`, from 0, and the batch to blame if they are not finite, and its costs.

        `sizes` are those of all ranks. On a CPU, float32 products are those of the faster library.
        """
        config, seed = self.config, self.config.run.seed
        of_speech, of_text = (GlobalBatch([p for p in parts if p is not None], self.ranks) for parts in zip(*sizes))
        terms: dict[str, Any] = {"precision": self.precision, "timed": timed, "weights": transfer_weights(step, config)}
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        with (float32_products() if on_cpu else None) or nullcontext():
            read: Losses | None = None
            if text is not None:
                torch.manual_seed(seed_of(seed + 104_729, step, self.ranks.rank))
                read = text_losses(self.model, self.of_text, text, whole=of_text, **terms)
            if speech is None:
                assert read is not None and text is not None
                alone = Losses(read.total, read.costs, read.parts | {"loss": read.total.detach()}, {})
                return alone, (text, read.costs)
            torch.manual_seed(seed_of(seed, step, self.ranks.rank))
            augment = torch.Generator().manual_seed(seed_of(seed + 7919, step))
            result = losses(self.model, self.transfers, speech, config, augment=augment, whole=of_speech, **terms)
            if read is None or text is None:
                return result, (speech, result.costs)
            total = result.total + config.text.weight * read.total
            parts = result.parts | read.parts | {"loss": total.detach()}
            of_text_alone = bool(result.costs.isfinite().all()) and not bool(read.costs.isfinite().all())
            blamed = (text, read.costs) if of_text_alone else (speech, result.costs)
            return Losses(total, result.costs, parts, result.transfer_inputs), blamed

    def over_ranks(self, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sums over ranks. The learned weights of views are the same on all ranks."""
        own = {name: float(value) for name, value in parts.items()}
        of_ranks = self.ranks.gather(own)
        if len(of_ranks) == 1:
            return own
        return {n: v if n.startswith("weight") else math.fsum(p[n] for p in of_ranks) for n, v in own.items()}


def seed_of(seed: int, step: int, rank: int = 0) -> int:
    """Return a seed for a step. Rank 0 draws what a single process draws."""
    entropy = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

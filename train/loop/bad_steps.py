"""Steps whose loss or gradient is not finite: skipped, their batch named and kept to be looked at, ended after a few.

    RUN/bad/step-N[-rank-R].safetensors: features [B, T, bins], feature_lengths [B], targets [B, U], target_lengths [B],
    costs [B], step, seed; in the metadata the utterances' ids, a JSON list

Invariant: such a step changes no weight, and a folder of bad batches never grows past KEPT files.
Exercised by `stillhouse train`; pytest tests/train/loop/test_bad_steps.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...data.batches.loader import Batch
from ...data.errors import StillhouseError
from ...data.files.atomic import draft_of
from ..run.ranks import ALONE, Ranks

KEPT = 20


class BadSteps:
    """`limit` of them in a row end the run; `count` is how many there were in a row so far."""

    def __init__(self, out: Path, limit: int, seed: int, report: Callable[[str], None], ranks: Ranks = ALONE) -> None:
        self.out, self.limit, self.seed, self.report, self.ranks = out, limit, seed, report, ranks
        self.count = 0

    def skip(self, step: int, batch: Batch, costs: Tensor) -> None:
        """Of step `step` (from 0). `costs` [B]: each utterance's RNN-T loss. StillhouseError: one too many."""
        self.count += 1
        unheard = ~torch.isfinite(batch.features).all(dim=(1, 2)).cpu()
        bad = ~torch.isfinite(costs).cpu()
        own = [id for id in batch.ids if batch.share]
        found = [[id for id, wrong in zip(own, which.tolist()) if wrong] for which in (unheard, bad)]
        parts = self.ranks.gather((found[0], found[1], own))
        names, why = [id for part in parts for id in part[0]], "features that are not finite"
        heard = not names
        if heard:
            names, why = [id for part in parts for id in part[1]], "no finite loss"
        if not names:
            names, why = [id for part in parts for id in part[2]], "no finite gradient"
        path = self._keep(step, batch, costs) if set(own) & set(names) else None
        paths = [str(p) for p in self.ranks.gather(path) if p is not None]
        kept = f"; kept as {', '.join(paths)}" if paths else ""
        self.report(f"step {step}: skipped, {why}: {', '.join(names)}{kept}")
        if self.count >= self.limit:
            raise StillhouseError(
                f"{self.count} steps in a row without a finite loss and gradient, the last by {why}",
                where=self.out,
                remedy=f"look at the batches in {self.out / 'bad'}"
                + ("" if not heard else ", lower optim.lr, or set run.precision=float32"),
            )

    def _keep(self, step: int, batch: Batch, costs: Tensor) -> Path | None:
        folder = self.out / "bad"
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-rank-{self.ranks.rank}" if self.ranks.size > 1 else ""
        path = folder / f"step-{step}{rank}.safetensors"
        if not path.exists() and len(list(folder.glob("step-*.safetensors"))) >= KEPT:
            return None
        tensors = {
            "features": batch.features,
            "feature_lengths": batch.feature_lengths,
            "targets": batch.targets,
            "target_lengths": batch.target_lengths,
            "costs": costs,
            "step": torch.tensor(step),
            "seed": torch.tensor(self.seed),
        }
        arrays = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with draft_of(path) as draft:
            save_file(arrays, draft, {"ids": json.dumps(batch.ids)})
        return path

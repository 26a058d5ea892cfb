"""Steps whose loss or gradient is not finite: skipped, their batch named and kept to be looked at, ended after a few.

    RUN/bad/step-N.safetensors: features [B, T, bins], feature_lengths [B], targets [B, U], target_lengths [B],
    costs [B], step, seed; in the metadata the utterances' ids, a JSON list

Invariant: such a step changes no weight, and a folder of bad batches never grows past KEPT files.
Exercised by `stillhouse train`; pytest tests/train/test_bad_steps.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..data.errors import StillhouseError
from .loader import Batch

KEPT = 20


class BadSteps:
    """`limit` of them in a row end the run; `count` is how many there were in a row so far."""

    def __init__(self, out: Path, limit: int, seed: int, report: Callable[[str], None]) -> None:
        self.out, self.limit, self.seed, self.report = out, limit, seed, report
        self.count = 0

    def skip(self, step: int, batch: Batch, costs: Tensor) -> None:
        """Of step `step` (from 0). `costs` [B]: each utterance's RNN-T loss. StillhouseError: one too many."""
        self.count += 1
        unheard = ~torch.isfinite(batch.features).all(dim=(1, 2)).cpu()
        bad = unheard if unheard.any() else ~torch.isfinite(costs).cpu()
        names = [id for id, found in zip(batch.ids, bad.tolist()) if found]
        why = "features that are not finite" if unheard.any() else "no finite loss" if names else "no finite gradient"
        path = self._keep(step, batch, costs)
        kept = f"; kept as {path}" if path is not None else ""
        self.report(f"step {step}: skipped, {why}: {', '.join(names or batch.ids)}{kept}")
        if self.count >= self.limit:
            raise StillhouseError(
                f"{self.count} steps in a row without a finite loss and gradient, the last by {why}",
                where=self.out,
                remedy=f"look at the batches in {self.out / 'bad'}"
                + ("" if unheard.any() else ", lower optim.lr, or set run.precision=float32"),
            )

    def _keep(self, step: int, batch: Batch, costs: Tensor) -> Path | None:
        folder = self.out / "bad"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step}.safetensors"
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
        draft = path.with_suffix(".draft")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft, {"ids": json.dumps(batch.ids)})
        draft.replace(path)
        return path

"""Steps whose loss or gradient is not finite: skip them, name and keep their batches, and end the run after a few.

    RUN/bad/step-N[-rank-R].safetensors: features [B, T, bins], feature_lengths [B], targets [B, U], target_lengths [B],
    costs [B], step, seed, and the utterances' ids in the metadata, as a JSON list

Guarantees: such a step changes no weight, and the folder never has more than KEPT files.
Try: `pytest tests/train/loop/test_bad_steps.py`.
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
from ...data.files.atomic import draft_of, usual_mode
from ..run.ranks import ALONE, Ranks

KEPT = 20


class BadSteps:
    """Counts the bad steps in a row, as `count`. `limit` of them end the run."""

    def __init__(
        self, out: Path, limit: int, seed: int, on_progress: Callable[[str], None], ranks: Ranks = ALONE
    ) -> None:
        self.out, self.limit, self.seed, self.on_progress, self.ranks = out, limit, seed, on_progress, ranks
        self.count = 0

    def skip(self, step: int, batch: Batch, costs: Tensor) -> None:
        """Report a step, counted from 0, whose loss or gradient is not finite, with the RNN-T `costs` [B].

        Raises StillhouseError if it is the last of `limit` bad steps in a row.
        """
        self.count += 1
        ids = [id for id in batch.ids if batch.share]
        bad_features = ~torch.isfinite(batch.features).all(dim=(1, 2)).cpu()
        masks = [bad_features, ~torch.isfinite(costs).cpu(), torch.ones(len(costs), dtype=torch.bool)]
        parts = self.ranks.gather([[id for id, bad in zip(ids, mask.tolist()) if bad] for mask in masks])
        reasons = ("features that are not finite", "no finite loss", "no finite gradient")
        by_mask = ([id for part in masked for id in part] for masked in zip(*parts))
        names, reason = next((names, reason) for names, reason in zip(by_mask, reasons) if names)
        path = self._keep(step, batch, costs) if set(ids) & set(names) else None
        paths = [str(p) for p in self.ranks.gather(path) if p is not None]
        kept = f". Batch kept as {', '.join(paths)}" if paths else ""
        self.on_progress(f"step {step}: skipped, {reason}: {', '.join(names)}{kept}")
        if self.count >= self.limit:
            remedy = f"look at the batches in {self.out / 'bad'}"
            if reason != reasons[0]:
                remedy += ", lower optim.lr, or set run.precision=float32"
            raise StillhouseError(
                f"{self.count} steps in a row have no finite loss and gradient, the last by {reason}",
                where=self.out,
                remedy=remedy,
            )

    def _keep(self, step: int, batch: Batch, costs: Tensor) -> Path | None:
        folder = self.out / "bad"
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-rank-{self.ranks.rank}" if self.ranks.size > 1 else ""
        path = folder / f"step-{step}{rank}.safetensors"
        if not path.exists() and len(list(folder.glob("step-*.safetensors"))) >= KEPT:
            return None
        names = ("features", "feature_lengths", "targets", "target_lengths")
        tensors = {name: getattr(batch, name) for name in names}
        tensors |= {"costs": costs, "step": torch.tensor(step), "seed": torch.tensor(self.seed)}
        arrays = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with draft_of(path) as draft, usual_mode(draft):
            save_file(arrays, draft, {"ids": json.dumps(batch.ids)})
        return path

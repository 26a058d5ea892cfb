"""Checkpoints: folders of safetensors and JSON, whole or not there at all, never unpickled.

    RUN/checkpoints/step-N/{model,optimiser[,transfer]}.safetensors, state.json (checksums of the others)

Invariant: a folder named step-N is complete and fsynced: it is written under a temporary name and renamed.
Exercised by `stillhouse train`, killed and started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.durable import sync
from ..data.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, after its checksum was compared."""
        path = self.path / f"{name}.safetensors"
        expected = self.state["sha256"].get(path.name)
        if expected is None:
            raise CheckpointError(f"the checkpoint holds no {path.name}", where=self.path)
        try:
            if _sha256(path) != expected:
                raise CheckpointError("damaged: its checksum differs", where=path, remedy=_REMEDY)
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"cannot be read: {e}", where=path, remedy=_REMEDY) from None


_REMEDY = "delete this checkpoint's folder to go back to the one before it"


def save(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> Checkpoint:
    """Write `folder`/step-N; on return it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    draft = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    sums = {}
    for name, values in tensors.items():
        path = draft / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, path)
        sums[path.name] = _sha256(path)
    state = {"format": FORMAT, **state, "sha256": sums}
    (draft / "state.json").write_text(json.dumps(state, indent=1))
    for path in [*draft.iterdir(), draft]:
        sync(path)
    if final.exists():  # the same step written again, after a resume from an older checkpoint
        shutil.rmtree(final)
    draft.rename(final)
    sync(folder)
    return Checkpoint(final, state)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def load(path: Path) -> Checkpoint:
    """Open one checkpoint folder."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"not a checkpoint: {e}", where=path, remedy=_REMEDY) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("sha256"), dict):
        raise CheckpointError(
            f"format {state.get('format') if isinstance(state, dict) else None}",
            where=path,
            expected=f"{FORMAT}",
        )
    return Checkpoint(path, state)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None; sweeps what a killed writer left."""
    for litter in folder.glob(".step-*"):
        shutil.rmtree(litter, ignore_errors=True)
    paths = checkpoints(folder)
    return load(paths[-1]) if paths else None


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Keep the newest `keep` checkpoints and the one of step `best`."""
    for path in checkpoints(folder)[:-keep]:
        if path.name != f"step-{best or 0:08d}":
            shutil.rmtree(path, ignore_errors=True)


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's state as flat tensors, `PARAMETER/KEY`."""
    return {
        f"{names[p]}/{key}": torch.as_tensor(value)
        for p, values in optimiser.state.items()
        for key, value in values.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Inverse of optimiser_tensors; raises CheckpointError for state of other parameters."""
    parameters = {name: p for p, name in names.items()}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        p = parameters.get(name)
        if p is None or (value.dim() and value.shape != p.shape):
            raise CheckpointError(f"optimiser state of an unknown parameter {name} {tuple(value.shape)}")
        # torch keeps AdamW's step count on the CPU
        optimiser.state[p][field] = value.to(p.device) if value.dim() else value


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Load by name, all of them; raises CheckpointError naming what is missing, foreign or of another shape."""
    own = module.state_dict()
    wrong = [f"{k} missing" for k in own.keys() - tensors.keys()]
    wrong += [f"{k} unknown" for k in tensors.keys() - own.keys()]
    wrong += [
        f"{k} is {tuple(tensors[k].shape)}, model has {tuple(v.shape)}"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if wrong:
        raise CheckpointError(f"weights of another model: {'; '.join(sorted(wrong)[:5])}", where=where)
    module.load_state_dict(tensors)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

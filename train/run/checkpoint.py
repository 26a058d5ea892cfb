"""Checkpoints: folders of safetensors and JSON.

    RUN/checkpoints/step-N/{model,optimiser[,transfer][,ema]}.safetensors, state.json (checksums of all, its own too)

Guarantees: a folder named step-N is complete and on disk, because it is written under another name and renamed. Nothing
is used that differs in any bit from what was written, and nothing is unpickled.
Try: `pytest tests/train/run/test_checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...data.errors import CheckpointError
from ...data.files.atomic import named, read_plain, sha256_plain, sync, usual_mode
from ..model.adamw import CpuAdamW

FORMAT = 2  # In format 1, state.json has no digest of its own.
_NAME = re.compile(r"step-(\d{8,})")
_REMEDY = "delete this checkpoint's folder to resume from the one before it"


class DamagedError(CheckpointError):
    """Files of a checkpoint are cut, changed or absent."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of a checkpoint, and its state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one file, such as "model". Raises DamagedError if its checksum differs."""
        path = self.path / f"{name}.safetensors"
        if path.name not in self.state["sha256"]:
            raise CheckpointError(f"the checkpoint has no {path.name}", where=self.path)
        try:
            if sha256_plain(path) != self.state["sha256"][path.name]:
                raise DamagedError("damaged: its checksum differs", where=path, remedy=_REMEDY)
            return load_file(path)
        except (OSError, SafetensorError) as e:
            reason = getattr(e, "strerror", None) or e
            raise DamagedError(f"cannot be read: {reason}", where=path, remedy=_REMEDY) from None

    def everything(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of every file: model, optimiser and, if the run has them, transfer and ema."""
        return {name.removesuffix(".safetensors"): self.tensors(Path(name).stem) for name in self.state["sha256"]}


def save(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> Checkpoint:
    """Write `folder`/step-N from a state, of which `step` is N, and from tensors by file. On return it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    draft, old = (folder / f".{final.name}.{what}" for what in (os.getpid(), "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        sums = {}
        for name, values in tensors.items():
            path = draft / f"{name}.safetensors"
            with usual_mode(path):
                save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, path)
            sums[path.name] = sha256_plain(path)
        state = {"format": FORMAT, **state, "sha256": sums}
        state["digest"] = _digest(state)
        with named(draft / "state.json"):
            (draft / "state.json").write_text(json.dumps(state, indent=1))
        sync(*draft.iterdir(), draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # A full disk gets its space back.
        raise
    if final.exists():
        final.rename(old)
    draft.rename(final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(final, state)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, by the name of its folder."""
    return int(path.name.removeprefix("step-"))


def load(path: Path) -> Checkpoint:
    """Open the folder of a checkpoint. Raises DamagedError if its state is not what was written."""
    where = path / "state.json"
    try:
        state = json.loads(read_plain(where))
    except (OSError, ValueError) as e:
        raise DamagedError(f"not a checkpoint: {e}", where=where, remedy=_REMEDY) from None
    if not isinstance(state, dict):
        raise DamagedError("not a checkpoint", where=where, remedy=_REMEDY)
    digest = state.pop("digest", None)
    if digest is not None and digest != _digest(state):
        raise DamagedError("damaged: its checksum differs", where=where, remedy=_REMEDY)
    if state.get("format") not in (1, FORMAT):
        raise CheckpointError(f"the format is {state.get('format')}", where=where, expected=f"{FORMAT} or 1")
    complete = isinstance(state.get("sha256"), dict) and type(state.get("step")) is int
    complete &= isinstance(state.get("best", {}), dict) and type(state.get("best", {}).get("step", 0)) is int
    if not complete or (digest is None and state["format"] != 1):
        raise DamagedError("damaged: some of its keys are missing", where=where, remedy=_REMEDY)
    if not _NAME.fullmatch(path.name) or step_of(path) != state["step"]:
        raise DamagedError(f"this checkpoint of step {state['step']} has another name", where=path, remedy=_REMEDY)
    return Checkpoint(path, state)


def newest_whole(folder: Path) -> tuple[Checkpoint, dict[str, dict[str, Tensor]], list[DamagedError]] | None:
    """Return the newest undamaged checkpoint, its tensors, and the damage of newer ones, or None without a checkpoint.

    If all are damaged, this raises the newest one's damage.
    """
    damaged: list[DamagedError] = []
    for path in reversed(checkpoints(folder)):
        try:
            newest = load(path)
            return newest, newest.everything(), damaged
        except DamagedError as e:
            damaged.append(e)
    if not damaged:
        return None
    first = damaged[0]
    remedy = f"all checkpoints are damaged: delete {folder} to start again, or choose another --out"
    raise DamagedError(first.what, where=first.where, remedy=remedy)


def sweep(folder: Path, newest: int) -> None:
    """Delete the drafts of killed processes, and rename the damaged checkpoints after step `newest` to damaged-step-N.

    The caller holds the run's lock.
    """
    for draft in folder.glob(".step-*"):
        shutil.rmtree(draft, ignore_errors=True)
    for path in checkpoints(folder):
        if step_of(path) > newest:
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and the one of step `best`."""
    for path in checkpoints(folder)[:-keep]:
        if step_of(path) != best:
            deleted = path.rename(folder / f".{path.name}.gone")  # so that a kill leaves no half of it under its name
            shutil.rmtree(deleted, ignore_errors=True)


def optimiser_tensors(optimiser: torch.optim.Optimizer | CpuAdamW, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Return AdamW's state as flat tensors, by `PARAMETER/KEY`."""
    states = optimiser.state.items()
    return {f"{names[p]}/{key}": torch.as_tensor(value) for p, state in states for key, value in state.items()}


def restore_optimiser(
    optimiser: torch.optim.Optimizer | CpuAdamW, names: dict[Tensor, str], tensors: dict[str, Tensor], where: Path
) -> None:
    """Restore what `optimiser_tensors` returned. Raises CheckpointError for the state of other parameters."""
    parameters = {name: p for p, name in names.items()}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        p = parameters.get(name)
        shape = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}.get(field) if p is not None else None
        if p is None or value.shape != shape or value.dtype != torch.float32:
            has = f"{field} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"the optimiser's state is another model's: {name} has {has}", where=where)
        # torch keeps AdamW's step count on the CPU.
        optimiser.state[p][field] = value.to(p.device) if field != "step" else value
    for p, fields in optimiser.state.items():
        if len(fields) != 3:
            has = ", ".join(sorted(fields))
            raise CheckpointError(f"the optimiser's state of {names[p]} has only {has}", where=where)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Load all weights by name. Raises CheckpointError for names that are missing or unknown, and for other shapes."""
    own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in tensors.items()}
    wrong = [f"{k} missing" for k in own.keys() - given.keys()] + [f"{k} unknown" for k in given.keys() - own.keys()]
    wrong += [f"{k} is {given[k]}, model has {own[k]}" for k in own.keys() & given.keys() if given[k] != own[k]]
    if wrong:
        raise CheckpointError(f"the weights are another model's: {'; '.join(sorted(wrong)[:5])}", where=where)
    module.load_state_dict(tensors)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

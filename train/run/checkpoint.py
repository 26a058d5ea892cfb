"""Checkpoints: folders of safetensors and JSON, whole or not there at all, never unpickled.

    RUN/checkpoints/step-N/{model,optimiser[,transfer][,ema]}.safetensors, state.json (checksums of all, its own too)

Invariant: a folder named step-N is complete and fsynced: it is written under a temporary name and renamed; and nothing
is used that is not, bit for bit, what was written. Exercised by `stillhouse train`, killed and started again.
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
from ...data.files.atomic import read_plain, sha256_plain, sync

FORMAT = 2  # 1: state.json had no digest of its own
_NAME = re.compile(r"step-(\d{8,})")
_REMEDY = "delete this checkpoint's folder to go back to the one before it"


class DamagedError(CheckpointError):
    """Files that are not what was written: cut, changed, absent."""


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
        if path.name not in self.state["sha256"]:
            raise CheckpointError(f"the checkpoint holds no {path.name}", where=self.path)
        self._compare(path)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise DamagedError(f"cannot be read: {e}", where=path, remedy=_REMEDY) from None

    def everything(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every file: model, optimiser and, where the run has them, transfer and ema."""
        return {name.removesuffix(".safetensors"): self.tensors(Path(name).stem) for name in self.state["sha256"]}

    def _compare(self, path: Path) -> None:
        try:
            found = sha256_plain(path)
        except OSError as e:
            raise DamagedError(f"cannot be read: {e.strerror}", where=path, remedy=_REMEDY) from None
        if found != self.state["sha256"][path.name]:
            raise DamagedError("damaged: its checksum differs", where=path, remedy=_REMEDY)


def save(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> Checkpoint:
    """Write `folder`/step-N; on return it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    draft, old = (folder / f".{final.name}.{what}" for what in (os.getpid(), "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    sums = {}
    for name, values in tensors.items():
        path = draft / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, path)
        sums[path.name] = sha256_plain(path)
    state = {"format": FORMAT, **state, "sha256": sums}
    state["digest"] = _digest(state)
    (draft / "state.json").write_text(json.dumps(state, indent=1))
    sync(*draft.iterdir(), draft)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(final, state)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = {int(m[1]): p for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
    return [found[step] for step in sorted(found)]


def load(path: Path) -> Checkpoint:
    """Open one checkpoint folder. DamagedError: it is not what was written; CheckpointError: of another format."""
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
        raise CheckpointError(f"format {state.get('format')}", where=where, expected=f"{FORMAT}, or 1")
    whole = isinstance(state.get("sha256"), dict) and type(state.get("step")) is int
    whole &= isinstance(state.get("best", {}), dict) and type(state.get("best", {}).get("step", 0)) is int
    if not whole or (digest is None and state["format"] != 1):
        raise DamagedError("damaged: not all is there", where=where, remedy=_REMEDY)
    named = _NAME.fullmatch(path.name)
    if named is None or int(named[1]) != state["step"]:
        raise DamagedError(f"the checkpoint of step {state['step']} by another name", where=path, remedy=_REMEDY)
    return Checkpoint(path, state)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None."""
    paths = checkpoints(folder)
    return load(paths[-1]) if paths else None


def newest_whole(folder: Path) -> tuple[Checkpoint, dict[str, dict[str, Tensor]], list[DamagedError]] | None:
    """The newest checkpoint that is what was written, all its tensors, and what is wrong with newer ones. None: there
    is no checkpoint. Raises the newest one's DamagedError where all are damaged.
    """
    damaged: list[DamagedError] = []
    for path in reversed(checkpoints(folder)):
        try:
            found = load(path)
            return found, found.everything(), damaged
        except DamagedError as e:
            damaged.append(e)
    if not damaged:
        return None
    first = damaged[0]
    remedy = f"no checkpoint is whole: to begin anew, delete {folder}, or choose another --out"
    raise DamagedError(first.what, where=first.where, remedy=remedy)


def sweep(folder: Path, newest: int) -> None:
    """Remove what a killed writer left, and move out of the way (to damaged-step-N) checkpoints after step `newest`,
    which newest_whole found damaged. For who holds the run's lock.
    """
    for litter in folder.glob(".step-*"):
        shutil.rmtree(litter, ignore_errors=True)
    for path in checkpoints(folder):
        if int(path.name[5:]) > newest:
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Keep the newest `keep` checkpoints and the one of step `best`."""
    for path in checkpoints(folder)[:-keep]:
        if int(path.name[5:]) != best:
            gone = path.rename(folder / f".{path.name}.gone")  # killed here, no half of it is left by its name
            shutil.rmtree(gone, ignore_errors=True)


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's state as flat tensors, `PARAMETER/KEY`."""
    return {
        f"{names[p]}/{key}": torch.as_tensor(value)
        for p, values in optimiser.state.items()
        for key, value in values.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor], where: Path
) -> None:
    """Inverse of optimiser_tensors; CheckpointError: not AdamW's state of these parameters."""
    parameters = {name: p for p, name in names.items()}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        p = parameters.get(name)
        shape = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}.get(field) if p is not None else None
        if p is None or value.shape != shape or value.dtype != torch.float32:
            found = f"{field} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"optimiser state of another model: {name} has {found}", where=where)
        # torch keeps AdamW's step count on the CPU
        optimiser.state[p][field] = value.to(p.device) if field != "step" else value
    for p, fields in optimiser.state.items():
        if len(fields) != 3:
            raise CheckpointError(f"optimiser state of {names[p]}: only {', '.join(sorted(fields))}", where=where)


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


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

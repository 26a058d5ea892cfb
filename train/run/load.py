"""Load a trained model: from a run's folder, or from a folder exported as safetensors.

Guarantees: every file is compared with its checksum before it is used.
Try: `stillhouse decode RUN CORPUS FEATURES --checkpoint last`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...data.errors import CheckpointError
from ...data.files.atomic import read_plain, sha256_plain
from ...data.units import Units, load_units
from ..config import Config, load_config
from ..model.build import build_model
from ..model.transducer import Transducer
from . import checkpoint
from .averaging import mean

WEIGHTS = "best, last, a step, raw, or average:N"
EXPORT_FORMAT, EXPORT_VERSION = "stillhouse-export", 1
EXPORT_HEAD = "model.json"  # A folder with this file is an export.
ExportKind = Literal["onnx", "torch", "safetensors"]


def load_run(out: Path, which: str = "best") -> tuple[Transducer, Units, Config, int]:
    """Return the trained model of a run's folder in eval mode, its units, its settings and its step.

    A folder that was exported as safetensors has one model. The checkpoint `which` of a run is "best" on the dev split,
    "last" or a step. A run with a moving average (optim.ema) then gives its average, with which the dev split is
    evaluated. "ema" is the last step, for such a run alone. "raw" is the last step's own weights. "average:N" is the
    mean of the last N checkpoints' own weights. Raises CheckpointError if it does not exist or is damaged.
    """
    if (out / EXPORT_HEAD).is_file():
        return load_export(out)
    if not (out / "config.toml").exists():
        raise CheckpointError("this is not a run's folder", where=out, expected="what `stillhouse train --out` wrote")
    config = load_config(out / "config.toml", saved=True)
    units = load_units(out / "units")
    model = build_model(config, units.size)
    chosen = chosen_checkpoints(out / "checkpoints", which)
    averaged = config.optim.ema > 0 and which != "raw" and not which.startswith("average:")
    if which == "ema" and not averaged:
        raise CheckpointError("the run has no moving average", where=out, remedy="train with --set optim.ema=0.999")

    def models() -> Iterator[Transducer]:
        for one in chosen:
            checkpoint.load_weights(model, one.tensors("ema" if averaged else "model"), one.path)
            yield model

    loaded = next(models()) if len(chosen) == 1 else mean(models())
    return loaded.eval(), units, config, chosen[-1].step


def chosen_checkpoints(folder: Path, which: str) -> list[checkpoint.Checkpoint]:
    """Return the checkpoints that `which` of load_run names, oldest first: one, except for average:N."""
    paths = checkpoint.checkpoints(folder)
    if not paths:
        raise CheckpointError("there is no checkpoint", where=folder, remedy="run `stillhouse train` first")
    name, _, count = which.partition(":")
    if name == "average" and count.isdigit() and int(count):
        if int(count) > len(paths):
            raise CheckpointError(
                f"there are {len(paths)} checkpoints, but {count} should be averaged",
                where=folder,
                remedy=f"train with --set run.keep={count}, or average fewer",
            )
        return [checkpoint.load(path) for path in paths[-int(count) :]]
    if which in ("best", "last", "raw", "ema"):
        last = checkpoint.load(paths[-1])
        best = folder / f"step-{last.state.get('best', {}).get('step', last.step):08d}"
        return [checkpoint.load(best) if which == "best" and best in paths else last]
    steps = {checkpoint.step_of(path): path for path in paths}
    if not which.isdigit() or int(which) not in steps:
        expected = f"{WEIGHTS}, of the steps {', '.join(map(str, steps))}"
        raise CheckpointError(f"there is no checkpoint {which!r}", where=folder, expected=expected)
    return [checkpoint.load(steps[int(which)])]


def load_export(folder: Path) -> tuple[Transducer, Units, Config, int]:
    """Load a folder that was exported as safetensors. See `load_run`."""
    remedy = f"export it again: stillhouse export RUN --format safetensors --out {folder} --force"
    try:
        head = json.loads(read_plain(folder / EXPORT_HEAD))
        if head["format"] != EXPORT_FORMAT or head["version"] != EXPORT_VERSION:
            raise ValueError(f"{head['format']} of version {head['version']}")
        if head["kind"] != "safetensors":
            expected = "a run, or an export as safetensors"
            raise CheckpointError(f"this is an export as {head['kind']}", where=folder, expected=expected)
        for name, expected in head["files"].items():
            if sha256_plain(folder / name) != expected:
                raise CheckpointError("damaged: its checksum differs", where=folder / name, remedy=remedy)
        tensors, step = load_file(folder / "model.safetensors"), int(head["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise CheckpointError(f"this is not a complete export: {e!r}", where=folder, remedy=remedy) from None
    config, units = load_config(folder / "config.toml", saved=True), load_units(folder / "units")
    model = build_model(config, units.size)
    model.simple = None
    checkpoint.load_weights(model, tensors, folder / "model.safetensors")
    return model.eval(), units, config, step

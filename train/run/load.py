"""Load a trained model: from a run's folder, or from a folder exported as safetensors.

Guarantees: every file is compared with its checksum before it is used.
Try: `stillhouse decode RUN CORPUS FEATURES --checkpoint last`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...data.errors import CheckpointError
from ...data.features.file import FeatureFile
from ...data.features.provenance import refuse_other_settings
from ...data.features.settings import FeatureSettings, FrameTimes, is_encoder, times_of
from ...data.files.atomic import read_plain, sha256_plain
from ...data.units import Units, load_units
from ..config import Config, load_config, without_removed
from ..model.build import build_model
from ..model.transducer import Transducer
from . import checkpoint, identity
from .averaging import mean

WEIGHTS = "best, last, a step, raw, or average:N"
EXPORT_FORMAT, EXPORT_VERSION = "stillhouse-export", 1
EXPORT_HEAD = "model.json"  # A folder with this file is an export.
ExportKind = Literal["onnx", "torch", "safetensors"]
# Runs of earlier versions recorded only the fingerprint of their features, which had one of these rates.
RATES = (16000, 8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class TrainedOn:
    """The feature settings that a model was trained on, and their fingerprint, as far as its folder records them."""

    settings: dict[str, Any] | None = None
    fingerprint: str | None = None

    @property
    def rate_hz(self) -> int | None:
        return None if self.settings is None else int(self.settings["rate_hz"])

    @property
    def frame_times(self) -> FrameTimes:
        """When the frames of such features are."""
        return times_of(self.settings)

    @property
    def encoder(self) -> dict[str, Any] | None:
        """The settings, if a speech encoder computes the features, and None for fbank."""
        return self.settings if is_encoder(self.settings) else None

    def refuse_others(self, features: FeatureFile) -> None:
        """Raise StaleError if the settings of a feature file are not these."""
        refuse_other_settings(features, self.settings, self.fingerprint)


def trained_on(out: Path) -> TrainedOn:
    """Return what a run, or a folder that was exported, records of its features."""
    try:
        if (out / EXPORT_HEAD).is_file():
            head = json.loads(read_plain(out / EXPORT_HEAD))
            if settings := head.get("features"):
                return TrainedOn(dict(settings))
            # Earlier versions wrote these two.
            return TrainedOn({k: head[k] for k in ("rate_hz", "bins")} if head.get("rate_hz") else None)
        paths = checkpoint.checkpoints(out / "checkpoints")
        state = checkpoint.load(paths[-1]).state if paths else {}
        settings, fingerprint = state.get("features"), state.get("data", {}).get("features")
    except (OSError, ValueError, AttributeError, CheckpointError):  # `load_run` names the damage
        return TrainedOn()
    if settings is None and fingerprint is not None:
        found = (FeatureSettings(rate_hz=rate) for rate in RATES)
        settings = next((vars(s) for s in found if s.fingerprint == fingerprint), None)
    return TrainedOn(settings, fingerprint)


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
    chosen = chosen_checkpoints(out / "checkpoints", which)
    recorded = chosen[-1].state.get("features") or {}  # Earlier versions recorded none, and all had 80 bins.
    model = build_model(config, units.size, recorded.get("bins", 80))
    _refuse_changed_folder(out, chosen[-1], config, units)
    averaged = config.optim.ema > 0 and which != "raw" and not which.startswith("average:")
    if which == "ema" and not averaged:
        raise CheckpointError("the run has no moving average", where=out, remedy="train with --set optim.ema=0.999")

    def models() -> Iterator[Transducer]:
        for one in chosen:
            checkpoint.load_weights(model, one.tensors("ema" if averaged else "model"), one.path)
            yield model

    loaded = next(models()) if len(chosen) == 1 else mean(models())
    return loaded.eval(), units, config, chosen[-1].step


def _refuse_changed_folder(out: Path, used: checkpoint.Checkpoint, config: Config, units: Units) -> None:
    """Raise CheckpointError if settings or units of a run are not those that its checkpoint was trained with."""
    recorded = used.state.get("data", {}).get("units", units.fingerprint)
    remedy = "restore it, or repeat `stillhouse train`"
    if recorded != units.fingerprint:
        what = f"the units have the fingerprint {units.fingerprint}, and the model was trained with {recorded}"
        raise CheckpointError(what, where=out / "units", remedy=remedy)
    if "config" in used.state:  # Format 1 has none.
        differ = identity.other_settings(Config.model_validate(without_removed(used.state["config"])), config)
        if differ:
            what = f"the model was trained with other settings: {'; '.join(differ)}"
            raise CheckpointError(what, where=out / "config.toml", remedy=remedy)


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
        tensors, step, bins = load_file(folder / "model.safetensors"), int(head["step"]), int(head.get("bins", 80))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise CheckpointError(f"this is not a complete export: {e!r}", where=folder, remedy=remedy) from None
    config, units = load_config(folder / "config.toml", saved=True), load_units(folder / "units")
    model = build_model(config, units.size, bins)
    model.simple = None
    checkpoint.load_weights(model, tensors, folder / "model.safetensors")
    return model.eval(), units, config, step

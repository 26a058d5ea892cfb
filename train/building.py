"""From settings and files to modules: the device, the transducer, the transfer, a trained model of a run folder.

Invariant: the transducer's first weights follow from the run's seed alone, whatever else the run has, so that runs
with and without transfer start alike. Exercised by `stillhouse train` and `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.errors import CheckpointError, UsageError
from ..data.manifest import read_manifest
from ..data.units import load_units
from . import checkpoint
from .averaging import mean
from .config import Config, load_config
from .export_folder import HEAD
from .model import Transducer


def resolve_device(name: str, local: int | None = None) -> torch.device:
    """`local`: the number of this process on its machine, where several train together: the number of its GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local is not None:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device {name!r}", expected="auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no device {name}: {torch.cuda.device_count()} CUDA devices here", remedy="set device=cpu")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the processor multiplies it natively (4x float32 on such CPUs), else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cpu" and native() else "float32"


def build_model(config: Config, size: int) -> Transducer:
    """A transducer over `size` units, initialised from the run's seed whatever else the run has."""
    m = config.model
    encoder = m.model_dump(
        include={"dim", "layers", "heads", "inner", "kernel", "subsampling"}
        | {"chunk_frames", "left_chunks", "chunk_choices"}
    )
    encoder["causal"] = m.causal or m.chunk_frames > 0 or bool(m.chunk_choices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return Transducer(
            size,
            encoder,
            predictor=m.predictor,
            predictor_dim=m.predictor_dim,
            predictor_context=m.predictor_context,
            joint_dim=m.joint_dim,
            joint=m.joint,
            durations=config.loss.durations if config.loss.kind == "tdt" else (),
            ctc=config.loss.ctc_weight > 0,
            pruned=config.loss.kind == "pruned",
            dropout=m.dropout,
        )


def build_transfer(config: Config, encoder_dim: int) -> tuple[Any, Any]:
    """(distill.Transfer, distill.TargetReader), or (None, None) without views."""
    t = config.transfer
    if not t.views:
        return None, None
    from ..distill.sources import resolve_views
    from ..distill.targets import TargetReader
    from ..distill.transfer import Transfer
    from ..extract.store import Store

    targets = TargetReader(
        resolve_views([Store.open(path) for path in t.stores], t.views),
        position=t.position,
        on_missing=t.on_missing,
        sample=t.sample,
        control=t.control,
        seed=config.run.seed,
        pin=resolve_device(config.run.device).type == "cuda",
        corpus=read_manifest(config.data.corpus),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed + 1)
        transfer = Transfer(
            targets.views,
            encoder_dim,
            aligner=t.aligner,
            distance=t.distance,
            mixing=t.mixing,
            embeddings=targets.embeddings if t.aligner == "attention" else None,
            predictor_dim=config.model.predictor_dim,
            taps=max(1, len(t.layers)),
        )
    return transfer, targets


def store_shards(config: Config, ids: Sequence[str]) -> np.ndarray | None:
    """The shard of each utterance in the first store that the config names, whether views are read or not: so that
    runs with and without transfer have the same batches. None without a store.
    """
    if not config.transfer.stores:
        return None
    from ..extract.store import Store

    return Store.open(config.transfer.stores[0]).shards(ids)


WEIGHTS = "best, last, a step, raw, or average:N"


def load_run(out: Path, which: str = "best") -> tuple[Transducer, Any, Config, int]:
    """A trained model of a run folder: (model in eval mode, its units, config, step).

    which       "best" on the dev split, "last", or a step: where the run keeps a moving average (optim.ema), its
                average, which is what the dev split is evaluated with; "raw": the last step's own weights all the same;
                "average:N": the mean of the last N checkpoints' own weights; "ema": last, for a run with an average

    A folder that `stillhouse export --format safetensors` wrote serves too, and holds one model.
    Raises CheckpointError where the run or the checkpoint is not there, or is damaged.
    """
    if (out / HEAD).is_file():
        from .export import load_export

        return load_export(out)
    if not (out / "config.toml").exists():
        raise CheckpointError("not a run's folder", where=out, expected="what `stillhouse train --out` made")
    config = load_config(out / "config.toml")
    units = load_units(out / "units")
    model = build_model(config, units.size)
    chosen = chosen_checkpoints(out / "checkpoints", which)
    averaged = config.optim.ema > 0 and which != "raw" and not which.startswith("average:")
    if which == "ema" and not averaged:
        raise CheckpointError("the run keeps no moving average", where=out, remedy="train with --set optim.ema=0.999")

    def loaded() -> Iterator[Transducer]:
        for found in chosen:
            checkpoint.load_weights(model, found.tensors("ema" if averaged else "model"), found.path)
            yield model

    only = next(loaded()) if len(chosen) == 1 else mean(loaded())
    return only.eval(), units, config, chosen[-1].step


def chosen_checkpoints(folder: Path, which: str) -> list[checkpoint.Checkpoint]:
    """The checkpoints that `which` (see load_run) names, oldest first: one, but for average:N."""
    paths = checkpoint.checkpoints(folder)
    if not paths:
        raise CheckpointError("no checkpoint", where=folder, remedy="run `stillhouse train` first")
    name, _, count = which.partition(":")
    if name == "average" and count.isdigit() and int(count):
        if int(count) > len(paths):
            raise CheckpointError(
                f"{len(paths)} checkpoints, {count} to be averaged",
                where=folder,
                remedy=f"train with --set run.keep={count}, or average fewer",
            )
        return [checkpoint.load(path) for path in paths[-int(count) :]]
    if which == "best":
        last = checkpoint.load(paths[-1])
        best = folder / f"step-{int(last.state['best'].get('step', last.step)):08d}"
        return [checkpoint.load(best if best in paths else paths[-1])]
    if which in ("last", "raw", "ema"):
        return [checkpoint.load(paths[-1])]
    steps = {int(path.name[5:]): path for path in paths}
    if not which.isdigit() or int(which) not in steps:
        held = ", ".join(map(str, steps))
        raise CheckpointError(f"no checkpoint {which!r}", where=folder, expected=f"{WEIGHTS}; steps here: {held}")
    return [checkpoint.load(steps[int(which)])]

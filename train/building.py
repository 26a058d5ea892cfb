"""From settings and files to modules: the device, the transducer, the transfer, a trained model of a run folder.

Invariant: the transducer's first weights follow from the run's seed alone, whatever else the run has, so that runs
with and without transfer start alike. Exercised by `stillhouse train` and `stillhouse decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.errors import CheckpointError
from ..data.manifest import read_manifest
from ..data.units import load_units
from . import checkpoint
from .config import Config, load_config
from .model import Transducer


def resolve_device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


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


def load_run(out: Path, which: str = "best") -> tuple[Transducer, Any, Config, int]:
    """A trained model of a run folder: (model in eval mode, its units, config, step). `which`: best, last or a step.

    Raises CheckpointError where the run or the step is not there.
    """
    config = load_config(out / "config.toml")
    last = checkpoint.latest(out / "checkpoints")
    if last is None:
        raise CheckpointError("no checkpoint", where=out, remedy="run `stillhouse train` first")
    step = last.step
    if which == "best":
        step = int(last.state["best"].get("step", step))
    elif which != "last":
        if not which.isdigit():
            raise CheckpointError(f"no checkpoint {which!r}", where=out, expected="best, last or a step")
        step = int(which)
    path = out / "checkpoints" / f"step-{step:08d}"
    if not path.exists() and which == "best":
        path = last.path  # the best step was evaluated after the last checkpoint that was kept
    found = checkpoint.load(path)
    units = load_units(out / "units")
    model = build_model(config, units.size)
    checkpoint.load_weights(model, found.tensors("model"), path)
    return model.eval(), units, config, found.step

"""From settings and files to modules: the device, the transducer, the transfer, a trained model of a run folder.

Invariant: the transducer's first weights follow from the run's seed alone, whatever else the run has, so that runs
with and without transfer start alike. Exercised by `stillhouse train` and `stillhouse decode`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.errors import ConfigError, UsageError
from ...data.manifest import read_manifest
from ..config import Config
from .transducer import Transducer


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
    """`auto` is bfloat16 where the device multiplies it natively and no slower than float32, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    fast = device.type == "cpu" and native() and _seconds(torch.bfloat16) <= _seconds(torch.float32)
    return "bfloat16" if fast else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """What a product takes, of the sizes of a small encoder's. The processor's flags do not tell: with AMX bfloat16
    takes a quarter of float32's time, with AVX-512 alone half on some processors and twice as much on others.
    """
    x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(512, 256, dtype=dtype)
    took = []
    for _ in range(9):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, w)
        took.append(time.perf_counter() - begin)
    return min(took)


def build_model(config: Config, size: int) -> Transducer:
    """A transducer over `size` units, initialised from the run's seed whatever else the run has.

    ConfigError: it is larger than the memory.
    """
    m = config.model
    encoder = m.model_dump(
        include={"dim", "layers", "heads", "inner", "kernel", "subsampling"}
        | {"chunk_frames", "left_chunks", "chunk_choices"}
    )
    encoder["causal"] = m.causal or m.chunk_frames > 0 or bool(m.chunk_choices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        try:
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
        except (MemoryError, RuntimeError) as e:  # torch's allocator says it so
            if isinstance(e, RuntimeError) and "allocate" not in str(e):
                raise
            raise ConfigError(
                f"this machine has no room for a model of dim = {m.dim}, layers = {m.layers}, inner = {m.inner}, "
                f"predictor_dim = {m.predictor_dim}, joint_dim = {m.joint_dim} and {size} units",
                remedy="make the model smaller",
            ) from None


def build_optimiser(parameters: Iterable[Tensor], config: Config, device: torch.device) -> torch.optim.AdamW:
    """AdamW; vectors (biases, norms) are not decayed.

    On the CPU the fused kernel: one call in place of several small operators a parameter, a third of the time for a
    model of 1.7 M. CUDA's own default is as good, and keeps the step counts on the CPU.
    """
    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optim.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.optim.lr,
        betas=config.optim.betas,
        fused=True if device.type == "cpu" else None,
    )


def build_transfer(config: Config, encoder_dim: int) -> tuple[Any, Any]:
    """(distill.Transfer, distill.TargetReader), or (None, None) without views."""
    t = config.transfer
    if not t.views:
        return None, None
    from ...distill.targets import TargetReader
    from ...distill.transfer import Transfer
    from ...distill.views import resolve_views
    from ...extract.store import Store

    targets = TargetReader(
        resolve_views([Store.open(path, checksums=True) for path in t.stores], t.views),
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
            temperature=t.temperature,
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
    from ...extract.store import Store

    return Store.open(config.transfer.stores[0]).shards(ids)

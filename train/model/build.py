"""Build the transducer, the optimiser and the transfer of a recipe, and choose device and precision.

Guarantees: the transducer's first weights do not depend on the transfer, so that runs with and without it start alike.
Try: `stillhouse train CONFIG`.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Collection, Iterable, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from ...data.errors import ConfigError, UsageError
from ...data.features.settings import FrameTimes
from ...data.manifest import read_manifest
from ...extract.cpu_matmul import float32_products
from ..config import Config, in_transfer
from .adamw import CpuAdamW
from .layers import rotary
from .transducer import Encoder, Transducer

LEAST = 0.7  # times as fast as float32 an encoder in bfloat16 is for the precision auto; measurements differ by less
MOST_STATES = 4_000  # of a full batch that learn from a speech teacher, because `contrastive` compares all with all


def resolve_device(name: str, local: int | None = None) -> torch.device:
    """Return the device auto (CUDA if there is any, else the CPU), cpu, cuda or cuda:N. Raises UsageError if absent.

    If several processes train together, `local` is this one's number on its machine. It becomes the GPU's number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local is not None:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}", expected="auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name}, only {torch.cuda.device_count()} CUDA devices", remedy="choose the device cpu"
        )
    return device


def resolve_precision(name: str, device: torch.device, encoder: Encoder) -> str:
    """Return "float32" or "bfloat16". "auto" is bfloat16 where the device computes it no slower than float32.

    On a CPU, products of a usual size must be, and this encoder must not be clearly slower.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older torch
    native = device.type == "cpu" and capabilities.get("avx512_bf16", False)
    fast = native and _matmul_seconds(torch.bfloat16) <= _matmul_seconds(torch.float32)
    return "bfloat16" if fast and _times_as_fast_in_bfloat16(encoder) > LEAST else "float32"


def _matmul_seconds(dtype: torch.dtype) -> float:
    """The time of a product of a small encoder's sizes.

    The processor's flags do not tell it. With AMX, bfloat16 takes a quarter of float32's time. With AVX-512 alone it
    takes half of it on some processors and twice as much on others.
    """
    x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(512, 256, dtype=dtype)
    return min(timeit.repeat(lambda: torch.nn.functional.linear(x, w), number=1, repeat=9))


def _times_as_fast_in_bfloat16(encoder: Encoder) -> float:
    """Return the CPU time of float32 over that of bfloat16, for an encoder's front and one block, with gradients.

    Where products are fast, convolutions of some shapes may still be slow.
    """
    modules = [encoder.front, *encoder.blocks[:1]]
    parameters = [p for module in modules for p in module.parameters()]
    features = torch.ones(2, 100 * encoder.subsampling, len(encoder.feature_mean))
    lengths = torch.full((2,), features.shape[1])
    mask, bias = torch.ones(2, 100, 1), torch.zeros(2, 1, 1, 100)
    positions = rotary(100, encoder.head_dim, lengths.device)

    def step(low: bool) -> float:
        began = time.process_time()
        with (None if low else float32_products()) or torch.autocast("cpu", torch.bfloat16, enabled=low):
            x, _, _ = encoder.front(features, lengths)
            for block in modules[1:]:
                x, _ = block(x, mask, bias, positions)
        torch.autograd.grad(x.sum(), parameters)
        return time.process_time() - began

    with torch.random.fork_rng(devices=[]):
        rounds = [(step(False), step(True)) for _ in range(3)][1:]  # The first one sets things up.
    float32, bfloat16 = (min(seconds) for seconds in zip(*rounds))
    return float32 / bfloat16


def build_model(config: Config, size: int, bins: int = 80) -> Transducer:
    """Return a transducer over `size` units and features of `bins` numbers, with first weights from the run's seed."""
    m, loss = config.model, config.loss
    names = {"predictor", "predictor_dim", "predictor_context", "joint_dim", "joint", "dropout"}
    encoder, rest = m.model_dump(exclude=names), m.model_dump(include=names)
    encoder["bins"] = bins
    encoder["causal"] = m.causal or m.chunk_frames > 0 or bool(m.chunk_choices)
    rest["durations"] = loss.durations if loss.kind == "tdt" else ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        try:
            return Transducer(size, encoder, ctc=loss.ctc_weight > 0, pruned=loss.kind == "pruned", **rest)
        except (MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "allocate" not in str(e):  # torch's allocator raises RuntimeError
                raise
            raise ConfigError(
                f"this machine has too little memory for a model of dim = {m.dim}, layers = {m.layers}, "
                f"inner = {m.inner}, predictor_dim = {m.predictor_dim}, joint_dim = {m.joint_dim} and {size} units",
                remedy="choose a smaller model, for example with --set model.dim=256",
            ) from None


def build_optimiser(
    parameters: Iterable[Tensor], config: Config, device: torch.device, taken: Collection[Tensor] = ()
) -> torch.optim.AdamW | CpuAdamW:
    """Return an AdamW that does not decay vectors, which are biases and norms.

    Each of its groups has an `lr_factor`, which is init.lr_factor for the parameters that were `taken`, and else 1.
    On the CPU it is the fused kernel, which takes a third of the time for a model of 1.7 M parameters.
    One call replaces several operators for each parameter. CUDA's default is as good, and keeps step counts on the CPU.
    """
    parameters = list(parameters)
    slow = set(taken)
    groups = [
        {
            "params": [p for p in parameters if (p.dim() > 1) == matrix and (p in slow) == was_taken],
            "weight_decay": config.optim.weight_decay if matrix else 0.0,
            "lr_factor": config.init.lr_factor if was_taken else 1.0,
        }
        for matrix in (True, False)
        for was_taken in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    kind = CpuAdamW if device.type == "cpu" else torch.optim.AdamW
    return kind(groups, lr=config.optim.lr, betas=config.optim.betas)


def student_times(encoder: Encoder, times: FrameTimes) -> Any:
    """Return the distill.frames.StudentTimes of an encoder that reads features of these times."""
    from ...distill.frames import StudentTimes

    return StudentTimes(encoder.subsampling, times.hz, times.start_s, encoder.front.shift)


def build_transfers(config: Config, encoder_dim: int, student: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a distill.Transfer and a distill.TargetReader for each transfer, by its name.

    `student` is the StudentTimes of the encoder's states, whose width is `encoder_dim`.
    """
    transfers: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    if not config.transfer.transfers:
        return transfers, targets
    from ...distill.aligners import NEED_EMBEDDINGS
    from ...distill.targets import TargetReader
    from ...distill.transfer import Transfer
    from ...distill.views import resolve_views
    from ...extract.store import Store

    stores = [Store.open(path, checksums=True) for path in config.transfer.stores]
    corpus = read_manifest(config.data.corpus)
    for name, t in config.transfer.transfers.items():
        try:
            targets[name] = TargetReader(
                resolve_views(stores, t.views),
                "state" if t.aligner == "frames" else t.position,
                **t.model_dump(include={"sample", "control"}),
                on_missing=config.transfer.on_missing,
                seed=config.run.seed,
                pin=resolve_device(config.run.device).type == "cuda",
                corpus=corpus,
                codes=t.distance == "codes",
                student=student,
                share=min(t.state_share, MOST_STATES * student.rows / config.data.batch_frames),
            )
        except ConfigError as e:
            where = in_transfer("transfer", name) + (f": {e.where}" if e.where else "")
            raise ConfigError(e.what, where=where, expected=e.expected, remedy=e.remedy) from None
        with torch.random.fork_rng(devices=[]):
            # A transfer's first weights depend on its name, so those of the others change nothing.
            torch.manual_seed(config.run.seed + 1 + crc32(name.encode()))
            transfers[name] = Transfer(
                targets[name].views,
                encoder_dim,
                **t.model_dump(include={"aligner", "distance", "temperature", "mixing"}),
                embeddings=targets[name].embeddings if t.aligner in NEED_EMBEDDINGS else None,
                predictor_dim=config.model.predictor_dim,
                taps=max(1, len(t.layers)),
            )
    return transfers, targets


def store_shards(config: Config, ids: Sequence[str]) -> np.ndarray | None:
    """Return the shard of each utterance in the recipe's first store, or None without a store.

    Whether views are read does not matter, so that runs with and without transfer have the same batches.
    """
    if not config.transfer.stores:
        return None
    from ...extract.store import Store

    return Store.open(config.transfer.stores[0]).shards(ids)

"""One batch through the teacher, and its states in the dtype of the store.

Guarantees: on every device the rounding equals that of the store's numpy code (`writer.encode`, `int8.quantise`), bit
by bit.
Try: `pytest tests/extract/store/test_int8.py tests/extract/store/test_layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ...data.errors import StillhouseError, TeacherError, first_few
from ..store.disk.layout import Dtype
from ..store.format.int8 import LARGEST, Quantised
from .contexts import Window
from .exact import too_long
from .loading import first_line

T = TypeVar("T")
Norm = tuple[torch.Tensor, torch.Tensor]  # mean and std float32 [D] of a view, on the teacher's device


def encode_tensor(states: torch.Tensor, dtype: Dtype, norm: Norm | None = None) -> np.ndarray | Quantised:
    """Return states [..., D] in the stored dtype, on the host. Rounding is to nearest even. int8 needs the norm."""
    if dtype.scaled:
        assert norm is not None
        return _quantise(states.float(), *norm)
    if dtype.logical == "bfloat16":
        return states.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return states.to(getattr(torch, dtype.logical)).cpu().contiguous().numpy()


def largest_of(states: torch.Tensor) -> float:
    """Return the largest magnitude among states."""
    with torch.inference_mode():
        return float(torch.linalg.vector_norm(states, float("inf"))) if states.numel() else 0.0


def tensors(norm: tuple[np.ndarray, np.ndarray], device: str) -> Norm:
    """Return a view's mean and standard deviation as float32 tensors on a device."""
    mean, std = (torch.from_numpy(np.array(v, np.float32)).to(device) for v in norm)
    return mean, std


def _quantise(states: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> Quantised:
    """`int8.quantise` on the states' device."""
    with torch.inference_mode():
        z = (states - mean) / std
        scale = (z.abs().amax(-1) / LARGEST).to(torch.float16)
        wide = scale.float()[..., None]
        values = torch.round(z / torch.where(wide == 0, 1.0, wide)).clamp_(-LARGEST, LARGEST)
        error = z - values * wide
        loss = torch.stack([v.square().sum(-1) for v in (error * std, states, error, z)], dim=-1)
        whole = torch.nan_to_num(values).to(torch.int8)
        return Quantised(whole.cpu().contiguous().numpy(), scale.cpu().numpy(), loss.cpu().numpy())


def forward(
    teacher: Any,
    batch: list[Window],
    layers: Sequence[int],
    keep: Callable[[dict[int, torch.Tensor]], T],
    where: object,
    ids: Sequence[str] = (),
) -> Iterator[tuple[list[Window], T]]:
    """Yield (batch, result of `keep`), or its halves one after the other if the device's memory is full.

    `keep` takes the states {layer: [B, T, D]} on the device. `ids` are the names of the utterances, for an error.
    Raises StoreError if one window does not fit, and TeacherError if the model fails.
    """
    try:
        kept = keep(_states(teacher, batch, layers, where, ids))
    except torch.cuda.OutOfMemoryError as e:
        if len(batch) == 1:
            raise too_long(batch[0].size, where) from e
        torch.cuda.empty_cache()
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            yield from forward(teacher, part, layers, keep, where, ids)
    else:
        yield batch, kept


def _states(
    teacher: Any, batch: list[Window], layers: Sequence[int], where: object, ids: Sequence[str]
) -> dict[int, torch.Tensor]:
    """The states of a batch, with an error that says what the model could not run."""
    try:
        return teacher.states(batch, layers)
    except (StillhouseError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as e:
        numbers = sorted({k.utterance for w in batch for k in w.kept})
        named = f" with {first_few([ids[u] for u in numbers])}" if ids and numbers else ""
        longest = max(w.size for w in batch)
        raise TeacherError(
            f"the model {teacher.source} fails at a batch of {len(batch)}, longest {longest} tokens{named}: "
            f"{first_line(e)}",
            where=where,
            remedy=f"leave these utterances out of the corpus, or begin another store with --window below {longest}. "
            "What is committed stays",
        ) from e

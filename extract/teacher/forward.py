"""One batch through the teacher, and its states in the dtype of the store.

Guarantees: on every device the rounding equals that of the store's numpy code (`writer.encode`, `int8.quantise`), bit
by bit. The codes of pq equal `pq.encode_pq`, on a GPU except where two vectors are equally near but for rounding.
Try: `pytest tests/extract/store/test_int8.py tests/extract/store/test_layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ...data.errors import StillhouseError, TeacherError, first_few
from ..store.disk.layout import Dtype
from ..store.format.int8 import LARGEST
from ..store.format.pq import encode_pq
from ..store.format.quantised import Quantised
from .contexts import Window
from .exact import too_long
from .loading import first_line

T = TypeVar("T")
DISTANCES = 1 << 27  # at a time, float32 in the memory of a GPU
# mean and std float32 [D] of a view, and for pq its codebooks float32 [M, 256, D/M], on the teacher's device
Norm = tuple[torch.Tensor, ...]


def encode_tensor(states: torch.Tensor, dtype: Dtype, norm: Norm | None = None) -> np.ndarray | Quantised:
    """Return states [..., D] in the stored dtype, on the host, rounded to nearest even. int8 and pq need the norm."""
    if dtype.quantised:
        assert norm is not None
        return (_encode_pq if dtype.codes else _quantise)(states.float(), *norm)
    if dtype.logical == "bfloat16":
        return states.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return states.to(getattr(torch, dtype.logical)).cpu().contiguous().numpy()


def largest_of(states: torch.Tensor) -> float:
    """Return the largest magnitude among states."""
    if not states.numel():
        return 0.0
    with torch.inference_mode():
        least, most = torch.aminmax(states)  # A CPU takes twenty times as long for the norm of the same name.
        return float(torch.maximum(-least, most))


def tensors(norm: tuple[np.ndarray, ...], device: str) -> Norm:
    """Return the norms of a view as float32 tensors on a device."""
    return tuple(torch.from_numpy(np.array(v, np.float32)).to(device) for v in norm)


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


def _encode_pq(states: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, book: torch.Tensor) -> Quantised:
    """`pq.encode_pq` on the states' device."""
    if states.device.type == "cpu":
        return encode_pq(*(v.detach().contiguous().numpy() for v in (states, mean, std, book)))
    return encode_by_products(states, mean, std, book)


def encode_by_products(states: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, book: torch.Tensor) -> Quantised:
    """`pq.encode_pq` as matrix products, which a GPU computes faster than it could run that loop."""
    with torch.inference_mode():
        codes, _, width = book.shape
        z = ((states - mean) / std).reshape(-1, codes, width)
        half, last = book.square().sum(-1)[:, None] / 2, book.transpose(1, 2)
        numbers, error = [], []
        parts = torch.arange(codes, device=book.device)
        for part in z.split(max(1, DISTANCES // (codes * book.shape[1]))):
            number = torch.baddbmm(half, part.transpose(0, 1), last, alpha=-1).argmin(-1).t()  # [n, M]
            numbers.append(number.to(torch.uint8))
            error.append(part - book[parts, number])
        whole = torch.cat(error).reshape(states.shape)
        squares = (whole * std, states, whole, z.reshape(states.shape))
        loss = torch.stack([v.square().sum(-1) for v in squares], dim=-1)
        found = torch.cat(numbers).reshape(*states.shape[:-1], codes)
        return Quantised(found.cpu().numpy(), None, loss.cpu().numpy())


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

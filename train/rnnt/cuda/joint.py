"""The fused joint on CUDA: tiles of logits by torch's matrix products (cuBLAS), read by the kernels of the plain loss.

A tile is a run of frames of one utterance with all its units. torch makes it, the kernels read it, the gradient kernel
writes over it, and torch multiplies it back. eps sets rows to zero but skips no products, because their number would
have to come from the device.
Guarantees: no call waits for the device. No GPU has run this yet.
Try: `pytest tests/train/rnnt/test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..autograd import joint_inputs
from ..checks import DTYPES, LossBatch, Options
from .launch import (
    Integers,
    Launcher,
    RowTile,
    device_batch,
    kept_arrays,
    stage_gradient,
    stage_lattice,
    stage_rows,
    unpack_occupancy,
)

TILE_ELEMENTS = 1 << 24  # logits of a tile: large enough to fill a GPU, small beside its memory


class CudaJointLoss:
    """The loss from encoder and predictor on. Only sizes and device of encoder and weight matter here."""

    inplace = False

    def __init__(
        self, encoder: Tensor, weight: Tensor, batch: Integers, blank: int, padded: tuple[int, int],
        band: Tensor | np.ndarray | None, options: Options, want_occupancy: bool,
    ) -> None:  # fmt: skip
        self.d = device_batch(batch, blank, weight.shape[0], 0, padded, encoder.device, band)
        self.options, self.pruned = options, band is not None
        self.longest = batch.T.tolist() if isinstance(batch, LossBatch) else None  # frames, if the host knows them
        self.frames = padded[0] if want_occupancy else None

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        d, o, (e, p, w, c) = self.d, self.options, self._inputs(*inputs)
        launch, self.kept = Launcher(w.t()), kept_arrays(d, e.dtype)
        with torch.autocast(e.device.type, enabled=False):
            for tile in self._tiles(w.shape[0]):
                hidden, *_ = self._hidden(e, p, tile)
                stage_rows(launch, torch.addmm(c, hidden, w.t()), d, o, self.kept, tile)
        costs = stage_lattice(launch, d, self.kept)
        return costs.to(self.kept[0].dtype), unpack_occupancy(launch, d, self.kept[2], self.frames)

    def backward(self, grad_costs: Tensor, *inputs: Any) -> Sequence[Tensor]:
        d, o, (e, p, w, c), wide = self.d, self.options, self._inputs(*inputs), self.kept[0].dtype
        launch, scale = Launcher(w.t()), grad_costs.to(wide).contiguous()
        grad_e, grad_p, grad_w, grad_c = (torch.zeros_like(v, dtype=wide) for v in (e, p, w, c))
        with torch.autocast(e.device.type, enabled=False):
            for tile in self._tiles(w.shape[0]):
                b, t0, t1 = tile
                hidden, states, units = self._hidden(e, p, tile)
                logits = torch.addmm(c, hidden, w.t())
                stage_gradient(launch, logits, logits, d, o, self.kept, scale, tile)
                grad_w += logits.t() @ hidden
                grad_c += logits.sum(0, dtype=wide)
                back = (logits @ w).to(wide)
                back = back * (hidden > 0) if o.relu else back * (1 - hidden.to(wide).square())
                back = back.view(t1 - t0, d.width, -1)
                to_e = back * states.to(wide) if o.multiply else back
                to_p = back * e[b, t0:t1, None].to(wide) if o.multiply else back
                grad_e[b, t0:t1] = to_e.sum(1)
                if units is None:
                    grad_p[b] += to_p.sum(0)
                else:
                    grad_p[b].index_add_(0, units.reshape(-1), to_p.reshape(-1, to_p.shape[2]))
        return [grad_e, grad_p, grad_w, grad_c]

    def _inputs(self, encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Return `joint_inputs` with zeros in the padding: NaN there would reach the gradient as 0 * NaN."""
        inside_t = torch.arange(encoder.shape[1], device=encoder.device) < self.d.T[:, None]
        inside_u = torch.arange(predictor.shape[1], device=encoder.device) <= self.d.U[:, None]
        encoder = torch.where(inside_t[:, :, None], encoder, 0)
        predictor = torch.where(inside_u[:, :, None], predictor, 0)
        kind = encoder.dtype if encoder.dtype in DTYPES else torch.float32
        return joint_inputs(kind, encoder, predictor, weight, bias)

    def _tiles(self, vocabulary: int) -> Iterator[RowTile]:
        step = max(1, TILE_ELEMENTS // max(1, vocabulary * self.d.width))
        for b in range(self.d.T.shape[0]):
            frames = self.d.frames if self.longest is None else self.longest[b]
            for t0 in range(0, frames, step):
                yield RowTile(b, t0, min(t0 + step, frames))

    def _hidden(self, e: Tensor, p: Tensor, tile: RowTile) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden rows [R, H], predictor states and, of a band, the units [frames, width] of the tile's rows."""
        b, t0, t1 = tile
        states, units = p[b], None
        if self.pruned:
            units = self.d.band[b, t0:t1, None] + torch.arange(self.d.width, device=p.device)
            units = units.clamp(max=p.shape[1] - 1)
            states = states[units]
        pre = e[b, t0:t1, None] * states if self.options.multiply else e[b, t0:t1, None] + states
        return (torch.relu_(pre) if self.options.relu else torch.tanh_(pre)).view(-1, e.shape[2]), states, units

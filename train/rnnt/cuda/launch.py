"""The losses of given logits on CUDA: kernels launched on torch's current stream.

torch computes on the device what the kernels need to know of a batch. Lengths and targets on the CPU are checked there
and copied once. Those on the device are clamped, and checked only with check=True, which waits for the host. In numba's
simulator the same code takes CPU tensors.
Guarantees: no call here reads a value back from the device. No GPU has run this yet.
Try: `pytest tests/train/rnnt/test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import LossBatch, Options

Integers = LossBatch | tuple[Tensor, Tensor, Tensor]  # checked, or targets and lengths on the device


@dataclass(frozen=True)
class DeviceBatch:
    """The batch's integers on the device, int64: y [B, Umax], T, U, first, per_frame, cells [B], band [B, Tmax]."""

    y: Tensor
    T: Tensor
    U: Tensor
    first: Tensor
    per_frame: Tensor
    cells: Tensor
    band: Tensor
    frames: int  # frames that the logits have
    width: int  # most rows of a frame
    packed: bool
    total: int  # cells of all lattices, or more
    blank: int


def device_batch(
    batch: Integers, blank: int, vocabulary: int, rows: int, padded: tuple[int, int] | None, device: torch.device,
    band: Tensor | np.ndarray | None = None,
) -> DeviceBatch:  # fmt: skip
    """Return the batch on the device. Indices are clamped, so no kernel leaves an array, whatever they hold.

    `padded` is (Tmax, rows of a frame) of the logits. If it is None, they are packed in `rows` rows, and the device
    sums up their offsets. `band` int [B, Tmax] is the first unit of each frame that has a row, 0 if it is None.
    """
    y, T, U = (torch.from_numpy(v) for v in (batch.y, batch.T, batch.U)) if isinstance(batch, LossBatch) else batch
    B, Umax = y.shape
    if T.device.type == "cpu" and device.type != "cpu":  # One copy from pinned memory, which nothing waits for.
        flat = torch.cat([y.reshape(-1), T, U]).pin_memory().to(device, non_blocking=True)
        y, T, U = flat[: B * Umax].view(B, Umax), flat[B * Umax : B * Umax + B], flat[B * Umax + B :]
    y, T, U = (v.to(device, torch.int64) for v in (y, T, U))
    y = y.clamp(0, vocabulary - 1).contiguous()
    if padded is not None:
        frames, width = padded
        T, U = T.clamp(1, frames), U.clamp(0, Umax if band is not None else min(Umax, width - 1))
        numbers = torch.arange(B, device=device)
        first = numbers * (frames * width)
        per_frame = torch.full_like(T, width)
        cells = numbers * (frames * (Umax + 1))
        total = B * frames * (Umax + 1)
    else:
        T, U = T.clamp(min=1), U.clamp(0, Umax)
        counts = T * (U + 1)
        first = counts.cumsum(0) - counts
        per_frame, cells = U + 1, first
        frames, width, total = rows, Umax + 1, rows
    if band is None:
        # It is read as band[b, t] with t < T. Expanded, it costs nothing.
        band = torch.zeros(1, 1, dtype=torch.int64, device=device).expand(B, frames)
    elif isinstance(band, np.ndarray):
        band = torch.from_numpy(band).to(device, non_blocking=True)
    return DeviceBatch(
        y, T.contiguous(), U.contiguous(), first, per_frame, cells, band, frames, width, padded is None, total,
        blank % vocabulary,
    )  # fmt: skip


def _array(tensor: Tensor) -> Any:
    """Return a tensor as the kernels take it, without a copy. bfloat16 becomes int16.

    The tensor keeps its array, because numba needs longer to make one than torch to launch a kernel, and the kernels of
    a loss share most of their arrays.
    """
    array = getattr(tensor, "_stillhouse_array", None)
    if array is not None:
        return array
    plain = tensor.detach()
    if plain.dtype == torch.bfloat16:
        plain = plain.view(torch.int16)
    if plain.device.type == "cpu":  # in the simulator
        return plain.numpy()
    from numba import cuda

    array = tensor._stillhouse_array = cuda.as_cuda_array(plain, sync=False)  # type: ignore[attr-defined]
    return array


@lru_cache(maxsize=64)
def _stream(index: int, handle: int) -> Any:
    """Return one object for a stream of torch's: by it numba finds launches again that it has configured."""
    from numba import cuda

    with cuda.gpus[index]:
        return cuda.external_stream(handle)


def _configured(kernel: Any, grid: tuple[int, int], block: Any, stream: Any) -> Any:
    """Return the configured kernel, without numba's warning of small grids, which is for those who choose them."""
    from numba.cuda import dispatcher

    config: Any = dispatcher.config
    warns = getattr(config, "CUDA_LOW_OCCUPANCY_WARNINGS", 0)
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    try:
        return kernel[grid, block, stream]
    finally:
        config.CUDA_LOW_OCCUPANCY_WARNINGS = warns


class Launcher:
    """The kernels for a tensor [..., V] of logits, on its device and torch's current stream."""

    def __init__(self, tensor: Tensor) -> None:
        from numba import cuda

        from .cells import SIMULATED
        from .kernels import kernels

        self.kernels = kernels(str(tensor.dtype).removeprefix("torch."))
        self.lanes, self.at_once, self.threads, self.spread = (4, 2, 8, 2) if SIMULATED else (32, 8, 128, 512)
        if tensor.shape[-1] >= 4096 and not SIMULATED:
            self.lanes, self.at_once = 128, 2
        if SIMULATED:
            self.guard: Any = nullcontext
            self.configured: Any = lambda kernel, grid, block: kernel[grid, block]
        else:
            index = tensor.device.index
            stream = _stream(index, torch.cuda.current_stream(tensor.device).cuda_stream)
            self.guard = lambda: cuda.gpus[index]
            self.configured = lambda kernel, grid, block: _configured(kernel, grid, block, stream)

    def __call__(self, name: str, grid: tuple[int, int], block: Any, *args: Any) -> None:
        if grid[0] > 0:
            with self.guard():
                values = [_array(a) if isinstance(a, Tensor) else a for a in args]
                self.configured(getattr(self.kernels, name), grid, block)(*values)


class RowTile(NamedTuple):
    """The rows of frames t0..t1 of utterance b, which are all that a matrix of logits holds."""

    b: int
    t0: int
    t1: int


def _row_grid(launch: Launcher, d: DeviceBatch, tile: RowTile | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return grid and block of a kernel over rows: enough blocks to fill a device, no more than there are rows."""
    rows = d.frames * d.width if d.total else 1
    blocks = max(1, min(launch.spread, -(-rows // launch.at_once)))
    return (1 if tile else d.T.shape[0], blocks), (launch.lanes, launch.at_once)


def _where(d: DeviceBatch, tile: RowTile | None, last: int) -> tuple:
    """Return the arguments of a kernel over rows that locate these. Without a tile, frames end at `last`."""
    first = torch.full_like(d.first, -tile.t0 * d.width) if tile else d.first
    return d.y, d.T, d.U, first, d.per_frame, d.band, d.cells, *(tile or (0, 0, last))


def stage_rows(launch: Launcher, x, d: DeviceBatch, o: Options, kept, tile: RowTile | None = None) -> None:
    """Run stage 1: logsumexp, blank and label log-probability of the rows x go into `kept`."""
    launch("rows", *_row_grid(launch, d, tile), x, *_where(d, tile, d.frames), *kept, d.blank, o.delay, o.fused)


def stage_lattice(launch: Launcher, d: DeviceBatch, kept) -> Tensor:
    """Run stage 2: return costs float64 [B]. The two log-probabilities in `kept` become occupancies."""
    _, blank_lp, label_lp = kept
    B = d.T.shape[0]
    alpha, beta = torch.empty(2, d.total, dtype=torch.float64, device=d.T.device)
    costs = torch.zeros(B, dtype=torch.float64, device=d.T.device)
    launch("wavefront", (B, 2), launch.threads, d.T, d.U, d.cells, blank_lp, label_lp, alpha, beta)
    launch("occupancies", (B, launch.spread), launch.threads, d.T, d.U, d.cells, blank_lp, label_lp, alpha, beta, costs)
    return costs


def stage_gradient(
    launch: Launcher, x, out, d: DeviceBatch, o: Options, kept, scale, tile: RowTile | None = None
) -> None:
    """Run stage 3: the gradient of the rows x goes into `out`, which may be x."""
    launch(
        "gradient", *_row_grid(launch, d, tile), x, out, *_where(d, tile, -1 if d.packed else d.frames), *kept, scale,
        d.blank, o.clamp, o.fused, o.fastemit, o.eps,
    )  # fmt: skip


def unpack_occupancy(launch: Launcher, d: DeviceBatch, label: Tensor, frames: int | None) -> Tensor | None:
    """Return the label occupancies [B, Umax, frames], or None if frames is None."""
    if frames is None:
        return None
    out = torch.zeros(d.y.shape[0], d.y.shape[1], frames, device=label.device)
    launch("unpack", (d.y.shape[0], launch.spread), launch.threads, d.T, d.U, d.cells, label, out)
    return out


def kept_arrays(d: DeviceBatch, dtype: torch.dtype) -> list[Tensor]:
    """Return lse, blank and label of each cell. Arcs start closed, for cells outside a band."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.full((d.total,), value, dtype=kind, device=d.T.device) for value in (0.0, -1e30, -1e30)]


class CudaLoss:
    """The loss of given logits, of which only size, type and device matter here. See `device_batch`."""

    def __init__(
        self, logits: Tensor, batch: Integers, blank: int, padded: tuple[int, int] | None,
        band: Tensor | np.ndarray | None, options: Options, want_occupancy: bool,
    ) -> None:  # fmt: skip
        V = logits.shape[-1]
        self.d = device_batch(batch, blank, V, logits.numel() // V, padded, logits.device, band)
        self.options, self.inplace, self.frames = options, options.inplace, None
        if want_occupancy and padded is not None:
            self.frames = padded[0]
        elif want_occupancy and isinstance(batch, LossBatch):
            self.frames = int(batch.T.max(initial=0))
        elif want_occupancy:
            raise ValueError("rnnt loss: occupancies of packed logits need the lengths on the CPU.")

    def forward(self, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor | None]:
        launch = Launcher(logits)
        self.kept = kept_arrays(self.d, logits.dtype)
        stage_rows(launch, logits.detach().view(-1, logits.shape[-1]), self.d, self.options, self.kept)
        costs = self.lattice(launch, *rest)
        occupancy = unpack_occupancy(launch, self.d, self.kept[2], self.frames)
        return costs.to(self.kept[0].dtype), occupancy

    def lattice(self, launch: Launcher, *rest: Tensor) -> Tensor:
        return stage_lattice(launch, self.d, self.kept)

    def backward(self, grad_costs: Tensor, logits: Tensor, *_: Tensor) -> Sequence[Tensor]:
        gradient = logits.detach() if self.inplace else torch.empty_like(logits)
        V, scale = logits.shape[-1], grad_costs.to(self.kept[0].dtype).contiguous()
        x, out = logits.view(-1, V), gradient.view(-1, V)
        stage_gradient(Launcher(logits), x, out, self.d, self.options, self.kept, scale)
        return [gradient]


class CudaTdtLoss(CudaLoss):
    """The token-and-duration loss of token and duration logits."""

    def lattice(self, launch: Launcher, *rest: Tensor) -> Tensor:
        d, o, (duration_logits,) = self.d, self.options, rest
        (_, blank_lp, label_lp), device = self.kept, duration_logits.device
        B, D = d.T.shape[0], duration_logits.shape[-1]
        self.dur = torch.empty(D, d.total, dtype=blank_lp.dtype, device=device)
        grid, z = (B, launch.spread), duration_logits.view(-1, D)
        launch("durations_in", grid, launch.threads, z, d.T, d.U, d.first, d.per_frame, d.cells, self.dur, o.sigma)
        alpha, beta = torch.empty(2, d.total, dtype=torch.float64, device=device)
        costs = torch.zeros(B, dtype=torch.float64, device=device)
        steps = torch.tensor(o.durations).to(device, non_blocking=True)
        arcs = (d.T, d.U, d.cells, blank_lp, label_lp, self.dur, steps, alpha, beta)
        launch("tdt_wavefront", (B, 2), launch.threads, *arcs)
        launch("tdt_occupancies", grid, launch.threads, *arcs, costs, o.fastemit)
        return costs

    def backward(self, grad_costs: Tensor, logits: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        d, (duration_logits,), launch = self.d, rest, Launcher(logits)
        gradient, D = torch.zeros_like(duration_logits), duration_logits.shape[-1]
        launch(
            "durations_out", (d.T.shape[0], launch.spread), launch.threads, duration_logits.view(-1, D),
            gradient.view(-1, D), d.T, d.U, d.first, d.per_frame, d.cells, self.dur,
            grad_costs.to(self.kept[0].dtype).contiguous(),
        )  # fmt: skip
        return [*super().backward(grad_costs, logits), gradient]

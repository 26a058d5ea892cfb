"""The CUDA path: launches of the kernels on torch's current stream, bound to autograd.

Everything about the batch that kernels need is computed by torch on the device, so that nothing waits for the host:
lengths and targets given on the CPU are checked there and copied once, those given on the device are clamped, and
checked only when asked (check=True waits for the host). In numba's simulator the same code takes CPU tensors.
Invariant: no call here reads a value back from the device, but for check=True.
No GPU has run this yet. Run: pytest tests/train/rnnt/test_cuda.py
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..checks import LossBatch
from ..loss import Options


@dataclass(frozen=True)
class DeviceBatch:
    """The batch's integers on the device, int64: y [B, Umax], T, U, first, per_frame, cells [B], band [B, Tmax]."""

    y: torch.Tensor
    T: torch.Tensor
    U: torch.Tensor
    first: torch.Tensor
    per_frame: torch.Tensor
    cells: torch.Tensor
    band: torch.Tensor
    frames: int  # frames that the layout has room for
    width: int  # most rows of a frame
    packed: bool
    total: int  # cells of all lattices, or more
    blank: int


def device_batch(
    integers: tuple[torch.Tensor, ...], blank: int, vocabulary: int, rows: int,
    padded: tuple[int, int] | None, device: torch.device, band: torch.Tensor | None = None,
) -> DeviceBatch:  # fmt: skip
    """The batch on the device; indices are clamped so that no kernel leaves an array, whatever they hold.

    integers: targets [B, Umax], frames [B], units [B]. rows: of the logits; a packed batch's offsets are sums that
    the device takes.
    """
    y, T, U = integers
    B, Umax = y.shape
    if T.device.type == "cpu" and device.type != "cpu":  # one copy from pinned memory, which nobody waits for
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
        # read as band[b, t] with t < T: expanded, so that it costs nothing
        band = torch.zeros(1, 1, dtype=torch.int64, device=device).expand(B, frames)
    return DeviceBatch(
        y, T.contiguous(), U.contiguous(), first, per_frame, cells, band, frames, width, padded is None, total, blank,
    )  # fmt: skip


def _array(tensor: torch.Tensor) -> Any:
    """A tensor as the kernels take it: no copy; bfloat16 as int16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    if tensor.device.type == "cpu":  # the simulator
        return tensor.numpy()
    from numba import cuda

    return cuda.as_cuda_array(tensor, sync=False)


class _Launch:
    """Kernels of one dtype on a tensor's device and torch's current stream."""

    def __init__(self, tensor: torch.Tensor) -> None:
        from numba import cuda

        from .cells import SIMULATED
        from .kernels import kernels

        self.kernels = kernels(str(tensor.dtype).removeprefix("torch."))
        self.simulated = SIMULATED
        self.lanes, self.at_once, self.threads, self.spread = (4, 2, 8, 2) if SIMULATED else (32, 8, 128, 512)
        if tensor.shape[-1] >= 4096 and not SIMULATED:
            self.lanes, self.at_once = 128, 2
        if SIMULATED:
            self.stream: Any = 0
            self.guard: Any = nullcontext
        else:
            index = tensor.device.index
            self.stream = cuda.external_stream(torch.cuda.current_stream(tensor.device).cuda_stream)
            self.guard = lambda: cuda.gpus[index]

    def __call__(self, name: str, grid: tuple[int, int], block: Any, *args: Any) -> None:
        values = [_array(a) if isinstance(a, torch.Tensor) else a for a in args]
        if grid[0] > 0:
            with self.guard():
                getattr(self.kernels, name)[grid, block, self.stream](*values)


def _counts(d: DeviceBatch, launch: _Launch) -> int:
    """Blocks that share an utterance's rows: enough to fill a device, no more than there are."""
    rows = d.frames * d.width if d.total else 1
    return max(1, min(launch.spread, -(-rows // launch.at_once)))


def stage_rows(launch, x, d: DeviceBatch, o: Options, kept, b0=0, count=None, t0=0, t1=None, first=None) -> None:
    launch(
        "rows", (d.T.shape[0] if count is None else count, _counts(d, launch)), (launch.lanes, launch.at_once),
        x, d.y, d.T, d.U, d.first if first is None else first, d.per_frame, d.band, d.cells, b0, t0,
        d.frames if t1 is None else t1, *kept, d.blank, float(o.delay), o.fused,
    )  # fmt: skip


def stage_lattice(launch, d: DeviceBatch, kept) -> torch.Tensor:
    """kept's two log-probabilities become occupancies; returns float64 costs [B]."""
    _, blank_lp, label_lp = kept
    B = d.T.shape[0]
    alpha, beta = torch.empty(2, d.total, dtype=torch.float64, device=d.T.device)
    costs = torch.zeros(B, dtype=torch.float64, device=d.T.device)
    launch("wavefront", (B, 2), launch.threads, d.T, d.U, d.cells, blank_lp, label_lp, alpha, beta)
    launch("occupancies", (B, launch.spread), launch.threads, d.T, d.U, d.cells, blank_lp, label_lp, alpha, beta, costs)
    return costs


def stage_gradient(
    launch, x, out, d: DeviceBatch, o: Options, kept, scale, b0=0, count=None, t0=0, t1=None, first=None
) -> None:
    launch(
        "gradient", (d.T.shape[0] if count is None else count, _counts(d, launch)), (launch.lanes, launch.at_once),
        x, out, d.y, d.T, d.U, d.first if first is None else first, d.per_frame, d.band, d.cells, b0, t0,
        (-1 if d.packed else d.frames) if t1 is None else t1, *kept, scale, d.blank, float(o.clamp), o.fused,
        float(o.fastemit),
        float(o.eps),
    )  # fmt: skip


def unpack_occupancy(launch, d: DeviceBatch, label: torch.Tensor, frames: int) -> torch.Tensor:
    out = torch.zeros(d.y.shape[0], d.y.shape[1], frames, device=label.device)
    launch("unpack", (d.y.shape[0], launch.spread), launch.threads, d.T, d.U, d.cells, label, out)
    return out


def kept_arrays(d: DeviceBatch, dtype: torch.dtype) -> list[torch.Tensor]:
    """lse, blank and label log-probabilities of every cell; arcs start closed, for cells outside a band."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.full((d.total,), value, dtype=kind, device=d.T.device) for value in (0.0, -1e30, -1e30)]


class CudaLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, d: DeviceBatch, options: Options, occupancy_frames: int | None):
        launch = _Launch(logits)
        x = logits.detach().view(-1, logits.shape[-1])
        kept = kept_arrays(d, logits.dtype)
        stage_rows(launch, x, d, options, kept)
        costs = stage_lattice(launch, d, kept)
        ctx.save_for_backward(logits)
        ctx.state = (d, options, kept)
        occupancy = None
        if occupancy_frames is not None:
            occupancy = unpack_occupancy(launch, d, kept[2], occupancy_frames)
            ctx.mark_non_differentiable(occupancy)
        return costs.to(kept[0].dtype), occupancy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_costs, _):
        if ctx.state is None:
            raise RuntimeError(
                "rnnt loss: second backward of a loss in place: the first wrote the gradient over the logits; "
                "use inplace=False to keep them"
            )
        d, options, kept = ctx.state
        (logits,) = ctx.saved_tensors
        if options.inplace:
            ctx.state = None
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        else:
            gradient = torch.empty_like(logits)
        V = logits.shape[-1]
        scale = grad_costs.detach().to(kept[0].dtype).contiguous()
        stage_gradient(_Launch(logits), logits.view(-1, V), gradient.view(-1, V), d, options, kept, scale)
        return gradient, None, None, None


def rnnt_loss_cuda(
    logits: torch.Tensor, batch: LossBatch | tuple[torch.Tensor, ...], blank: int, padded: tuple[int, int] | None,
    options: Options, band: torch.Tensor | None, want_occupancy: bool,
) -> Any:  # fmt: skip
    """(costs [B], occupancy or None). batch: checked integers of the CPU, or targets and lengths on the device."""
    if isinstance(batch, LossBatch):
        integers = tuple(torch.from_numpy(v) for v in (batch.y, batch.T, batch.U))
        longest = int(batch.T.max(initial=0))
    else:
        integers, longest = batch, logits.shape[0]
    V = logits.shape[-1]
    rows = logits.numel() // V
    d = device_batch(integers, blank % V, V, rows, padded, logits.device, band)
    frames = padded[0] if padded is not None else longest
    if want_occupancy and padded is None and not isinstance(batch, LossBatch):
        raise ValueError("rnnt loss: occupancies of packed logits need the lengths on the CPU")
    return CudaLoss.apply(logits, d, options, frames if want_occupancy else None)

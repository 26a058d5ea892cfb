"""Values and gradients of the kernels on the device, against those of the CPU.

In a rehearsal the kernels run in numba's simulator, reached through the same functions.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from context import Context
from runner import Row, Rows, Unable
from torch import Tensor

from stillhouse.train.rnnt import prune_ranges, rnnt_loss, rnnt_loss_joint, rnnt_loss_simple, tdt_loss
from stillhouse.train.rnnt.checks import Options

# Of gradients: a unit in the last place of the type near 1, some times. Costs are float32 on either side.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Loss = Callable[..., Tensor]
EXCLUSIVE = "nvidia-smi -q -d COMPUTE must show the compute mode Default: other modes allow one process"
ADVICE = {"two processes on one device, gloo": EXCLUSIVE, "one process, NCCL": EXCLUSIVE}


class Simulated:
    """Stands for a loss of the CPU, and runs the kernels for CUDA on its tensors, in the simulator."""

    def __init__(self, make: Callable[..., Any], batch: Any, padded: Any, band: Any, *rest: Any) -> None:
        at = next(i for i, value in enumerate(rest) if isinstance(value, Options))
        width, (self.options, self.occupancy, *_) = rest[:at], rest[at:]
        self.make, self.batch, self.band, self.inplace = make, batch, band, self.options.inplace
        self.padded = (padded[0], width[0]) if width and band is not None else padded

    def forward(self, first: Tensor, *rest: Any) -> Any:
        given = (first, rest[1]) if self.make.__name__ == "CudaJointLoss" else (first,)
        parts = self.batch, self.batch.blank, self.padded, self.band, self.options, self.occupancy
        self.loss = self.make(*given, *parts)
        return self.loss.forward(first, *rest)

    def backward(self, *values: Any) -> Any:
        return self.loss.backward(*values)


@contextmanager
def simulated() -> Iterator[None]:
    """Inside this context, losses of CPU tensors run the kernels for CUDA in the simulator."""
    from stillhouse.train.rnnt.cuda.joint import CudaJointLoss
    from stillhouse.train.rnnt.cuda.launch import CudaLoss, CudaTdtLoss

    where = "stillhouse.train.rnnt.cpu"
    with (
        mock.patch(f"{where}.launch.CpuLoss", partial(Simulated, CudaLoss)),
        mock.patch(f"{where}.launch.CpuTdtLoss", partial(Simulated, CudaTdtLoss)),
        mock.patch(f"{where}.joint.CpuJointLoss", partial(Simulated, CudaJointLoss)),
    ):
        yield


def through_kernels(c: Context) -> Any:
    return simulated() if c.small else nullcontext()


def sample(c: Context, B: int = 3, T: int = 50, U: int = 20, V: int = 40, seed: int = 0):
    """Return logits and integers of a ragged batch, on the CPU. A rehearsal has short lattices."""
    if c.small:
        T, U, V = min(T, 5), min(U, 3), min(V, 7)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, U + 1, V, generator=g, dtype=torch.float64)
    y = torch.randint(1, V, (B, U), generator=g)
    lengths, units = torch.full((B,), T), torch.full((B,), U)
    lengths[1:], units[:-1] = max(1, T * 2 // 3), U // 2
    return x, y, lengths, units


def joint_parts(x: Tensor, H: int = 24) -> list[Tensor]:
    B, T, U1, V = x.shape
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((B, T, H), (B, U1, H), (V, H), (V,))]


def outcome(loss: Loss, parts: list[Tensor], device: str, kind: torch.dtype) -> list[Tensor]:
    """Return costs and gradients of `parts` on a device, with another weight for each cost, as float64 on the CPU."""
    own = [p.to(device, kind, copy=True).requires_grad_() for p in parts]
    costs = loss(*own)
    costs.backward(torch.linspace(-1, 2, len(costs), device=costs.device, dtype=costs.dtype))
    return [v.detach().double().cpu() for v in (costs, *(p.grad for p in own if p.grad is not None))]


def same(found: list[Tensor], expected: list[Tensor], kind: torch.dtype, rounded: bool = False) -> Row:
    """Compare costs and gradients. `rounded`: the logits themselves are rounded to the type, on the device only."""
    rtol, atol = (1e-2, 1e-2) if rounded else (1e-4, TOLERANCE[kind])
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=1e-3, equal_nan=True)
    worst = 0.0
    for a, b in zip(found[1:], expected[1:], strict=True):
        scale = max(1.0, float(b.nan_to_num().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=atol, equal_nan=True)
        worst = max(worst, float((a / scale - b / scale).nan_to_num().abs().max())) if b.numel() else worst
    return Row(note=f"largest difference of a gradient {worst:.1e}")


def agrees(c: Context, loss: Loss, parts: list[Tensor], kind: torch.dtype, rounded: bool = False) -> Row:
    expected = outcome(loss, parts, "cpu", kind)
    with through_kernels(c):
        return same(outcome(loss, parts, c.device, kind), expected, kind, rounded)


def plain(c: Context, kind: torch.dtype, options: dict[str, Any], **sizes: int) -> Row:
    """Compare the loss of given logits."""
    x, y, T, U = sample(c, **sizes)
    if options.get("fused_log_softmax") is False:
        x = x.log_softmax(-1)
    if options.get("layout") == "packed":
        x = torch.cat([x[b, :t, : u + 1].reshape(-1, x.shape[3]) for b, (t, u) in enumerate(zip(T, U, strict=True))])

    def loss(z: Tensor) -> Tensor:
        return rnnt_loss(z, y, T, U, blank=0, reduction="none", **options)

    return agrees(c, loss, [x], kind)


def occupancies(c: Context) -> None:
    x, y, T, U = sample(c)
    x = x.float()
    _, expected = rnnt_loss(x, y, T, U, blank=0, return_occupancy=True)
    with through_kernels(c):
        _, found = rnnt_loss(x.to(c.device), y, T, U, blank=0, return_occupancy=True)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


def band(T: Tensor, U: Tensor, frames: int, width: int) -> Tensor:
    """Return ranges [B, frames, width] that go from unit 0 to the last one."""
    t = torch.arange(frames)
    first = (t[None] * (U - width + 1).clamp(min=0)[:, None] // (T - 1).clamp(min=1)[:, None]).clamp(
        max=(U - width + 1).clamp(min=0)[:, None]
    )
    return first[:, :, None] + torch.arange(width)


def on_a_band(c: Context, kind: torch.dtype, joint: bool) -> Row:
    x, y, T, U = sample(c)
    width = 2 if c.small else 5
    ranges = band(T, U, x.shape[1], width)
    if joint:
        loss: Loss = partial(_joint, y=y, T=T, U=U, ranges=ranges, eps=0)
        return agrees(c, loss, joint_parts(x), kind)
    rows = x[:, :, :width].contiguous()
    return agrees(c, lambda z: rnnt_loss(z, y, T, U, blank=0, reduction="none", ranges=ranges), [rows], kind)


def _joint(*parts: Tensor, y: Tensor, T: Tensor, U: Tensor, **options: Any) -> Tensor:
    return rnnt_loss_joint(*parts, y, T, U, 0, reduction="none", **options)


def of_joint(c: Context, kind: torch.dtype, options: dict[str, Any]) -> Row:
    x, y, T, U = sample(c)
    rounded = kind.itemsize == 2  # The products on the device are of this type, those on the CPU of float32.
    return agrees(c, partial(_joint, y=y, T=T, U=U, eps=0, **options), joint_parts(x), kind, rounded)


def simple(c: Context) -> Row:
    """The simple loss and its band, on the device and on the CPU."""
    x, y, T, U = sample(c)
    g = torch.Generator().manual_seed(2)
    V = x.shape[3]
    parts = [torch.randn(x.shape[0], n, V, generator=g, dtype=torch.float64) for n in (x.shape[1], x.shape[2])]

    def loss(am: Tensor, lm: Tensor) -> Tensor:
        costs, gamma = rnnt_loss_simple(am, lm, y, T, U, blank=0, reduction="none")
        bands.append(prune_ranges(gamma, T, U, 2).cpu())
        return costs

    bands: list[Tensor] = []
    row = agrees(c, loss, parts, torch.float32)
    assert torch.equal(*bands), "the bands differ"
    return row


def tdt(c: Context, kind: torch.dtype) -> Row:
    x, y, T, U = sample(c)
    durations = (0, 1, 2, 3, 4)
    z = torch.randn(*x.shape[:3], len(durations), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options: dict[str, Any] = {"sigma": 0.05, "fastemit_lambda": 0.1, "durations": durations, "reduction": "none"}
    return agrees(c, lambda a, b: tdt_loss(a, b, y, T, U, 0, **options), [x, z], kind)


def hostile(c: Context) -> Row:
    """−∞ at a label everywhere, NaN in a row and in the padding, +∞ and large logits."""
    x, y, T, U = sample(c, B=4)
    x[0] *= 1000
    x[1, :, :, int(y[1, 0])] = -math.inf
    x[2, 0, 0, 1] = math.nan
    x[3, int(T[3]) :] = math.nan
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # The CPU names the row with NaN.
        return agrees(c, lambda z: rnnt_loss(z, y, T, U, blank=0, reduction="none"), [x], torch.float32)


def nothing(c: Context) -> None:
    """A batch without utterances, without units, and of one frame."""
    for B, T, U in ((0, 3, 2), (2, 4, 0), (2, 1, 2)):
        x = torch.zeros(B, T, U + 1, 5, device=c.device, requires_grad=True)
        integers = torch.ones(B, U).int(), torch.full((B,), T).int(), torch.full((B,), U).int()
        with through_kernels(c):
            rnnt_loss(x, *integers, blank=0, reduction="sum").backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())


def lengths_on_the_device(c: Context) -> None:
    """Integers on the device: the same costs, and no array is left if they are wrong."""
    if c.small:
        raise Unable("there is no device")
    x, y, T, U = sample(c)
    expected = rnnt_loss(x.float(), y, T, U, blank=0, reduction="none")
    z = x.float().to(c.device).requires_grad_()
    found = rnnt_loss(z, *(v.to(c.device) for v in (y, T, U)), blank=0, reduction="none")
    torch.testing.assert_close(found.detach().cpu(), expected, rtol=1e-4, atol=1e-3)
    wild = torch.full_like(y, 10**6), torch.tensor([99, -5, 10**6]), torch.tensor([-1, 50, 10**6])
    rnnt_loss(z, *(v.to(c.device) for v in wild), blank=0, reduction="sum").backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def on_a_stream(c: Context) -> Row:
    """The loss on a busy stream of torch's own, between two other operations."""
    if c.small:
        raise Unable("there is no device")
    x, y, T, U = sample(c)

    def loss(z: Tensor) -> Tensor:
        return rnnt_loss(z * 2, y, T, U, blank=0, reduction="none") + 0

    expected = outcome(loss, [x], "cpu", torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        found = outcome(loss, [x], c.device, torch.float32)
    return same(found, expected, torch.float32)


def autocast(c: Context, kind: torch.dtype, fused: bool) -> Row:
    """A linear layer and the loss under autocast, with a scaled gradient if the type is float16."""
    x, y, T, U = sample(c)
    layer = torch.nn.Linear(x.shape[3], x.shape[3]).to(c.device)
    parts = [p.float() for p in joint_parts(x)]

    def run(on: bool) -> list[Tensor]:
        own = [p.to(c.device, copy=True).requires_grad_() for p in (parts if fused else [x.float()])]
        scale = 256.0 if kind == torch.float16 and on else 1.0
        with torch.autocast(c.device.split(":")[0], dtype=kind, enabled=on):
            if fused:
                costs = rnnt_loss_joint(own[0], own[1], *own[2:], y, T, U, 0, reduction="none")
            else:
                logits = layer(own[0])
                assert logits.dtype == (kind if on else torch.float32)
                costs = rnnt_loss(logits, y, T, U, 0, reduction="none")
        (costs.sum() * scale).backward()
        return [costs.detach().double().cpu(), *(p.grad.double().cpu() / scale for p in own)]

    with through_kernels(c):
        found, exact = run(True), run(False)
    torch.testing.assert_close(found[0], exact[0], rtol=2e-2, atol=0.5)
    for a, b in zip(found[1:], exact[1:], strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=5e-2)
    return Row(note="against float32 on the device")


def does_not_wait(c: Context) -> Row:
    """With lengths on the CPU, the host is free again while the device is still busy with what came before."""
    if c.small:
        raise Unable("there is no device")
    x, y, T, U = sample(c)
    z = x.float().to(c.device).requires_grad_()
    rnnt_loss(z, y, T, U, blank=0).backward()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    began = time.perf_counter()
    rnnt_loss(z, y, T, U, blank=0).backward()
    free = time.perf_counter() - began
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    assert free < whole / 2, f"the host waited {free:.3f} of {whole:.3f} s"
    return Row(note=f"the host is free after {1e3 * free:.1f} ms of {1e3 * whole:.0f}")


def many_logits(c: Context) -> Row:
    """More than 2³¹ logits, in place: all are zero, so costs and the last gradient are known."""
    if c.small:
        raise Unable("there is no device")
    T, U, V = 2200, 999, 1000
    if torch.cuda.mem_get_info()[0] < 12e9:
        raise Unable("it needs 12 GB of free memory")
    x = torch.zeros(1, T, U + 1, V, dtype=torch.bfloat16, device=c.device, requires_grad=True)
    cost = rnnt_loss(x, torch.ones(1, U).int(), torch.tensor([T]), torch.tensor([U]), blank=0, inplace=True)
    cost.backward()
    paths = math.lgamma(T + U) - math.lgamma(T) - math.lgamma(U + 1)
    assert math.isclose(float(cost), (T + U) * math.log(V) - paths, rel_tol=1e-4), float(cost)
    assert x.grad is not None
    assert abs(float(x.grad[0, -1, -1, 0]) - (1 / V - 1)) < 1e-2 and abs(float(x.grad[0, -1, -1, 1]) - 1 / V) < 1e-4
    return Row(note=f"{x.numel():,} logits")


def _rank(rank: int, size: int, backend: str, device: str, folder: str, parts: list[Tensor], batch: Any) -> None:
    """One process of DistributedDataParallel: its share of the batch, and the gradients of the layer to a file."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if device != "cpu":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    layer = torch.nn.Linear(parts[0].shape[3], parts[0].shape[3]).to(device)
    with torch.no_grad():
        layer.weight.copy_(parts[1])
        layer.bias.copy_(parts[2])
    own = slice(rank, None, size)
    model = DistributedDataParallel(layer)  # Its hooks last as long as it does.
    with simulated() if device == "cpu" else nullcontext():
        logits = model(parts[0][own].to(device))
        rnnt_loss(logits, *(v[own] for v in batch), blank=0, reduction="sum").backward()
    torch.save([layer.weight.grad.cpu() * size, layer.bias.grad.cpu() * size], Path(folder, f"rank{rank}"))
    dist.destroy_process_group()


def ddp(c: Context, backend: str, size: int) -> Row:
    """Processes that share this device, under DistributedDataParallel, against one process on the CPU."""
    if backend == "nccl" and c.small:
        raise Unable("NCCL needs a device")
    x, *batch = sample(c, B=4)
    V = x.shape[3]
    g = torch.Generator().manual_seed(4)
    parts = [x.float(), torch.randn(V, V, generator=g), torch.randn(V, generator=g)]
    layer = [p.clone().requires_grad_() for p in parts[1:]]
    rnnt_loss(parts[0] @ layer[0].t() + layer[1], *batch, blank=0, reduction="sum").backward()
    folder = c.folder / f"ddp-{backend}"
    folder.mkdir(parents=True)
    threads = {"OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, threads):
        torch.multiprocessing.spawn(_rank, (size, backend, c.device, str(folder), parts, batch), nprocs=size)
    for rank in range(size):
        found = torch.load(folder / f"rank{rank}", weights_only=True)
        same([torch.zeros(0), *found], [torch.zeros(0), *(p.grad for p in layer)], torch.float32)
    return Row(note=f"{size} processes")


def values(c: Context) -> Rows:
    rows: list[tuple[str, Callable[[], Row | None]]] = []
    layouts: dict[str, dict[str, Any]] = {
        "padded": {},
        "in place": {"inplace": True},
        "packed": {"layout": "packed"},
        "packed, in place": {"layout": "packed", "inplace": True},
        "clamp, FastEmit, delay": {"clamp": 0.3, "fastemit_lambda": 0.1, "delay_penalty": 0.2},
        "log-probabilities": {"fused_log_softmax": False},
    }
    for kind in TOLERANCE:
        name = str(kind).removeprefix("torch.")
        rows += [(f"loss, {name}, {how}", partial(plain, c, kind, o)) for how, o in layouts.items()]
        rows.append((f"loss on a band, {name}", partial(on_a_band, c, kind, False)))
        rows.append((f"fused joint, {name}", partial(of_joint, c, kind, {})))
        rows.append((f"durations, {name}", partial(tdt, c, kind)))
    one = torch.float32
    rows += [
        ("fused joint, ReLU and product", partial(of_joint, c, one, {"activation": "relu", "combine": "mul"})),
        ("fused joint on a band", partial(on_a_band, c, one, True)),
        ("simple loss and its band", partial(simple, c)),
        ("occupancies", partial(occupancies, c)),
        ("more units than threads of a block", partial(plain, c, one, {}, T=300, U=1100, V=12)),
        ("more frames than units, by far", partial(plain, c, one, {}, T=3000, U=30, V=16)),
        ("a vocabulary of 5,000", partial(plain, c, one, {}, T=20, U=8, V=5000)),
        ("infinity and NaN", partial(hostile, c)),
        ("no utterance, no unit, one frame", partial(nothing, c)),
        ("integers on the device", partial(lengths_on_the_device, c)),
        ("on a stream of torch's own", partial(on_a_stream, c)),
        ("no wait for the device", partial(does_not_wait, c)),
        ("autocast, bfloat16, logits", partial(autocast, c, torch.bfloat16, False)),
        ("autocast, bfloat16, fused joint", partial(autocast, c, torch.bfloat16, True)),
        ("autocast, float16, scaled", partial(autocast, c, torch.float16, False)),
        ("two processes on one device, gloo", partial(ddp, c, "gloo", 2)),
        ("one process, NCCL", partial(ddp, c, "nccl", 1)),
        ("2.2 thousand million logits", partial(many_logits, c)),
    ]
    return rows

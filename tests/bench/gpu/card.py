"""The first lines that can fail on a real device, each by its name, and how fast the card is.

Every check is as small as the thing that it is about, so that the first one that fails says where to look. ADVICE has
what to do then. Without a device they run in numba's simulator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from context import Context
from runner import Row, Rows, Unable

EXTRA = "pip install --editable '.[gpu]', or 'numba-cuda[cu12]' with a torch for CUDA 12"
TOOLKIT = "pip install 'cuda-toolkit[cudart,nvvm,nvrtc,cccl]==X.Y.*', where nvidia-smi shows CUDA Version X.Y"
ADVICE = {
    "torch on the device": "install the newest driver, or a torch for the CUDA version that nvidia-smi shows",
    "torch's matrix products": "this torch has no code for this card: install one that has (see its list beside)",
    "numba-cuda is installed": EXTRA,
    "numba finds driver and compiler": f"{EXTRA}. If it stays so: {TOOLKIT}",
    "a kernel compiles and loads": f"the compiler is newer than the driver. Update the driver, or {TOOLKIT}",
    "both use one context": "torch or another library made a context of its own: start without it",
    "torch's default stream": "report it: numba-cuda does not take torch's default stream (handle 0)",
    "a stream of torch's own": "report it: a kernel did not wait for what came before it on its stream",
    "another thread, as in a backward pass": "report it: numba-cuda has no context in autograd's thread",
    "pinned memory": "raise the limit of locked memory: ulimit -l unlimited",
}


def launched(kernel: Any, grid: int, block: Any, *tensors: torch.Tensor) -> None:
    """Launch a kernel as the losses launch theirs: on torch's current stream, without a copy."""
    from stillhouse.train.rnnt.cuda.launch import Launcher

    launch = Launcher(torch.empty(1, 1, device=tensors[0].device))
    launch.kernels = SimpleNamespace(kernel=kernel)
    launch("kernel", (grid, 1), block, *tensors)


def doubles(x: torch.Tensor) -> None:
    from tiny_kernels import double

    expected = x.clone() * 2
    launched(double, max(1, -(-x.numel() // 8)), 8, x)
    assert torch.equal(x, expected), f"{x.flatten()[:4].tolist()}, expected {expected.flatten()[:4].tolist()}"


def of_torch(c: Context) -> Row:
    x = torch.ones(1000, device=c.device)
    assert float((x + 1).sum()) == 2000
    if c.small:
        return Row(note="CPU")
    driver = torch._C._cuda_getDriverVersion()
    return Row(note=f"torch for CUDA {torch.version.cuda}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}")


def products(c: Context) -> Row:
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.eye(64, device=c.device, dtype=kind)
        assert torch.equal(x @ x, x), kind
    if c.small:
        return Row()
    own = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return Row(note=f"{own}; torch has code for {', '.join(torch.cuda.get_arch_list())}")


def numba_installed(c: Context) -> Row:
    import numba.cuda

    names = ("numba", "numba-cuda", "cuda-core", "cuda-bindings", "cuda-toolkit", "nvidia-nvvm", "nvidia-nvjitlink")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    place = str(numba.cuda.__file__)
    assert c.small or "numba_cuda" in place, f"numba.cuda is {place}, which is not that of numba-cuda"
    return Row(note=", ".join(found))


def numba_finds(c: Context) -> Row:
    from numba import cuda

    if c.small:
        return Row(note="numba's simulator")
    cuda.current_context()
    device = cuda.get_current_device()
    return Row(note=f"{device.name!r}, compute capability {device.compute_capability}")


def first_kernel(c: Context) -> Row:
    import numpy as np
    from numba import cuda
    from tiny_kernels import double

    began = time.perf_counter()
    host = np.ones((2, 4), np.float32)
    x = cuda.to_device(host)
    double[1, 8](x)
    assert (x.copy_to_host() == 2).all()
    return Row(note=f"in {time.perf_counter() - began:.2f} s, with the compiler's start")


def one_context(c: Context) -> None:
    from numba import cuda

    doubles(torch.ones(2, 4, device=c.device))
    if not c.small:
        assert cuda.current_context().device.id == torch.cuda.current_device()


def of_kind(c: Context, kind: torch.dtype) -> None:
    doubles(torch.arange(1, 9, device=c.device).view(2, 4).to(kind))


def odd_layouts(c: Context) -> None:
    """Tensors of nothing, slices and transposed ones, and rows that are one row in memory."""
    from tiny_kernels import block_sum

    x = torch.arange(1, 25, device=c.device, dtype=torch.float32).view(4, 6)
    out = torch.zeros(1, device=c.device)
    for view in (x[:0], x[:, :0], x[1:3], *(() if c.small else (x.t(), x[:, ::2], x[1:3, 2:]))):
        doubles(view)
    if c.small:
        return  # The simulator takes contiguous arrays alone.
    launched(block_sum, 1, (4, 2), torch.ones(1, device=c.device).expand(24), out)  # as the band of a loss without one
    assert float(out) == 24


def block_of_two(c: Context) -> None:
    from tiny_kernels import block_sum

    out = torch.zeros(1, device=c.device)
    launched(block_sum, 1, (4, 2), torch.arange(100.0, device=c.device), out)
    assert float(out) == 4950, float(out)


def own_stream(c: Context) -> None:
    """Launch between two operations of torch on a stream that is busy, without waiting for any of them."""
    from tiny_kernels import double

    if c.small:
        return doubles(torch.ones(2, 4))
    stream = torch.cuda.Stream()
    x = torch.ones(512, 512, device=c.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.add_(1)
        launched(double, -(-x.numel() // 8), 8, x)
        x.add_(1)
    torch.cuda.current_stream().wait_stream(stream)
    assert bool((x == 5).all()), x.unique().tolist()


def other_thread(c: Context) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            doubles(torch.ones(2, 4, device=c.device))
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for e in failed:
        raise e


def bfloat16_bits(c: Context) -> None:
    """Bits of bfloat16 through the loads and stores of the kernels: rounding to even, infinity, NaN, subnormals."""
    from tiny_kernels import through

    from stillhouse.train.rnnt.cuda.cells import Arithmetic

    a = Arithmetic("bfloat16")
    values = [1.0, -1.00390625, 1.001953125, 1.005859375, 3e38, float("inf"), -float("inf"), float("nan"), 1e-40, 0.0]
    y = torch.tensor([values], device=c.device)
    x, out = y.to(torch.bfloat16), torch.zeros_like(y, dtype=torch.bfloat16)
    launched(through(a.load, a.put), 1, len(values), x, y, out)
    torch.testing.assert_close(out, x, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


def pinned(c: Context) -> None:
    if c.small:
        raise Unable("there is no device")
    x = torch.arange(1000).pin_memory().to(c.device, non_blocking=True)
    assert int(x.sum()) == 499_500


def first_lines(c: Context) -> Rows:
    rows: list[tuple[str, Callable[[Context], Row | None]]] = [
        ("torch on the device", of_torch),
        ("torch's matrix products", products),
        ("numba-cuda is installed", numba_installed),
        ("numba finds driver and compiler", numba_finds),
        ("a kernel compiles and loads", first_kernel),
        ("both use one context", one_context),
    ]
    for kind in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16):
        rows.append((f"a tensor of {str(kind).removeprefix('torch.')}", partial(of_kind, kind=kind)))
    rows += [
        ("odd layouts, and tensors of nothing", odd_layouts),
        ("shared memory and barriers", block_of_two),
        ("bfloat16 as 16 bits", bfloat16_bits),
        ("torch's default stream", one_context),
        ("a stream of torch's own", own_stream),
        ("another thread, as in a backward pass", other_thread),
        ("pinned memory", pinned),
    ]
    return [(name, partial(run, c)) for name, run in rows]


# --- how fast the card is ---


def copies(c: Context) -> Row:
    numbers = 1 << (20 if c.small else 28)
    x = torch.zeros(numbers, device=c.device)
    y = torch.empty_like(x)
    ms, _ = c.measured(lambda: lambda: y.copy_(x), rounds=10)
    rate = 8 * numbers / ms * 1e3
    return Row(ms=ms, note=f"{rate / 1e9:,.0f} GB/s, read and written", facts={"bandwidth": rate})


def multiplies(c: Context, kind: str) -> Row:
    n = 256 if c.small else 8192
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    a, b = (torch.randn(n, n, device=c.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ms, _ = c.measured(lambda: lambda: torch.mm(a, b, out=out), rounds=5)
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = 2 * n**3 / ms * 1e3
    share = f", {rate / c.card.flops[kind]:.0%} of the data sheet's" if c.card.source == "data sheet" else ""
    return Row(ms=ms, note=f"{rate / 1e12:,.1f} TFLOP/s{share}", facts={"flops": {kind: rate}})


def launches(c: Context) -> Row:
    """The gap between kernels that nothing else delays: a graph of 500 that do next to nothing."""
    if c.small:
        raise Unable("there is no device")
    x = torch.zeros(1, device=c.device)
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(500):
            x.add_(1)
    ms, _ = c.measured(lambda: graph.replay, rounds=10)
    return Row(ms=ms / 500, note="a kernel in a graph of 500", facts={"launch_s": ms / 5e5})


def host_of_a_loss(c: Context) -> Row:
    """What the host needs for a call of the loss and its backward pass, which launch four kernels of numba's."""
    from stillhouse.train.rnnt import rnnt_loss

    x = torch.randn(2, 3, 3, 5, device=c.device)
    y, T, U = torch.ones(2, 2).int(), torch.tensor([3, 2]).int(), torch.tensor([2, 1]).int()
    times = []
    for _ in range(3 if c.small else 50):
        z = x.clone().requires_grad_()
        c.wait()
        began = time.perf_counter()
        rnnt_loss(z, y, T, U, blank=0).backward()
        times.append(time.perf_counter() - began)
    c.wait()
    ms = 1e3 * sorted(times)[len(times) // 2]
    floor_ms = 1e3 * 4 * c.card.launch_s
    return Row(ms=ms, floor_ms=floor_ms, bound="launches", note="by the host's clock; a step may not be shorter")


def speed(c: Context) -> Rows:
    rows: list[tuple[str, Callable[[Context], Row | None]]] = [("copy of 1 GiB", copies)]
    rows += [(f"product of 8192 × 8192, {kind}", partial(multiplies, kind=kind)) for kind in c.kinds]
    rows += [("a launch", launches), ("loss of a tiny lattice, by the host", host_of_a_loss)]
    return [(name, partial(run, c)) for name, run in rows]

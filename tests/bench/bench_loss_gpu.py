"""Time the RNN-T loss and torchaudio's on a GPU, and print a table. It needs a CUDA device and the extra `gpu`.

No GPU has run the kernels yet, so it first compares values with the CPU's. The aim is 1.5 times torchaudio's speed at
half its extra memory.
Try: `make bench-loss-gpu`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import torchaudio

from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint

RECTANGLES = [(8, 200, 40, 256), (16, 250, 60, 500), (4, 400, 100, 1024), (32, 400, 100, 1024)]


def case(B: int, T: int, U: int, V: int):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, U + 1, V, generator=g)
    y = torch.randint(0, V - 1, (B, U), generator=g).int()
    return x, y, torch.full((B,), T).int(), torch.full((B,), U).int()


def agrees() -> None:
    """Compare values and gradients on the device with the CPU's, for each dtype, in place and not."""
    for dtype, tolerance in (
        (torch.float32, 1e-4),
        (torch.float64, 1e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 4e-3),
    ):
        for inplace in (False, True):
            x, y, T, U = case(3, 50, 1100 if dtype == torch.float32 else 20, 40)
            T[1], U[2] = 31, 11
            results = []
            for device in ("cpu", "cuda"):
                z = x.to(device, dtype).requires_grad_()
                costs = rnnt_loss(z, y, T, U, reduction="none", inplace=inplace)
                costs.sum().backward()
                results.append((costs.detach().cpu(), z.grad.cpu()))
            torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=tolerance)
    print("values and gradients agree with the CPU's", file=sys.stderr)


def plain(loss: Callable, x: torch.Tensor, *integers: torch.Tensor, **options) -> Callable[[], Callable[[], object]]:
    """Return a function that copies the logits and returns the step to time."""

    def prepare() -> Callable[[], object]:
        z = x.clone().requires_grad_()
        return lambda: loss(z, *integers, reduction="sum", **options).backward()

    return prepare


def measured(prepare: Callable[[], Callable[[], object]], rounds: int = 20) -> tuple[float, int]:
    """Return median milliseconds of a step on the stream, and its peak of bytes beyond what was allocated."""
    times: list[float] = []
    memory = 0
    for _ in range(rounds + 2):
        step = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        memory = torch.cuda.max_memory_allocated() - before
    return statistics.median(times[2:]), memory


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench-loss-gpu: no CUDA device here")
    agrees()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, torchaudio {torchaudio.__version__}\n")
    print("| B×T×U×V | loss | ms | extra memory, of the logits |\n|---|---|--:|--:|")
    for shape in RECTANGLES:
        x, y, T, U = case(*shape)
        x = x.cuda()
        on_device = [v.cuda() for v in (y, T, U)]
        size = x.numel() * 4

        rows = {
            "torchaudio": plain(torchaudio.functional.rnnt_loss, x, *on_device),
            "ours": plain(rnnt_loss, x, y, T, U),
            "ours, in place": plain(rnnt_loss, x, y, T, U, inplace=True),
        }
        B, _, _, V = shape
        parts = [
            torch.randn(s, device="cuda", requires_grad=True) for s in ((B, shape[1], 512), (B, shape[2] + 1, 512))
        ]
        parts += [torch.randn(V, 512, device="cuda", requires_grad=True), torch.zeros(V, device="cuda")]
        rows["joint of 512 and loss, fused"] = lambda parts=parts, y=y, T=T, U=U: (
            lambda: rnnt_loss_joint(*parts, y, T, U, reduction="sum").backward()
        )
        for name, prepare in rows.items():
            ms, memory = measured(prepare)
            print(f"| {'×'.join(map(str, shape))} | {name} | {ms:.2f} | {memory / size:.2f} |")


if __name__ == "__main__":
    main()

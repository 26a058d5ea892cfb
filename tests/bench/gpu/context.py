"""What the rows of a part have in common: the device, the card's figures, and how a step is measured.

Guarantees: a time is the median of rounds that start on an idle device. Memory is the peak of what torch's allocator
has given, the inputs included, as in the field's tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from floors import Card, Work, floor
from runner import Row

MB = 2.0**20  # as in the field's tables


@dataclass
class Context:
    """A device to measure. `small` means a rehearsal on the CPU, in numba's simulator where kernels run."""

    device: str
    card: Card
    folder: Path
    rates: dict[str, Any]  # "bandwidth", "flops" and "launch_s" as measured

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("float32",) if self.small else ("bfloat16", "float16", "tf32", "float32")

    def wait(self) -> None:
        if not self.small:
            torch.cuda.synchronize()

    def measured(self, prepare: Callable[[], Callable[[], object]], rounds: int = 10) -> tuple[float, float | None]:
        """Return median milliseconds of the steps that `prepare` returns, and the peak in MB, None on a CPU.

        The first two rounds do not count: they compile kernels and fill caches.
        """
        taken = [self.once(prepare()) for _ in range(3 if self.small else rounds + 2)][2:]
        return statistics.median(ms for ms, _ in taken), taken[-1][1]

    def once(self, step: Callable[[], object]) -> tuple[float, float | None]:
        """Return the milliseconds of one call by the events of the stream, and its peak in MB, None on a CPU."""
        self.wait()
        if self.small:
            began = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - began), None
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), torch.cuda.max_memory_allocated() / MB

    def row(
        self, prepare: Callable[[], Callable[[], object]], work: Work | None = None, note: str = "", rounds: int = 10
    ) -> Row:
        """Measure a step beside its floor."""
        ms, peak = self.measured(prepare, rounds)
        if work is None:
            return Row(ms=ms, peak_mb=peak, note=note)
        seconds, bound = floor(work, self.card)
        return Row(ms=ms, floor_ms=1e3 * seconds, bound=bound, peak_mb=peak, note=note)

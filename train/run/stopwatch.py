"""Where a training step's time goes, part by part: by the clock on a CPU, by events of the stream on CUDA.

Invariant: it changes no number of the step. On CUDA nothing waits for the device but `take`, once a window.
Exercised by `stillhouse train`; pytest tests/train/run/test_monitor.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PREFIX = "stillhouse/"  # of the parts' names in a profiler's trace
HOST = ("data", "teacher")  # waiting for a batch, and reading targets in a thread beside: no work of the device


class Stopwatch:
    """Seconds by part since the last `take`. Parts do not overlap, "teacher" apart."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.spans: list[tuple[str, Any, Any]] = []
        self.split: Any = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        device = part not in HOST
        began = self._now(device)
        try:
            with torch.profiler.record_function(PREFIX + part):
                yield
        finally:
            if part == "backward" and self.split is not None:
                self.spans.append(("transfer_backward", began, self.split))
                began, self.split = self.split, None
            self.spans.append((part, began, self._now(device)))

    def watch_transfer(self, inputs: Iterable[Tensor]) -> None:
        """The backward pass that follows begins with the transfer's, which is over when all of `inputs` that get a
        gradient have got theirs: that much of it is the part "transfer_backward".
        """

        def arrived(gradient: Tensor) -> None:
            self.split = self._now(True)

        for value in inputs:
            if value.requires_grad:
                value.register_hook(arrived)

    def _now(self, device: bool) -> Any:
        if not (device and self.cuda):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
        for part, began, ended in self.spans:
            seconds = ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
            self.seconds[part] += seconds
        taken, self.seconds, self.spans = dict(self.seconds), defaultdict(float), []
        return taken


def shares(time: dict[str, float], elapsed: float) -> dict[str, float]:
    """Of the parts' seconds a step: "data", the share of wall time `elapsed` that steps wait for batches, and
    "transfer", the share of the device's time that no transducer without transfer would need.
    """
    device = sum(s for part, s in time.items() if part not in HOST)
    transfer = time.get("transfer", 0.0) + time.get("transfer_backward", 0.0)
    return {"data": time.get("data", 0.0) / elapsed, "transfer": transfer / device if device else 0.0}

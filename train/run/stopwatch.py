"""The time of each part of a training step: by the clock on a CPU, by events of the stream on CUDA.

Guarantees: no number of the step changes. On CUDA only `take` waits for the device, once in a window.
Try: `pytest tests/train/run/test_monitor.py`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PREFIX = "stillhouse/"  # in front of the parts' names in a profiler's trace
HOST = ("data", "teacher")  # waiting for a batch, and the thread that reads targets: the device does not work for them


class Stopwatch:
    """Seconds by part since the last `take`. Parts do not overlap, except for "teacher"."""

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
        """Count the beginning of the next backward pass as the part "transfer_backward".

        The pass begins with the transfer's, which ends when all of its `inputs` have their gradients.
        """

        def arrived(gradient: Tensor) -> None:
            self.split = self._now(True)

        for value in inputs:
            value.register_hook(arrived)

    def _now(self, device: bool) -> Any:
        if not (device and self.cuda):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """Return the seconds by part, and start again."""
        if self.cuda:
            torch.cuda.synchronize()
        for part, began, ended in self.spans:
            self.seconds[part] += ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
        taken, self.seconds, self.spans = dict(self.seconds), defaultdict(float), []
        return taken


def shares(time: dict[str, float], elapsed: float) -> dict[str, float]:
    """Return shares of a step's time, of which `time` has the parts and `elapsed` the seconds by the clock.

    "data" is the share of `elapsed` that steps wait for batches. "transfer" is the share of the device's time that a
    transducer without transfer would not need.
    """
    device = sum(s for part, s in time.items() if part not in HOST)
    transfer = time.get("transfer", 0.0) + time.get("transfer_backward", 0.0)
    return {"data": time.get("data", 0.0) / elapsed, "transfer": transfer / device if device else 0.0}

"""Profile some steps of a run with torch's profiler.

    RUN/profile/trace.json (for chrome://tracing or Perfetto), profile.json (facts), profile.txt (a table of them)

Guarantees: a profiled run computes the same bits.
Try: `stillhouse train CONFIG --profile 10`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .stopwatch import PREFIX

WARMUP = 3  # The first steps of a process compile kernels and fill caches.
OPS = 25  # operators of the table


@dataclass(frozen=True)
class Part:
    """A part of the step or an operator: its milliseconds a step, `device_ms` of them on CUDA, and its calls a step.

    The times of an operator leave out the operators that it calls.
    """

    name: str
    ms: float
    device_ms: float
    calls: float


@dataclass(frozen=True)
class Profiled:
    """The profile of `steps` steps after step number `after`, of `ms` each. The profiler makes them slower."""

    after: int
    steps: int
    ms: float
    device: str
    parts: list[Part]
    ops: list[Part]
    trace: str

    def table(self, ops: int = OPS) -> str:
        """Return the parts and the first `ops` operators as lines of text."""
        lines = [f"steps {self.after + 1} to {self.after + self.steps} on {self.device}: {self.ms:.1f} ms a step"]
        for head, rows in (("part", self.parts), ("operator (alone)", self.ops[:ops])):
            lines += ["", f"{head:<44}{'ms':>9}{'CUDA ms':>9}{'%':>6}{'calls':>8}"]
            for p in rows:
                share = 100 * p.ms / self.ms
                lines.append(f"{p.name[:43]:<44}{p.ms:>9.2f}{p.device_ms:>9.2f}{share:>6.1f}{p.calls:>8.1f}")
        return "\n".join(lines) + "\n"


class Profile:
    """Profiles `steps` steps of a process, from its fourth on, or fewer if the run ends before.

    `done` gets the profile when the files in `out` are complete, or None if the run ended before the first such step.
    """

    def __init__(self, out: Path, steps: int, done: Callable[[Profiled | None], None]) -> None:
        self.out, self.steps, self.done = out, steps, done
        self.seen, self.after, self.began = 0, 0, 0.0
        self.profiler: Any = None
        self.over = False

    def step(self, step: int) -> None:
        """Count step number `step` of the run, which has ended."""
        self.seen += 1
        if self.seen == WARMUP:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
            self.profiler.start()
            self.after, self.began = step, time.perf_counter()
        elif self.seen == WARMUP + self.steps:
            self.close()

    def close(self) -> None:
        """Write the files of what was profiled so far. A second call does nothing."""
        if self.over:
            return
        self.over, steps = True, self.seen - WARMUP
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        if self.profiler is not None:
            self.profiler.stop()
        if steps <= 0:
            return self.done(None)
        self.out.mkdir(parents=True, exist_ok=True)
        profiled = self._profiled(seconds, steps)
        self.profiler.export_chrome_trace(str(self.out / "trace.json"))
        (self.out / "profile.json").write_text(json.dumps(asdict(profiled), indent=1) + "\n", encoding="utf-8")
        (self.out / "profile.txt").write_text(profiled.table(), encoding="utf-8")
        self.done(profiled)

    def _profiled(self, seconds: float, steps: int) -> Profiled:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        parts, ops = [], []
        for e in self.profiler.key_averages():
            name, calls = e.key.removeprefix(PREFIX), e.count / steps
            if name == e.key:
                own = (e.self_cpu_time_total / 1e3 / steps, e.self_device_time_total / 1e3 / steps)
                ops.append(Part(name, *own, calls))
            elif e.cpu_time_total:  # The device has a range of the same name, without CPU time.
                parts.append(Part(name, e.cpu_time_total / 1e3 / steps, e.device_time_total / 1e3 / steps, calls))
        parts.sort(key=lambda p: -p.ms)
        ops.sort(key=lambda p: -max(p.ms, p.device_ms))
        trace = str(self.out / "trace.json")
        return Profiled(self.after, steps, 1e3 * seconds / steps, device, parts, ops[: 4 * OPS], trace)

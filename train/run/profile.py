"""Some steps of a run under torch's profiler: a trace for chrome://tracing or Perfetto, and where the time went.

    RUN/profile/trace.json (Chrome's format), profile.json (the facts), profile.txt (the same as a table)

Invariant: a profiled run computes what it would have computed, bit by bit; the profiler looks on.
Exercised by `stillhouse train CONFIG --profile 10`; pytest tests/train/run/test_profile.py.
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

WARMUP = 3  # steps of the process that are let pass: they compile kernels and fill caches
OPS = 25


@dataclass(frozen=True)
class Part:
    """A part of the step, or an operator: milliseconds a step, of which `device_ms` on CUDA, and calls a step. An
    operator's times are without those of the operators that it calls.
    """

    name: str
    ms: float
    device_ms: float
    calls: float


@dataclass(frozen=True)
class Profiled:
    """`steps` steps after step number `after`, of `ms` each while the profiler ran, which makes them slower."""

    after: int
    steps: int
    ms: float
    device: str
    parts: list[Part]
    ops: list[Part]
    trace: str

    def table(self, ops: int = OPS) -> str:
        lines = [f"steps {self.after + 1} to {self.after + self.steps} on {self.device}: {self.ms:.1f} ms a step"]
        for head, rows in (("part", self.parts), ("operator (alone)", self.ops[:ops])):
            lines += ["", f"{head:<44}{'ms':>9}{'CUDA ms':>9}{'%':>6}{'calls':>8}"]
            for p in rows:
                share = 100 * p.ms / self.ms
                lines.append(f"{p.name[:43]:<44}{p.ms:>9.2f}{p.device_ms:>9.2f}{share:>6.1f}{p.calls:>8.1f}")
        return "\n".join(lines) + "\n"


class Profile:
    """Profiles `steps` steps of a process, from its fourth on; a run that ends before gives what there was.

    `done` is told what was found, once the files in `out` are whole; None where the run ended too early for a step.
    """

    def __init__(self, out: Path, steps: int, done: Callable[[Profiled | None], None]) -> None:
        self.out, self.steps, self.done = out, steps, done
        self.seen, self.after, self.began = 0, 0, 0.0
        self.profiler: Any = None
        self.over = False

    def step(self, step: int) -> None:
        """After step number `step` of the run."""
        self.seen += 1
        if self.seen == WARMUP:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
            self.profiler.start()
            self.after, self.began = step, time.perf_counter()
        elif self.seen == WARMUP + self.steps:
            self.close()

    def close(self) -> None:
        """What was profiled so far goes to the files; nothing happens a second time."""
        if self.over:
            return
        self.over = True
        if self.profiler is None:
            return self.done(None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, steps = time.perf_counter() - self.began, self.seen - WARMUP
        self.profiler.stop()
        if not steps:
            return self.done(None)
        self.out.mkdir(parents=True, exist_ok=True)
        found = self._found(seconds, steps)
        self.profiler.export_chrome_trace(str(self.out / "trace.json"))
        (self.out / "profile.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        (self.out / "profile.txt").write_text(found.table(), encoding="utf-8")
        self.done(found)

    def _found(self, seconds: float, steps: int) -> Profiled:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        parts, ops = [], []
        for e in self.profiler.key_averages():
            calls = e.count / steps
            if e.key.startswith(PREFIX):
                name = e.key.removeprefix(PREFIX)
                if e.cpu_time_total:  # the range itself; its shadow on the device has the same name
                    parts.append(Part(name, e.cpu_time_total / 1e3 / steps, e.device_time_total / 1e3 / steps, calls))
            else:
                own = (e.self_cpu_time_total / 1e3 / steps, e.self_device_time_total / 1e3 / steps)
                ops.append(Part(e.key, *own, calls))
        parts.sort(key=lambda p: -p.ms)
        ops.sort(key=lambda p: -max(p.ms, p.device_ms))
        trace = str(self.out / "trace.json")
        return Profiled(self.after, steps, 1e3 * seconds / steps, device, parts, ops[: 4 * OPS], trace)

"""What a run reports while it trains: means over a window of steps, speed and the times of its parts.

Guarantees: a run without a monitor computes the same bits.
Try: `pytest tests/train/run/test_monitor.py`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...data.batches.loader import Batch
from ..config import Config, in_transfer, learning_rate, transfer_weights
from . import loggers
from .profile import Profile
from .stopwatch import HOST, Stopwatch, shares

WIDTH = 100  # columns of a line on the terminal
LOSSES = {"loss": 0, "rnnt": 1, "ctc": 1, "transfer": 0, "text": 1}  # a higher number is left out of the line earlier
OnProgress = Callable[[str], None]


class Monitor:
    """A context manager around the training loop, which writes records to loggers and lines to `on_progress`.

    The run begins or resumes at `step`. A monitor that is not `on` writes and reports nothing.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        step: int,
        on_progress: OnProgress,
        device: torch.device,
        profile: Profile | None = None,
        *,
        on: bool = True,
    ) -> None:
        self.config, self.from_step, self.device, self.profile = config, step, device, profile if on else None
        self.on_progress: OnProgress = on_progress if on else lambda _: None
        self.watch = Stopwatch(device)
        self.loggers = loggers.Loggers(loggers.make_loggers(config.run.loggers, out) if on else [], self.on_progress)
        self.left = TimeLeft(config)
        self._restart()

    def __enter__(self) -> Monitor:
        try:
            self.loggers.start(self.config.model_dump(mode="json"), self.from_step)
        except BaseException:
            self.loggers.close(failed=True)
            raise
        self._restart()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.profile is not None:
            self.profile.close()
        self.loggers.close(failed=kind is not None)

    def _restart(self) -> None:
        self.window: dict[str, float] = defaultdict(float)
        self.steps, self.audio_s = 0, 0.0
        self.before = 0  # steps of the window that an earlier process computed
        self.began, self.elsewhere = time.perf_counter(), 0.0

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Time an evaluation ("dev") or a checkpoint, which counts for the time left, but not for the speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.elsewhere += took
            self.left.aside[what] = took

    def step(
        self, step: int, epoch: int, batch: Batch, figures: Mapping[str, float], text: Batch | None = None
    ) -> None:
        """Count step number `step`, from 1, with its losses and other figures by name. `text` is beside the speech."""
        self.steps += 1
        if self.profile is not None:
            self.profile.step(step)
        frames = int(batch.feature_lengths.sum()) / (batch.share or 1.0)  # other ranks have the rest
        self.audio_s += frames / batch.frame_hz
        self.watch.seconds["teacher"] += batch.teacher_s + (text.teacher_s if text is not None else 0.0)
        for name, value in figures.items():
            self.window[name] += value
        # The means of a window are of steps of one kind.
        if step % self.config.run.log_every == 0 or step in (self.config.text.pretrain_steps, self.config.steps):
            self._log(step, epoch, batch)

    def _log(self, step: int, epoch: int, batch: Batch) -> None:
        parts = self.watch.take()  # On CUDA this waits for the window's work.
        elapsed = time.perf_counter() - self.began - self.elsewhere
        self.left.add(elapsed, self.steps)
        record: dict[str, Any] = {"kind": "train", "step": step, "epoch": epoch}
        steps = self.before + self.steps
        good = steps - self.window.get("skipped", 0)
        record |= {name: value / (steps if name == "skipped" else good) for name, value in self.window.items()}
        record |= {"lr": learning_rate(step - 1, self.config), "seconds": elapsed}
        lambdas = transfer_weights(step - 1, self.config)
        record |= {in_transfer("lambda", name): value for name, value in lambdas.items()}
        record |= {"realtime": self.audio_s / elapsed} if self.audio_s else {}
        record |= {"batch": batch.part[0] if batch.part else len(batch.ids)}
        # These are seconds a step. The prefetch thread reads the teacher beside the other parts.
        record["time"] = {part: s / self.steps for part, s in parts.items()}
        record["share"] = shares(record["time"], elapsed / self.steps)
        record["memory"] = memory(self.device)
        self.loggers.log(record)
        self.on_progress(line(record, self.config.steps, self.left(step)))
        self._restart()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of a window must keep."""
        return {"steps": self.before + self.steps, "sums": dict(self.window)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue the window of a checkpoint."""
        self.before = state.get("steps", 0)
        self.window.update(state.get("sums", {}))


class TimeLeft:
    """Predicts the seconds to the end of the run from this process's last steps, evaluations and checkpoints."""

    def __init__(self, config: Config) -> None:
        self.steps = config.steps
        self.every = {"checkpoint": config.run.checkpoint_every, "dev": config.run.eval_every}
        self.aside: dict[str, float] = {}  # seconds of the last evaluation and checkpoint
        self.windows: deque[tuple[float, int]] = deque(maxlen=20)
        self.seen = 0

    def add(self, seconds: float, steps: int) -> None:
        """Add a window of steps."""
        self.seen += 1
        if self.seen == 2:
            self.windows.clear()  # The first window compiled kernels, so it counts only until there is a second.
        self.windows.append((seconds, steps))

    def __call__(self, step: int) -> float:
        """Return the seconds after step number `step`, whose evaluation and checkpoint are still to come."""
        seconds, steps = map(sum, zip(*self.windows))
        left = (self.steps - step) * seconds / steps
        for what, took in self.aside.items():
            left += took * (-(-self.steps // self.every[what]) - (step - 1) // self.every[what])
        return left


def memory(device: torch.device) -> dict[str, float]:
    """Return bytes: "resident" of this process, and "cuda", the most that tensors have taken on the device.

    Without /proc, "resident" is the most so far.
    """
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = {"resident": float(resident)}
    if device.type == "cuda":
        used["cuda"] = float(torch.cuda.max_memory_allocated(device))
    return used


def line(record: Mapping[str, Any], steps: int, left: float) -> str:
    """Return a record of kind "train" as a line for people, with `left` seconds to the end.

    It has at most WIDTH columns, so the fields that matter least are left out if there are too many.
    """
    whole = sum(s for part, s in record["time"].items() if part not in HOST)
    share, used = record["share"], record["memory"]
    fields = [
        (0, f"step {record['step']}/{steps}"),
        (2, f"epoch {record['epoch']}"),
        *((rank, f"{n} {record[n]:.3f}") for n, rank in LOSSES.items() if n in record),
        (1, f"{record['realtime']:.0f}x real time" if "realtime" in record else ""),
        (2, f"{1000 * whole:.0f} ms a step"),
        (3, f"outside ASR {100 * share['transfer']:.1f} %" if share["transfer"] else ""),
        (1, f"waiting for data {100 * share['data']:.1f} %" if share["data"] > 0.05 else ""),
        (4, f"{used['resident'] / 1e9:.2f} GB" + (f" + {used['cuda'] / 1e9:.2f} GB CUDA" if "cuda" in used else "")),
        (0, f"{duration(left)} left"),
    ]
    fields = [(rank, text) for rank, text in fields if text]
    while sum(len(text) + 2 for _, text in fields) - 2 > WIDTH and (last := max(rank for rank, _ in fields)):
        fields.remove(next(field for field in reversed(fields) if field[0] == last))
    return "  ".join(text for _, text in fields)


def duration(seconds: float) -> str:
    """Return a rounded duration, such as "40 s", "12 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

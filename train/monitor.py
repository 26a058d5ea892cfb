"""What a run tells while it trains: means over a window of steps, speed, times of its parts, to loggers and a line.

Invariant: it watches only. A run with a monitor that is off computes the same weights, bit by bit. Exercised by
`stillhouse train`; pytest tests/train/test_monitor.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import loggers
from .config import Config
from .loader import Batch
from .schedule import learning_rate, transfer_weight

Report = Callable[[str], None]


class Stopwatch:
    """Seconds by part since the last `take`. On CUDA the parts are times of launching, not of computing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class Monitor:
    """A context manager around the loop. `step` is where the run goes on from; `on` False (a rank that is not the
    first): nothing is written and nothing reported.
    """

    def __init__(self, config: Config, out: Path, step: int, report: Report, *, on: bool = True) -> None:
        self.config, self.from_step, self.on = config, step, on
        self.report: Report = report if on else lambda _: None
        self.watch = Stopwatch()
        self.loggers = loggers.make(config.run.loggers, out) if on else []
        self._restart()

    def __enter__(self) -> Monitor:
        settings = self.config.model_dump(mode="json")
        for logger in self.loggers:
            logger.start(settings, self.from_step)
        self._restart()
        return self

    def __exit__(self, *_: object) -> None:
        for logger in self.loggers:
            logger.close()

    def _restart(self) -> None:
        self.window: dict[str, float] = defaultdict(float)
        self.steps, self.frames = 0, 0.0
        self.began, self.elsewhere = time.perf_counter(), 0.0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no training step: evaluation and checkpoints count for no speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.elsewhere += time.perf_counter() - began

    def step(self, step: int, epoch: int, batch: Batch, found: dict[str, float]) -> None:
        """After step number `step` (from 1): `found` are its losses and the like, by name."""
        self.steps += 1
        self.frames += int(batch.feature_lengths.sum()) / (batch.share or 1.0)  # other ranks hear the rest
        self.watch.seconds["teacher"] += batch.teacher_s
        for name, value in found.items():
            self.window[name] += value
        if step % self.config.run.log_every == 0 or step == self.config.optim.steps:
            self._log(step, epoch, batch)

    def _log(self, step: int, epoch: int, batch: Batch) -> None:
        elapsed = time.perf_counter() - self.began - self.elsewhere
        record: dict[str, Any] = {"kind": "train", "step": step, "epoch": epoch}
        record |= {name: value / self.steps for name, value in self.window.items()}
        record |= {"lr": learning_rate(step - 1, self.config), "seconds": elapsed}
        if self.config.transfer.views:
            record["lambda"] = transfer_weight(step - 1, self.config)
        record |= {"realtime": self.frames / 100 / elapsed, "batch": len(batch.ids)}
        # Parts are seconds a step. The teacher is read in the prefetch thread, beside the others.
        record["time"] = {part: s / self.steps for part, s in self.watch.take().items()}
        self.write(record)
        self.report(self._line(record))
        self._restart()

    def write(self, record: loggers.Record) -> None:
        for logger in self.loggers:
            logger.log(record)

    def flush(self) -> None:
        for logger in self.loggers:
            logger.flush()

    def _line(self, record: loggers.Record) -> str:
        names = [n for n in ("loss", "rnnt", "ctc", "transfer") if n in record]
        seconds = sum(v for k, v in record["time"].items() if k != "teacher")
        last = self.config.optim.steps
        left = (last - record["step"]) * seconds / 60
        return (
            f"step {record['step']}/{last}  epoch {record['epoch']}  "
            + "  ".join(f"{n} {record[n]:.3f}" for n in names)
            + f"  {record['realtime']:.0f}x real time  {left:.1f} min left"
        )

"""Where a run's metrics go: one small protocol, and the loggers that a run may name in run.loggers.

Invariant: metrics.jsonl holds one line a record, and none of a step after the one that the run goes on from: those
will be logged again. Exercised by `stillhouse train CONFIG --set 'run.loggers=["jsonl", "tensorboard"]'`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from ...data.errors import StillhouseError

Record = Mapping[str, Any]


class Logger(Protocol):
    """A record is {"kind": "train" or "dev", "step": n, name: number, …}; a number may be in a mapping of names."""

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        """Before the first record; `step` is the one that the run goes on from, 0 for a new run."""

    def log(self, record: Record) -> None: ...

    def flush(self) -> None:
        """Called before each checkpoint: what was logged so far must survive a kill."""

    def close(self, failed: bool) -> None:
        """`failed`: the run ends by an error, or by Ctrl-C. Also called where `start` failed."""


class JsonLines:
    """RUN/metrics.jsonl."""

    def __init__(self, out: Path) -> None:
        self.path = out / "metrics.jsonl"
        self.file: IO[str] | None = None

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        self._trim(step)
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        assert self.file is not None
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def flush(self) -> None:
        assert self.file is not None
        os.fsync(self.file.fileno())

    def close(self, failed: bool) -> None:
        if self.file is not None:
            self.file.close()

    def _trim(self, step: int) -> None:
        """Drop lines of steps after `step`."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # half a line, written when the run was killed
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(self.path)


class TensorBoard:
    """RUN/tb; TensorBoard hides the points of later steps that an earlier, killed process wrote."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "tb"
        self.board: Any = None

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.folder, purge_step=step or None)

    def log(self, record: Record) -> None:
        for name, value in scalars(record):
            self.board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self.board.flush()

    def close(self, failed: bool) -> None:
        if self.board is not None:
            self.board.close()


class Loggers:
    """Several loggers as one.

    A logger that fails in the midst of a run is reported and left out from then on: what it would have been told is
    in metrics.jsonl, whose own failure ends the run. One that cannot start is an error, before the first step.
    """

    def __init__(self, loggers: Sequence[Logger], report: Callable[[str], None]) -> None:
        self.loggers, self.report = list(loggers), report

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        for logger in self.loggers:
            try:
                logger.start(settings, step)
            except StillhouseError:
                raise
            except Exception as e:
                raise StillhouseError(
                    f"the logger {_name(logger)} cannot start: {e}", remedy="mend it or take it out of run.loggers"
                ) from e

    def log(self, record: Record) -> None:
        self._each(lambda logger: logger.log(record))

    def flush(self) -> None:
        self._each(lambda logger: logger.flush())

    def close(self, failed: bool) -> None:
        self._each(lambda logger: logger.close(failed))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as e:
                if isinstance(logger, JsonLines):
                    raise
                self.loggers.remove(logger)
                self.report(f"the logger {_name(logger)} failed and is left out from here on: {e}")


def _name(logger: Logger) -> str:
    return type(logger).__name__.lower()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """(name, value): "train/loss", "dev/wer"; those of a mapping without the kind, "time/encoder"."""
    for name, value in record.items():
        if isinstance(value, float):
            yield f"{record['kind']}/{name}", value
        elif isinstance(value, Mapping):
            for below, number in value.items():
                yield f"{name}/{below}", float(number)


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """The loggers of a run; JSON lines come first and always, for they are what pages and tables read."""
    from . import trackers

    kinds: dict[str, Callable[[Path], Logger]] = {
        "jsonl": JsonLines,
        "tensorboard": TensorBoard,
        "wandb": trackers.Wandb,
        "mlflow": trackers.Mlflow,
    }
    return [kinds[name](out) for name in dict.fromkeys(["jsonl", *names])]

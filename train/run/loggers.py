"""Where a run's metrics go: one small protocol, and the loggers that a run may name in run.loggers.

Invariant: metrics.jsonl holds one line a record, and none of a step after the one that the run goes on from: those
will be logged again. Exercised by `stillhouse train CONFIG --set 'run.loggers=["jsonl", "tensorboard"]'`.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from ...data.errors import ConfigError, StillhouseError
from ...data.files.atomic import read_plain, write_atomic

Record = Mapping[str, Any]
PARAMS, PARAM_LENGTH = 100, 500  # what MLflow takes of one request, and of one value in any version


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
        write_atomic(self.path, "".join(kept))


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


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            f"the logger {name} needs a package that is not here ({e})", remedy=f"pip install 'stillhouse[{name}]'"
        ) from e


class _Ids:
    """The ids that services gave this run."""

    def __init__(self, out: Path) -> None:
        self.path = out / "trackers.json"

    def read(self) -> dict[str, str]:
        try:
            return json.loads(read_plain(self.path))
        except (OSError, ValueError):
            return {}

    def keep(self, service: str, id: str) -> None:
        write_atomic(self.path, json.dumps(self.read() | {service: id}) + "\n")


class Wandb:
    """Weights & Biases; steps are those of the run, whatever was logged before."""

    def __init__(self, out: Path) -> None:
        self.out, self.ids = out, _Ids(out)
        self.run: Any = None

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        wandb = _library("wandb")
        known = self.ids.read()
        id = known.get("wandb") or uuid.uuid4().hex[:12]
        self.ids.keep("wandb", id)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "stillhouse"),
            dir=str(self.out),
            name=self.out.resolve().name,
            id=id,
            resume="allow",
            config=dict(settings),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self.run.log({"step": record["step"], **dict(scalars(record))})

    def flush(self) -> None:
        """Its own process has it already."""

    def close(self, failed: bool) -> None:
        if self.run is not None:
            self.run.finish(exit_code=int(failed))


class Mlflow:
    """MLflow, by its client: nothing of the process's own "active run" is touched."""

    def __init__(self, out: Path) -> None:
        self.out, self.ids = out, _Ids(out)
        self.client: Any = None
        self.run = ""

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        mlflow = _library("mlflow")
        client = mlflow.MlflowClient()
        known = self.ids.read().get("mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "stillhouse")
            found = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name) if found is None else found.experiment_id
            known = client.create_run(experiment, run_name=self.out.resolve().name).info.run_id
            self.ids.keep("mlflow", known)
            parameters = [
                mlflow.entities.Param(f"{section}.{name}", str(value)[:PARAM_LENGTH])
                for section, values in settings.items()
                for name, value in values.items()
            ]
            for i in range(0, len(parameters), PARAMS):
                client.log_batch(known, params=parameters[i : i + PARAMS])
        else:
            client.update_run(known, status="RUNNING")
        self.metric, self.client, self.run = mlflow.entities.Metric, client, known

    def log(self, record: Record) -> None:
        now = int(1000 * time.time())
        # Kept in files, "a" and "a/b" would be a file and a folder of one name
        metrics = [self.metric(name.replace("/", "."), value, now, record["step"]) for name, value in scalars(record)]
        self.client.log_batch(self.run, metrics=metrics)

    def flush(self) -> None:
        """log_batch returns when the service has it."""

    def close(self, failed: bool) -> None:
        if self.client is not None:
            self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


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
    kinds: dict[str, Callable[[Path], Logger]] = {
        "jsonl": JsonLines,
        "tensorboard": TensorBoard,
        "wandb": Wandb,
        "mlflow": Mlflow,
    }
    return [kinds[name](out) for name in dict.fromkeys(["jsonl", *names])]

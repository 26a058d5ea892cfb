"""Where a run's metrics go: the protocol of a logger, and the loggers that a run may name in run.loggers.

Weights & Biases and MLflow read their own environment variables, such as WANDB_PROJECT, WANDB_MODE=offline,
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME. The run has the name of its folder there.

Guarantees: metrics.jsonl has one line for each record, and none of a step after the one at which the run resumed. A
resumed run continues the run of a service, whose id RUN/trackers.json keeps. Steps after the last checkpoint of a
killed process are logged again, with the same values.
Try: `stillhouse train CONFIG --set 'run.loggers=["jsonl", "tensorboard"]'`.
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
from ...data.files.atomic import named, read_plain, write_atomic
from ..config import flatten

Record = Mapping[str, Any]
TRACKERS = "trackers.json"
PARAMS, PARAM_LENGTH = 100, 500  # what every version of MLflow accepts: parameters of a request, letters of a value


class Logger(Protocol):
    """A record is {"kind": "train" or "dev", "step": n, name: number, …}. A mapping of names may hold numbers, too."""

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        """Begin, before the first record. `step` is the one at which the run resumes, or 0 for a new run."""

    def log(self, record: Record) -> None: ...

    def flush(self) -> None:
        """Make what was logged so far survive a kill. A service does nothing, because it has every record."""

    def close(self, failed: bool) -> None:
        """End, also if `start` failed. `failed` is set if the run ends by an error or by Ctrl-C."""


class JsonLines:
    """Writes RUN/metrics.jsonl."""

    def __init__(self, out: Path) -> None:
        self.path = out / "metrics.jsonl"
        self.file: IO[str] | None = None

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        """Drop the lines of steps after `step`, and append to the others.

        An evaluation of what a run starts from, which is step 0, is repeated.
        """
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                if json.loads(line)["step"] <= step and step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # The run was killed while it wrote this line.
        write_atomic(self.path, "".join(kept))
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        assert self.file is not None
        with named(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def flush(self) -> None:
        assert self.file is not None
        with named(self.path):
            os.fsync(self.file.fileno())

    def close(self, failed: bool) -> None:
        if self.file is not None:
            self.file.close()


class TensorBoard:
    """Writes RUN/tb. TensorBoard hides points of later steps that a killed process wrote."""

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


class Service(Logger):
    """Logs to a service, which knows this run by an id that RUN/trackers.json keeps."""

    def __init__(self, out: Path) -> None:
        self.out, self.run_name = out, out.resolve().name
        self.run: Any = None

    def _library(self) -> Any:
        package = _name(self)
        try:
            return importlib.import_module(package)
        except ImportError as e:
            remedy = f"pip install 'stillhouse[{package}]'"
            raise ConfigError(f"the logger {package} needs a package that is not installed ({e})", remedy=remedy) from e

    def _ids(self) -> dict[str, str]:
        try:
            return json.loads(read_plain(self.out / TRACKERS))
        except (OSError, ValueError):
            return {}

    def _keep_id(self, id: str) -> None:
        write_atomic(self.out / TRACKERS, json.dumps(self._ids() | {_name(self): id}) + "\n")


class Wandb(Service):
    """Logs to Weights & Biases, with the run's own steps."""

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        wandb = self._library()
        id = self._ids().get("wandb") or uuid.uuid4().hex[:12]
        self._keep_id(id)
        project, config = os.environ.get("WANDB_PROJECT", "stillhouse"), dict(settings)
        self.run = wandb.init(
            project=project, dir=str(self.out), name=self.run_name, id=id, resume="allow", config=config
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self.run.log({"step": record["step"], **dict(scalars(record))})

    def close(self, failed: bool) -> None:
        if self.run is not None:
            self.run.finish(exit_code=int(failed))


class Mlflow(Service):
    """Logs to MLflow through its client, which leaves the process's "active run" alone."""

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        mlflow = self._library()
        client = mlflow.MlflowClient()
        id = self._ids().get("mlflow")
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "stillhouse")
            known = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name) if known is None else known.experiment_id
            id = client.create_run(experiment, run_name=self.run_name).info.run_id
            self._keep_id(id)
            flat = flatten(settings).items()
            parameters = [mlflow.entities.Param(name, str(value)[:PARAM_LENGTH]) for name, value in flat]
            for i in range(0, len(parameters), PARAMS):
                client.log_batch(id, params=parameters[i : i + PARAMS])
        else:
            client.update_run(id, status="RUNNING")
        self.metric, self.client, self.run = mlflow.entities.Metric, client, id

    def log(self, record: Record) -> None:
        now = int(1000 * time.time())
        # MLflow may keep metrics in files, where "a" and "a/b" would be a file and a folder of one name.
        metrics = [self.metric(name.replace("/", "."), value, now, record["step"]) for name, value in scalars(record)]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self, failed: bool) -> None:
        if self.run is not None:
            self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


class Loggers:
    """Several loggers as one.

    A logger that fails during the run is reported and left out from then on. A failure of metrics.jsonl, which has all
    records, ends the run. A logger that cannot start is an error before the first step.
    """

    def __init__(self, loggers: Sequence[Logger], on_progress: Callable[[str], None]) -> None:
        self.loggers, self.on_progress = list(loggers), on_progress

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        for logger in self.loggers:
            try:
                logger.start(settings, step)
            except StillhouseError:
                raise
            except Exception as e:
                raise StillhouseError(
                    f"the logger {_name(logger)} cannot start: {e}", remedy="remove it from run.loggers, or repair it"
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
                self.on_progress(f"the logger {_name(logger)} failed and is left out from here on: {e}")


def _name(logger: Logger) -> str:
    return type(logger).__name__.lower()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of a record, such as "train/loss" or "dev/wer", and "time/encoder" of a mapping."""
    for name, value in record.items():
        if isinstance(value, float):
            yield f"{record['kind']}/{name}", value
        elif isinstance(value, Mapping):
            for below, number in value.items():
                yield f"{name}/{below}", float(number)


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Return the loggers of a run. JSON Lines come first and always, because pages and tables read them."""
    kinds: dict[str, Any] = {"jsonl": JsonLines, "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
    return [kinds[name](out) for name in dict.fromkeys(["jsonl", *names])]

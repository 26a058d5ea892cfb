"""Loggers for services that keep many runs: Weights & Biases and MLflow.

Each is told by its own environment variables where to write (WANDB_PROJECT, WANDB_MODE=offline, …;
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME); the name of the run is that of its folder.

Invariant: a run that goes on goes on in the service's run, too: RUN/trackers.json keeps its id there. What a killed
process logged after its last checkpoint is logged again under the same steps, with the same values.
Exercised by `WANDB_MODE=offline stillhouse train CONFIG --set 'run.loggers=["wandb"]'`.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.errors import ConfigError
from ...data.files.atomic import read_plain
from .loggers import Record, scalars

PARAMS, PARAM_LENGTH = 100, 500  # what MLflow takes of one request, and of one value in any version


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
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.read() | {service: id}) + "\n")
        draft.replace(self.path)


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

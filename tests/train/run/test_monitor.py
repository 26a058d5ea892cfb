"""What a run tells: its loggers, its times by part, the time left."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillhouse.data.errors import ConfigError, StillhouseError
from stillhouse.train.config import Config, load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import loggers, monitor, stopwatch
from stillhouse.train.run.monitor import Monitor, TimeLeft, duration, line
from stillhouse.train.run.stopwatch import Stopwatch, shares


def config(**run: Any) -> Config:
    return Config.model_validate(
        {"data": {"corpus": "c", "features": "f", "units": "u"}, "optim": {"steps": 100}, "run": run}
    )


class Clock:
    """Stands for `time` in a module: it goes on only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(monitor, "time", clock)
    return clock


def test_the_transfers_backward_pass_is_told_apart(clock: Clock) -> None:
    class Takes(torch.autograd.Function):
        """The identity, whose backward pass takes so many seconds."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            clock.now += ctx.seconds
            return gradient, None

    watch = Stopwatch(torch.device("cpu"))
    weight = torch.ones(3, requires_grad=True)
    states, predicted = Takes.apply(weight, 4.0), Takes.apply(weight, 1.0)
    asr = Takes.apply(states, 2.0).sum() + Takes.apply(predicted, 0.5).sum()
    inputs = [states.view_as(states), predicted.view_as(predicted)]  # the second gets no gradient
    with watch("transfer"):
        clock.now += 0.25
        transfer = Takes.apply(Takes.apply(inputs[0], 8.0), 16.0).sum()
    watch.watch_transfer(inputs)
    with watch("backward"):
        (asr + 0.5 * transfer).backward()
    took = watch.take()
    assert took == {"transfer": 0.25, "transfer_backward": 24.0, "backward": 7.5}
    assert shares(took | {"data": 2.0, "teacher": 90.0}, elapsed=40.0) == {"data": 0.05, "transfer": 24.25 / 31.75}
    assert watch.take() == {}
    with watch("backward"):  # of a step without transfer
        clock.now += 1.0
    assert watch.take() == {"backward": 1.0}


def test_time_left_counts_evaluations_and_checkpoints_and_forgets_the_first_window() -> None:
    left = TimeLeft(config(eval_every=30, checkpoint_every=50))
    left.add(60.0, 10)  # compiling
    assert left(10) == 90 * 6.0
    left.add(20.0, 10)
    assert left(20) == 80 * 2.0
    left.add(20.0, 10)
    left.aside |= {"dev": 7.0, "checkpoint": 3.0}
    # After step 30, its own evaluation to come: at 30, 60, 90 and the last, 100; checkpoints at 50 and 100
    assert left(30) == 70 * 2.0 + 4 * 7.0 + 2 * 3.0
    assert left(100) == 7.0 + 3.0
    assert [duration(s) for s in (0.4, 89, 90, 3599, 3600, 11_100)] == [
        "0 s", "89 s", "2 min", "1 h 00 min", "1 h 00 min", "3 h 05 min",
    ]  # fmt: skip


def test_a_record_holds_means_of_its_window_and_speed_without_evaluation(tmp_path: Path, clock: Clock) -> None:
    said: list[str] = []
    batch: Any = SimpleNamespace(
        feature_lengths=torch.tensor([300, 100]), share=0.5, frame_hz=100.0, teacher_s=0.1, ids=["a", "b"], part=None
    )
    settings = config(log_every=2, loggers=[])
    with Monitor(settings, tmp_path, 0, said.append, torch.device("cpu")) as watched:
        for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0), (4, 0.5)):
            with watched.watch("data"):
                clock.now += 0.1
            with watched.watch("encoder"):
                clock.now += 0.9
            watched.step(step, 0, batch, {"loss": loss})
            with watched.aside("dev"):
                clock.now += 50.0
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["loss"], second["loss"], second["step"], second["kind"]) == (3.0, 0.75, 4, "train")
    assert second["seconds"] == pytest.approx(2.0)
    # Half of the batch is 4 s, so a step hears 8 s in 1 s
    assert second["realtime"] == pytest.approx(8.0) and first["realtime"] == pytest.approx(8.0)
    assert second["time"] == pytest.approx({"data": 0.1, "encoder": 0.9, "teacher": 0.1})
    assert second["share"] == pytest.approx({"data": 0.1, "transfer": 0.0}) and "lambda" not in second
    assert second["memory"]["resident"] > 1e7 and "cuda" not in second["memory"]
    assert "step 4/100" in said[1] and "8x real time" in said[1] and "waiting for data 10.0 %" in said[1]
    assert not (tmp_path / "tb").exists()


def test_means_leave_skipped_steps_out(tmp_path: Path) -> None:
    batch: Any = SimpleNamespace(
        feature_lengths=torch.tensor([300]), share=1.0, frame_hz=100.0, teacher_s=0.0, ids=["a"], part=None
    )
    with Monitor(config(log_every=4, loggers=[]), tmp_path, 0, lambda _: None, torch.device("cpu")) as watched:
        for step, found in enumerate(({"loss": 3.0}, {"skipped": 1.0}, {"loss": 4.0}, {"loss": 5.0}), 1):
            watched.step(step, 0, batch, found)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["loss"], record["skipped"]) == (4.0, 0.25)


def test_a_monitor_that_is_off_writes_and_says_nothing(tmp_path: Path) -> None:
    batch: Any = SimpleNamespace(
        feature_lengths=torch.tensor([300]), share=1.0, frame_hz=100.0, teacher_s=0.0, ids=["a"], part=None
    )

    def report(line: str) -> None:
        pytest.fail(line)

    with Monitor(config(log_every=1), tmp_path, 0, report, torch.device("cpu"), on=False) as watched:
        watched.step(1, 0, batch, {"loss": 1.0})
        watched.loggers.log({"kind": "dev", "step": 1, "wer": 0.5})
        watched.loggers.flush()
    assert list(tmp_path.iterdir()) == []


def test_json_lines_of_later_steps_and_torn_ones_go_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 4}\n{"kind": "dev", "step": 5}\n{"kind": "train", "step": 6}\n{"kind"')
    log = loggers.JsonLines(tmp_path)
    log.start({}, 5)
    log.log({"kind": "train", "step": 6, "loss": 1.5})
    log.close(False)
    assert path.read_text() == (
        '{"kind": "train", "step": 4}\n{"kind": "dev", "step": 5}\n{"kind": "train", "step": 6, "loss": 1.5}\n'
    )


def test_a_logger_that_fails_is_left_out_but_not_the_json_lines() -> None:
    class Broken:
        def start(self, settings: Any, step: int) -> None: ...

        def log(self, record: Any) -> None:
            raise OSError("no route to host")

        def flush(self) -> None:
            raise AssertionError("it was left out")

        def close(self, failed: bool) -> None:
            raise AssertionError("it was left out")

    said: list[str] = []
    both = loggers.Loggers([Broken()], said.append)
    both.start({}, 0)
    both.log({"kind": "train", "step": 1})
    both.flush()
    both.close(False)
    assert said == ["the logger broken failed and is left out from here on: no route to host"]
    lines = loggers.JsonLines(Path("nowhere"))
    with pytest.raises(StillhouseError, match="jsonlines cannot start"):
        loggers.Loggers([lines], said.append).start({}, 0)
    with pytest.raises(AssertionError):  # not open
        loggers.Loggers([lines], said.append).log({"kind": "train", "step": 1})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_package_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    watched = Monitor(config(loggers=[name]), tmp_path, 0, print, torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"pip install 'stillhouse\[{name}\]'"):
        watched.__enter__()


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_EXPERIMENT_NAME": "tones",
    }.items():
        monkeypatch.setenv(key, value)


def train_twice(tones: Path, out: Path, name: str) -> Config:
    """Four steps, a checkpoint, and two more in another process's place."""
    found = load_config(tones / "run.toml", ["optim.steps=6", "run.checkpoint_every=4", f'run.loggers=["{name}"]'])

    class Stops(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("step 5/"):
            raise Stops

    with pytest.raises(Stops):
        Trainer(found, out, stop).run()
    Trainer(found, out).run()
    return found


@pytest.mark.filterwarnings("default")  # of the package and what it brings along
def test_mlflow_keeps_settings_and_curves_of_one_run_that_was_killed(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'stillhouse[mlflow]' (too large for dev)")
    offline(monkeypatch, tmp_path)
    settings = train_twice(tones, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tones").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["optim.lr"] == str(settings.optim.lr)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    history = client.get_metric_history(run.info.run_id, "train.loss")
    assert {m.step: m.value for m in history} == ours and set(ours) == set(range(1, 7))
    assert run.data.metrics["dev.wer"] == lines[-1]["wer"]


def leveldb_log(data: bytes, at: int) -> Iterator[bytes]:
    """Records of a log that begins `at` bytes into its first block of 32 KiB: [crc 4, length 2, kind 1, bytes] each."""
    left, whole = 32768 - at, b""
    while len(data) >= 7:
        if left < 7:
            data, left = data[left:], 32768
            continue
        length, kind = int.from_bytes(data[4:6], "little"), data[6]
        whole += data[7 : 7 + length]
        data, left = data[7 + length :], left - 7 - length
        if kind in (1, 4):  # full or last; 2 and 3 are first and middle
            yield whole
            whole = b""


@pytest.mark.filterwarnings("default")
def test_wandb_writes_one_run_offline(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'stillhouse[wandb]' (too large for dev)")
    from wandb.proto import wandb_internal_pb2

    offline(monkeypatch, tmp_path)
    train_twice(tones, tmp_path / "run", "wandb")
    (id,) = json.loads((tmp_path / "run" / "trackers.json").read_text()).values()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert len(files) == 2  # of one run; `wandb sync` appends the second
    found: dict[int, float] = {}
    for file in files:
        for data in leveldb_log(file.read_bytes()[7:], 7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
            if "train/loss" in row:
                found[row["step"]] = row["train/loss"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found == {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.parametrize("left", [0.0, 40_000.0])
@pytest.mark.parametrize("steps", [24, 10_000_000])
@pytest.mark.parametrize("used", [{"resident": 1e9}, {"resident": 4.2e11, "cuda": 1.4e11}])
def test_a_line_fits_100_columns_and_keeps_what_matters(left: float, steps: int, used: dict[str, float]) -> None:
    losses = {"loss": 1234.5678, "rnnt": 1000.5, "ctc": 234.0678, "transfer": 123.4}
    times = {"data": 1.0, "encoder": 0.9, "transfer_backward": 0.9, "optimiser": 10.0}
    shares = {"data": 0.9999, "transfer": 0.3}
    record = {"step": steps, "epoch": 12_345, "realtime": 12_345.6, "time": times, "share": shares, "memory": used}
    text = line(record | losses, steps, left)
    assert len(text) <= 100
    for part in (f"step {steps}/{steps}  ", "loss 1234.568", "transfer 123.400", f"{duration(left)} left"):
        assert part in text
    short = line(record | {"loss": 0.5}, 24, 3.0)
    assert len(short) <= 100
    assert "12346x real time" in short
    assert "waiting for data 100.0 %" in short

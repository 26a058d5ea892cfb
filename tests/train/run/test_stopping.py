"""SIGTERM and SIGUSR1 at any moment: a checkpoint of the last step, exit code 143, and the same end after the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import rank_of

from stillhouse.data.batches import loader
from stillhouse.data.errors import StoppedError
from stillhouse.data.files.stopping import SIGNALS, StopNow, StopRequest
from stillhouse.train.config import load_config
from stillhouse.train.loop import evaluation
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import checkpoint
from stillhouse.train.run.load import load_run

APART = {"time", "seconds", "realtime", "share", "memory"}  # what the clock and the machine say
STEPS = ["optim.steps=8", "run.eval_every=4", "run.checkpoint_every=3", "run.loggers=[]"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "stillhouse.cli"]


def train(tones: Path, out: Path, on_progress: Callable[[str], None] = lambda _: None) -> Trainer:
    with StopRequest() as stop:
        trainer = Trainer(load_config(tones / "run.toml", STEPS), out, on_progress, stop=stop)
        trainer.run()
    return trainer


def stop_me(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """A process that was stopped ignores the signals, and this one has more tests to run."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tones, out)
    return out


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in APART} for line in lines]


def same_end(out: Path, whole: Path) -> None:
    assert metrics(out) == metrics(whole)
    for which in ("last", "best"):
        (ours, *_, step), (theirs, *_, other) = load_run(out, which), load_run(whole, which)
        assert step == other
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def newest(out: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.checkpoints(out / "checkpoints")[-1]).state


@pytest.mark.parametrize("number", SIGNALS)
def test_after_a_step(tones: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if line.startswith("step 5/"):
            stop_me(number)

    with pytest.raises(StoppedError) as caught:
        train(tones, tmp_path / "run", hear)
    assert caught.value.exit_code == 143
    assert newest(tmp_path / "run")["step"] == 5
    place = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert said[-1].startswith(f"stopped by {number.name} at step 5 of 8: {place} is on disk. Repeat the command")
    train(tones, tmp_path / "run")
    same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("evaluation_of", [4, 8])
def test_in_an_evaluation_which_is_repeated(
    tones: Path, whole: Path, tmp_path: Path, evaluation_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it counts before it is whole: neither its record nor the best step."""
    out, calls = tmp_path / "run", iter((4, 8))
    original = evaluation.transcribe

    def transcribe(*arguments: Any, **options: Any) -> Iterator[Any]:
        if next(calls, None) == evaluation_of:
            stop_me()
        return original(*arguments, **options)

    monkeypatch.setattr(evaluation, "transcribe", transcribe)
    with pytest.raises(StoppedError):
        train(tones, out)
    assert (newest(out)["step"], newest(out)["dev_due"]) == (evaluation_of, True)
    assert not any(m["kind"] == "dev" and m["step"] == evaluation_of for m in metrics(out))
    train(tones, out)
    same_end(out, whole)
    said: list[str] = []
    train(tones, out, said.append)
    assert said[-1] == f"{out} is done, at step 8"


def test_while_a_checkpoint_is_written(
    tones: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = checkpoint.save, []

    def save(folder: Path, state: dict, tensors: dict) -> Any:
        steps.append(state["step"])
        stop_me()
        return original(folder, state, tensors)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(StoppedError):
        train(tones, tmp_path / "run")
    assert steps == [3]  # it is not written twice
    monkeypatch.undo()
    train(tones, tmp_path / "run")
    same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("at", [0, 5])
def test_while_it_waits_for_data(
    tones: Path, whole: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before the first step, where no checkpoint is needed."""
    original, waiting, over = loader.BatchLoader.load, iter(range(100)), threading.Event()

    def load(self: Any, plan: Any) -> Any:
        if self.speeds != [1.0] and next(waiting) == at:
            stop_me()
            over.wait(60)
        return original(self, plan)

    monkeypatch.setattr(loader.BatchLoader, "load", load)
    monkeypatch.setattr(loader, "JOIN_S", 0.0)
    said: list[str] = []
    with pytest.raises(StoppedError):
        train(tones, tmp_path / "run", said.append)
    over.set()
    monkeypatch.undo()
    done = len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) and newest(tmp_path / "run")["step"]
    assert f"at step {done} of 8" in said[-1]
    assert (done == 0) == (at == 0)
    train(tones, tmp_path / "run")
    same_end(tmp_path / "run", whole)


def test_while_it_loads(tones: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    with pytest.raises(StopNow):
        train(tones, out, lambda line: stop_me() if line.startswith("resuming") else None)
    train(tones, out)
    same_end(out, whole)


CHILD = """
import signal, sys
from stillhouse.data.files import stopping
stopping.SAME_REQUEST_S = float(sys.argv[1])
with stopping.StopRequest() as stop, stop.deferred():
    print("ready", flush=True)
    for line in sys.stdin:
        print(stop.signal, flush=True)
"""


@pytest.mark.parametrize(("same_request_s", "code"), [("0", 143), ("600", 0)])
def test_a_second_signal_ends_at_once_unless_it_is_the_launcher_s_copy(same_request_s: str, code: int) -> None:
    command = [sys.executable, "-c", CHILD, same_request_s]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR1)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "SIGUSR1\n"
        child.send_signal(signal.SIGTERM)
        rest = child.communicate("\n" if code == 0 else None)[1]
    assert child.returncode == code
    assert ("stopped at once by SIGTERM. Repeat the command to resume." in rest) == (code == 143)


def said_until(command: list[str], begin: str, then: Callable[[subprocess.Popen], None]) -> tuple[int, str]:
    """Run a command, call `then` when it says a line that begins so, and return its exit code and standard error."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said, waiting = [], True
        for line in process.stderr:
            said.append(line)
            if waiting and line.startswith(begin):
                then(process)
                waiting = False
    return process.returncode, "".join(said)


def options(tones: Path, out: Path, *changes: str) -> list[str]:
    sets = [word for change in (*STEPS, *changes) for word in ("--set", change)]
    return ["train", str(tones / "run.toml"), "--out", str(out), *sets]


def test_the_command_ends_with_143_and_ctrl_c_tells_how_to_resume(tones: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli", *options(tones, tmp_path / "run", "optim.steps=4000")]
    code, said = said_until(command, "step 2/", lambda p: p.send_signal(signal.SIGTERM))
    assert code == 143
    assert said.count("stopped by SIGTERM at step ") == 1
    assert "error" not in said
    code, said = said_until(command, "step ", lambda p: p.send_signal(signal.SIGINT))
    assert code == 130
    step = newest(tmp_path / "run")["step"]
    assert f"interrupted. Repeat the command to resume {tmp_path}/run from the last checkpoint, of step {step}." in said


@pytest.mark.parametrize(
    ("way", "number"),
    [
        ("launcher", signal.SIGTERM),
        ("rank 1", signal.SIGUSR1),
        ("launcher, which ends", signal.SIGUSR1),
        pytest.param("launcher, which ends", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("launcher, told to pass it on", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_stop_at_one_step(tones: Path, tmp_path: Path, way: str, number: signal.Signals) -> None:
    """torchrun passes SIGTERM on. It ends with 1 whatever its processes end with, and reports their 143.

    A signal that it does not pass on ends it at once, and its processes follow.
    """
    out = tmp_path / "run"
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"] if "told" in way else []
    launch = [*TORCHRUN[:3], *handled, *TORCHRUN[3:]]
    command = [*launch, *options(tones, out, "optim.steps=4000", "run.checkpoint_every=4000", "run.eval_every=4000")]
    code, said = said_until(command, "step 3/", lambda p: os.kill(rank_of(p, 1) if way == "rank 1" else p.pid, number))
    assert code == (-number if "ends" in way else 1)
    step = newest(out)["step"]
    assert step >= 3
    # Rank 1 may hear of the launcher's end some milliseconds before rank 0.
    by = {"launcher, which ends": r"the end of its launcher( \(rank 1\))?", "rank 1": r"SIGUSR1 \(rank 1\)"}
    place = re.escape(f"{out}/checkpoints/step-{step:08d}")
    line = rf"^stopped by {by.get(way, number.name)} at step {step} of 4000: {place} is on disk\."
    assert len(re.findall(line, said, re.MULTILINE)) == 1
    assert "error: " not in said
    if way == "rank 1":
        assert "143" in said


def test_a_study_stops_its_runs_with_checkpoints(tones: Path, tmp_path: Path) -> None:
    study = tones / "stopped.toml"
    study.write_text(
        'base = "run.toml"\nseeds = [1, 2]\ntest = ["dev"]\n[settings]\noptim.steps = 4000\n'
        "run.eval_every = 4000\nrun.checkpoint_every = 4000\n[arms.none]\n[arms.slow]\noptim.lr = 1e-5\n"
    )
    command = [sys.executable, "-m", "stillhouse.cli", "study", str(study), "--out", str(tmp_path), "--jobs", "2"]
    code, said = said_until(command, "[none/2] step 2/", lambda p: p.send_signal(signal.SIGTERM))
    assert code == 143
    assert said.endswith("stopped by SIGTERM. Repeat the command to resume.\n")
    assert "[none/2] stopped by SIGTERM at step " in said
    assert newest(tmp_path / "none" / "seed-2")["step"] >= 2


DEMO = """
import sys
from pathlib import Path
from stillhouse.data.errors import StoppedError
from stillhouse.train.commands.train import stoppable
from stillhouse.train.demo.demo import Demo
try:
    with stoppable():
        Demo(Path(sys.argv[1]), print).command("train", *sys.argv[2:])
except StoppedError as e:
    sys.exit(e.exit_code)
"""


def test_a_demo_passes_the_request_on(tones: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEMO, str(tmp_path), *options(tones, tmp_path / "run", "optim.steps=4000")]
    code, said = said_until(command, "step 2/", lambda p: p.send_signal(signal.SIGUSR1))
    assert code == 143
    assert "stopped by SIGTERM at step " in said  # what the demo sends on
    assert said.endswith("stopped by SIGUSR1. Repeat the command to resume.\n")
    assert newest(tmp_path / "run")["step"] >= 2

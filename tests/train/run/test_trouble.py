"""Ordinary trouble of a run: full disks, places that cannot be written, modes of files, ties of the best checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import StillhouseError, UsageError
from stillhouse.train.commands import train as command
from stillhouse.train.commands.live import telling
from stillhouse.train.config import load_config
from stillhouse.train.loop import trainer as loop
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import checkpoint

SHORT = ["optim.steps=4", "run.checkpoint_every=2", "run.eval_every=9", "run.loggers=[]"]


def options(tones: Path, out: Path, *changes: str) -> list[str]:
    sets = [word for change in (*SHORT, *changes) for word in ("--set", change)]
    return ["train", str(tones / "run.toml"), "--out", str(out), *sets]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_to_do(
    tones: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_file
    out = tmp_path / "run"

    def save_file(tensors: Any, path: Path) -> None:
        if "step-00000004" in str(path) and path.name.startswith("optimiser"):
            path.write_bytes(b"half")
            raise RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")  # as safetensors says it
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    result = CliRunner().invoke(cli, options(tones, out))
    error = result.exception
    assert isinstance(error, StillhouseError)
    assert "optimiser.safetensors: " in str(error)
    assert f"Repeat the command to resume {out} from the last checkpoint, of step 2." in str(error)
    assert os.listdir(out / "checkpoints") == ["step-00000002"]  # no draft takes the space
    monkeypatch.undo()
    CliRunner().invoke(cli, options(tones, out), catch_exceptions=False)
    assert checkpoint.checkpoints(out / "checkpoints")[-1].name == "step-00000004"


def test_a_limit_of_the_size_of_files(tones: Path, tmp_path: Path) -> None:
    """A real write that fails, of a real process."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    words = [sys.executable, "-B", "-m", "stillhouse.cli", *options(tones, tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert "unexpected" not in done.stderr
    assert "larger than allowed" in done.stderr
    assert "ulimit -f" in done.stderr


def test_a_name_that_is_too_long(tones: Path, tmp_path: Path) -> None:
    error = CliRunner().invoke(cli, options(tones, tmp_path / ("x" * 300))).exception
    assert isinstance(error, StillhouseError)
    assert "too long" in str(error)


@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_files_of_a_run_have_the_usual_mode(tones: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Trainer(load_config(tones / "run.toml", [*SHORT, "optim.steps=2", "optim.ema=0.9"]), tmp_path / "run").run()
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 6
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {p.name: 0o666 & ~mask for p in files}


def test_ties_of_the_error_rate_go_to_the_lower_loss(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([(0.5, 0.1, 2.0), (0.5, 0.1, 1.0), (0.5, 0.1, 1.5), (0.6, 0.1, 0.5), (0.5, 0.1, float("inf"))])
    monkeypatch.setattr(loop, "evaluate_dev", lambda *_, **__: dict(zip(("wer", "cer", "rnnt"), next(figures))))
    trainer = Trainer(load_config(tones / "run.toml", [*SHORT, "optim.steps=5", "run.eval_every=1"]), tmp_path / "run")
    trainer.run()
    assert trainer.best == {"step": 2, "wer": 0.5, "rnnt": 1.0}
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000005").state["best"]["step"] == 2
    trainer.best = {"step": 1, "wer": 0.5}  # of an earlier version
    assert not trainer._is_better(0.5, 0.0)
    assert trainer._is_better(0.4, 9.0)


def test_hours_are_those_of_the_audio_at_its_own_speed(tones: Path, tmp_path: Path) -> None:
    said: dict[str, list[str]] = {"[1.0, 1.1]": [], "[1.1, 1.0]": []}
    for speeds, lines in said.items():
        changes = [*SHORT, "optim.steps=1", f"data.speeds={speeds}"]
        Trainer(load_config(tones / "run.toml", changes), tmp_path / speeds, lines.append).run()
    hours = {lines[0].split("utterances (")[1].split(" h;")[0] for lines in said.values()}
    assert len(hours) == 1


@pytest.mark.parametrize("option", [("--lm-weight", "0.5"), ("--lm-unit", "unit"), ("--lm-unknown", "1")])
def test_an_option_of_the_language_model_without_one(tones: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    Trainer(load_config(tones / "run.toml", [*SHORT, "optim.steps=1"]), tmp_path / "run").run()
    words = ["decode", str(tmp_path / "run"), str(tones / "corpus.jsonl"), str(tones / "features.h5"), *option]
    error = CliRunner().invoke(cli, words).exception
    assert isinstance(error, UsageError)
    assert f"{option[0]} needs a language model" in str(error)


def test_what_takes_long_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.train.commands import live

    said: list[str] = []
    heard = live.threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    monkeypatch.setattr(live, "say", say)
    with telling("short"):
        pass
    monkeypatch.setattr(live, "TELL_S", 0.0)
    with telling("loading"):
        assert heard.wait(10)
    assert said == ["loading …"]
    assert command.telling is telling

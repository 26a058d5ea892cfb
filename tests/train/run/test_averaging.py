"""Averages of weights: by hand, and what a run with one keeps, evaluates and hands to `decode`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.data.errors import CheckpointError, StaleError, UsageError
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import checkpoint
from stillhouse.train.run.averaging import mean, moving_average
from stillhouse.train.run.load import load_run

CHANGES = ["optim.ema=0.5", "optim.steps=10", "run.keep=4", "run.checkpoint_every=2", "run.eval_every=10"]
CHANGES += ["run.log_every=3"]


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value))
        self.register_buffer("frozen", torch.tensor(value))


def test_the_moving_average_by_hand() -> None:
    model = Scalar(8.0)
    average = moving_average(model, 0.15)
    for value in (1.0, 2.0, 3.0):
        model.w.data.fill_(value)
        average.update_parameters(model)
    # 1; then decay min(0.15, 2/11) = 0.15: 0.15 + 0.85 * 2 = 1.85; then 0.15 * 1.85 + 0.85 * 3 = 2.8275
    assert float(average.module.w.detach()) == pytest.approx(2.8275)
    slow = moving_average(model, 0.999)
    for value in (11.0, 0.0):
        model.w.data.fill_(value)
        slow.update_parameters(model)
    assert float(slow.module.w.detach()) == pytest.approx(2.0)  # decay 2/11 at the second step, not 0.999


def test_the_mean_of_models_and_the_buffers_of_a_model() -> None:
    average = mean([Scalar(1.0), Scalar(2.0), Scalar(6.0)])
    assert float(average.w.detach()) == pytest.approx(3.0)
    with pytest.raises(ValueError):
        mean([])


def lines(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in {"time", "seconds", "realtime", "share", "memory"}} for x in found]


@pytest.fixture(scope="module")
def finished(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("averaged") / "run"
    Trainer(load_config(tones / "run.toml", CHANGES), out).run()
    return out


def test_which_weights_a_name_means(finished: Path) -> None:
    last = checkpoint.load(finished / "checkpoints" / "step-00000010")
    own, averaged = last.tensors("model"), last.tensors("ema")
    assert own.keys() == averaged.keys() and not all(torch.equal(own[k], averaged[k]) for k in own)
    assert torch.equal(own["encoder.feature_mean"], averaged["encoder.feature_mean"])
    for which, expected in (("last", averaged), ("ema", averaged), ("10", averaged), ("best", averaged), ("raw", own)):
        found = load_run(finished, which)[0].state_dict()
        assert all(torch.equal(found[k], expected[k]) for k in expected), which
    of = [checkpoint.load(p).tensors("model")["joint.output.weight"] for p in checkpoint.checkpoints(last.path.parent)]
    found = load_run(finished, "average:3")[0].state_dict()["joint.output.weight"]
    assert torch.allclose(found, torch.stack(of[-3:]).mean(0), atol=1e-6)
    assert not torch.allclose(found, of[-1], atol=1e-5)


HERE = "of the steps 4, 6"


@pytest.mark.parametrize(("which", "said"), [("average:9", "run.keep=9"), ("nine", "average:N"), ("3", HERE)])
def test_weights_that_are_not_there_are_refused_in_words(finished: Path, which: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_run(finished, which)


@pytest.mark.parametrize("damage", ["cut", "state", "optimiser"])
def test_past_a_damaged_checkpoint_the_run_ends_bit_by_bit_as_it_had(
    tones: Path, finished: Path, tmp_path: Path, damage: str
) -> None:
    """Windows of the log that a checkpoint cuts through, moving averages and all; nothing is deleted."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    last = out / "checkpoints" / "step-00000010"
    path = last / {"cut": "ema.safetensors", "state": "state.json", "optimiser": "optimiser.safetensors"}[damage]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw[:99] if damage == "cut" else raw)
    said: list[str] = []
    Trainer(load_config(tones / "run.toml", CHANGES), out, said.append).run()
    assert any(path.name in line and "Going back to step 8" in line for line in said)
    assert (out / "checkpoints" / "damaged-step-00000010" / path.name).exists()
    assert lines(out) == lines(finished)
    for name in ("model", "ema", "optimiser"):
        ours, theirs = (checkpoint.load(p / "checkpoints" / last.name).tensors(name) for p in (out, finished))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_checkpoint_of_another_run_is_refused(tones: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    changes = [*CHANGES, "optim.lr=0.1"]
    settings = tmp_path / "run" / "config.toml"
    settings.write_text(settings.read_text().replace("lr = 0.003", "lr = 0.1"))
    with pytest.raises(StaleError, match=r"step-00000010: .*optim\.lr: 0\.003"):
        Trainer(load_config(tones / "run.toml", changes), tmp_path / "run")


def test_a_foreign_folder_is_refused_and_left_alone(tones: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.log").touch()  # a shell's redirection
    Trainer(load_config(tones / "run.toml"), out)
    other = tmp_path / "other"
    (other / "thesis").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"has no config\.toml, .*thesis"):
        Trainer(load_config(tones / "run.toml"), other)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a folder"):
        Trainer(load_config(tones / "run.toml"), tmp_path / "file")
    assert [p.name for p in other.iterdir()] == ["thesis"]

"""Training on noisy copies: from the command line, resumed bit by bit, and refused where there are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stillhouse.cli import cli
from stillhouse.data.errors import FeatureError, UsageError
from stillhouse.data.features.file import FeatureFile
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.load import load_run

CHANGES = ["data.noise=0.5", "optim.steps=12", "run.eval_every=1000", "run.checkpoint_every=6", "run.log_every=6"]


@pytest.fixture(scope="module")
def noisy(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of the tones with two noisy copies of what is trained on."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    for name, samples in (("noise", rng.standard_normal(30000) / 10), ("rir", np.exp(-np.arange(800) / 90))):
        (folder / name).mkdir()
        soundfile.write(folder / name / "one.wav", samples, 16000)
    shutil.copy(tones / "features.h5", folder / "features.h5")
    own = ["--noise", folder / "noise", "--rir", folder / "rir", "--snr", "0-10", "--copies", "2", "--split", "train"]
    speeds = ",".join(map(str, load_config(tones / "run.toml").data.speeds))
    command = ["corpus", "features", tones / "corpus.jsonl", folder / "features.h5", "--speeds", speeds, *own]
    cli([*map(str, command)], standalone_mode=False)
    assert FeatureFile(folder / "features.h5").copies == 2
    return folder / "features.h5"


def test_noisy_training_goes_on_bit_by_bit_and_is_another_run_than_a_clean_one(
    tones: Path, noisy: Path, tmp_path: Path
) -> None:
    changes = [*CHANGES, f"data.features={noisy}"]
    Trainer(load_config(tones / "run.toml", changes), tmp_path / "run").run()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000012")
    Trainer(load_config(tones / "run.toml", changes), tmp_path / "again").run()
    clean = load_config(tones / "run.toml", [*changes, "data.noise=0"])
    Trainer(clean, tmp_path / "clean").run()
    ours, again, other = (load_run(tmp_path / n, "last")[0].state_dict() for n in ("run", "again", "clean"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert not all(torch.equal(ours[name], other[name]) for name in ours)
    noise, plain = (json.loads((tmp_path / n / "identity.json").read_text())["data"] for n in ("run", "clean"))
    assert noise["order"] != plain["order"] and "snr_db" in noise["noise"] and "noise" not in plain


def test_noise_without_copies_is_refused(tones: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FeatureError, match=r"data.noise = 0.5, but there are no noisy copies.*--noise FOLDER --copies N"
    ):
        Trainer(load_config(tones / "run.toml", CHANGES), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--copies", "2"], "--noise FOLDER or --rir FOLDER"),
        (["--snr", "5-20"], "--noise FOLDER with it"),
        (["--noise", ".", "--snr", "20-5"], "such as 5-20"),
        (["--noise", ".", "--snr", "loud"], "such as 5-20"),
    ],
)
def test_options_that_cannot_be_meant(tones: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cli(
            ["corpus", "features", str(tones / "corpus.jsonl"), str(tmp_path / "f.h5"), *options], standalone_mode=False
        )

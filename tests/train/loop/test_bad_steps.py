"""Steps without a finite loss: skipped, named, kept to be looked at, and the end of the run after a few in a row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open

from stillhouse.data.batches.loader import Batch
from stillhouse.data.errors import StillhouseError
from stillhouse.data.features.compute import FeatureFile
from stillhouse.data.manifest import read_manifest
from stillhouse.train.config import load_config
from stillhouse.train.loop import bad_steps
from stillhouse.train.loop.bad_steps import BadSteps
from stillhouse.train.loop.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:rnnt loss")  # it names the rows; the trainer names the utterances


@pytest.fixture
def planted(tones: Path, tmp_path: Path) -> Path:
    """The tones' features with an infinity in utterance u7, the first that the normalisation sees too."""
    path = tmp_path / "features.h5"
    shutil.copyfile(tones / "features.h5", path)
    with FeatureFile(path) as file:
        whole = file.gather(["u7"], [1.0])[0]
    with h5py.File(path, "r+") as file:
        name = next(name for name, data in file.items() if data.ndim == 2 and data.shape[1] == whole.shape[1])
        frames = file[name][:].astype(np.float32)
        starts = [i for i in range(len(frames) - len(whole) + 1) if np.array_equal(frames[i : i + len(whole)], whole)]
        assert len(starts) == 1
        file[name][starts[0] + 3, 5] = np.inf
    return path


def test_an_utterance_with_an_infinity_is_named_kept_and_passed_over(
    tones: Path, tmp_path: Path, planted: Path
) -> None:
    config = load_config(
        tones / "run.toml",
        [f"data.features={planted}", "data.speeds=[1.0]", "optim.steps=24", "run.eval_every=100"],
    )
    said: list[str] = []
    trainer = Trainer(config, tmp_path / "run", said.append)
    assert torch.isfinite(trainer.model.encoder.feature_mean).all()
    trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] - 1 for line in lines if line.get("skipped")]
    files = sorted((tmp_path / "run" / "bad").iterdir(), key=lambda p: int(p.stem.removeprefix("step-")))
    assert 1 <= len(skipped) < 24 and [f.name for f in files] == [f"step-{n}.safetensors" for n in skipped]
    told = [line for line in said if "skipped" in line]
    assert told == [
        f"step {n}: skipped, features that are not finite: u7. Batch kept as {file}" for n, file in zip(skipped, files)
    ]
    corpus = {u.id: u.text for u in read_manifest(tones / "corpus.jsonl").utterances}
    with safe_open(files[0], "pt") as kept:
        ids = json.loads(kept.metadata()["ids"])
        assert kept.get_tensor("step") == skipped[0] and kept.get_tensor("seed") == config.run.seed
        features, lengths = kept.get_tensor("features"), kept.get_tensor("feature_lengths")
        assert features.shape[:2] == (len(ids), int(lengths.max()))
        assert (~torch.isfinite(features)).nonzero().tolist() == [[ids.index("u7"), 3, 5]]
        assert not torch.isfinite(kept.get_tensor("costs")[ids.index("u7")])
        for row, length, id in zip(kept.get_tensor("targets"), kept.get_tensor("target_lengths"), ids):
            assert trainer.units.decode(row[:length].tolist()) == corpus[id]


def batch(ids: str, **changes: torch.Tensor) -> Batch:
    count = len(ids)
    found = {
        "features": torch.zeros(count, 4, 80),
        "feature_lengths": torch.full((count,), 4),
        "targets": torch.ones(count, 2, dtype=torch.int32),
        "target_lengths": torch.full((count,), 2, dtype=torch.int32),
    }
    return Batch(list(ids), **(found | changes), transfer={}, read_s=0.0, teacher_s=0.0)


def test_it_says_what_is_not_finite_and_ends_after_so_many_in_a_row(tmp_path: Path) -> None:
    said: list[str] = []
    bad = BadSteps(tmp_path, 3, 11, said.append)
    bad.skip(5, batch("ab"), torch.tensor([1.0, float("nan")]))
    bad.skip(6, batch("ab"), torch.tensor([1.0, 2.0]))
    bad.count = 0  # a good step between
    bad.skip(8, batch("ab"), torch.tensor([1.0, 2.0]))
    bad.skip(9, batch("ab"), torch.tensor([1.0, 2.0]))
    with pytest.raises(StillhouseError, match=r"3 steps in a row .*no finite gradient.*/bad, lower optim\.lr"):
        bad.skip(10, batch("ab"), torch.tensor([1.0, 2.0]))
    assert "no finite loss: b. " in said[0] and "no finite gradient: a, b. " in said[1]
    assert len(list((tmp_path / "bad").iterdir())) == 5


def test_the_folder_of_bad_batches_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_steps, "KEPT", 2)
    said: list[str] = []
    bad = BadSteps(tmp_path, 100, 0, said.append)
    for step in (1, 2, 3, 2):  # the last comes again after a kill
        bad.skip(step, batch("a"), torch.tensor([float("inf")]))
    assert sorted(p.name for p in (tmp_path / "bad").iterdir()) == ["step-1.safetensors", "step-2.safetensors"]
    assert "kept as" not in said[2] and "kept as" in said[3]

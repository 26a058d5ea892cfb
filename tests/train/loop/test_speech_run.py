"""Training towards a speech teacher, from a store that the real extraction wrote, alone and beside text teachers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data.errors import ConfigError, StaleError
from stillhouse.data.features.compute import compute_features
from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.load import load_run

QUIET = ["run.eval_every=1000", "run.checkpoint_every=1000", "run.log_every=10"]


def run(tones: Path, out: Path, *changes: str) -> list[dict]:
    Trainer(load_config(tones / "run.toml", [*QUIET, *changes]), out).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def towards(ears: Path, views: str, *settings: str) -> list[str]:
    own = [f"views={views}", "aligner=frames", *settings]
    return [f"transfer.stores={ears}", *(f"transfer.speech.{s}" for s in own)]


@pytest.mark.parametrize(
    ("views", "distance", "extra"),
    [
        ("ear/alone/1,3", "codes", ["transfer.speech.mixing=sum", "transfer.speech.state_share=0.5"]),
        pytest.param(
            *("ear/alone/3", "cosine", ["transfer.speech.layers=[1,2]", "model.subsampling=2"]), marks=pytest.mark.slow
        ),
        ("raw/alone/1,3", "contrastive", ["transfer.speech.state_share=1", "model.chunk_frames=16"]),
        pytest.param(
            *("raw/alone/3", "mse", ["transfer.speech.control=shuffled", "model.subsampling=8", "model.dropout=0"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_student_learns_what_a_speech_teacher_hears(
    tones: Path, ears: Path, tmp_path: Path, views: str, distance: str, extra: list[str]
) -> None:
    settings = [f"distance={distance}", "weight=3"]
    lines = run(tones, tmp_path / "run", *towards(ears, views, *settings), *extra, "optim.steps=40")
    assert lines[-1]["transfer.speech"] < 0.95 * lines[0]["transfer.speech"]
    assert lines[0]["transfer_positions.speech"] > 0 and lines[0]["transfer_grad_norm.speech"] > 0
    assert lines[0]["transfer_skipped.speech"] == (0 if "shuffled" not in "".join(extra) else pytest.approx(0, abs=1))


def test_beside_text_it_resumes_to_the_same_bits_and_with_weight_0_changes_nothing(
    tones: Path, store: Path, ears: Path, tmp_path: Path
) -> None:
    stores = f'transfer.stores=["{store}", "{ears}"]'
    three = [
        *(*towards(ears, "ear/alone/*", "distance=codes", "layers=[1]", "state_share=0.4", "mixing=learned"), stores),
        *("transfer.frames.views=raw/alone/3", "transfer.frames.aligner=frames", "transfer.frames.weight=0.3"),
        *("transfer.frames.distance=contrastive", "transfer.text.views=minilm/alone/6", "transfer.text.weight=0.2"),
    ]
    run(tones, tmp_path / "none")
    run(tones, tmp_path / "zero", *three, *(f"transfer.{n}.weight=0" for n in ("speech", "frames", "text")))
    none, zero = (load_run(tmp_path / name, "last")[0].state_dict() for name in ("none", "zero"))
    assert all(torch.equal(none[k], zero[k]) for k in none)
    rng = np.random.default_rng()
    every, stop_at = (int(rng.integers(4, 12)) for _ in range(2))
    settings = ["run.eval_every=1000", f"run.checkpoint_every={every}", *three]
    Trainer(load_config(tones / "run.toml", settings), tmp_path / "whole").run()
    begun = Trainer(load_config(tones / "run.toml", settings), tmp_path / "resumed")

    class Stop(Exception):
        pass

    def update(*a: object) -> dict:
        if begun.step == every + stop_at:
            raise Stop
        return own(*a)

    own, begun._update = begun._update, update  # type: ignore[method-assign]
    with pytest.raises(Stop):
        begun.run()
    Trainer(load_config(tones / "run.toml", settings), tmp_path / "resumed").run()
    whole, resumed = (sorted((tmp_path / n / "checkpoints").iterdir())[-1] for n in ("whole", "resumed"))
    files = sorted(p.name for p in whole.glob("*.safetensors"))
    assert files == sorted(p.name for p in resumed.glob("*.safetensors")) and len(files) == 5
    assert all((whole / f).read_bytes() == (resumed / f).read_bytes() for f in files), (every, stop_at)


def test_what_does_not_go_together_is_refused_before_the_first_step(
    tones: Path, store: Path, ears: Path, tmp_path: Path
) -> None:
    both, frames = f'transfer.stores=["{store}", "{ears}"]', "transfer.a.aligner=frames"
    for changes, message in (
        (["transfer.a.views=ear/alone/3"], r"transfer\.a: ear/alone/3: .*speech teacher.*\"frames\""),
        (["transfer.a.views=minilm/alone/3", frames], r"transfer\.a: minilm/alone/3: .*text teacher"),
        (["transfer.a.views=*/alone/3", frames], r"transfer\.a: .*text teacher"),
        (["transfer.a.views=raw/alone/3", frames, "transfer.a.distance=codes"], "raw/alone/3 are float16"),
        (["transfer.a.views=minilm/alone/3", "transfer.a.distance=codes"], "minilm/alone/3 are .*--dtype pq"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tones, tmp_path / "run", both, *changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_segments_that_have_changed_are_named(tones: Path, ears: Path, tmp_path: Path) -> None:
    """The features are those of the new segments. The store's states are of the old ones."""
    changed = {"u7": {"duration_s": 0.2}, "u8": {"start_s": 0.05}}
    utterances = read_manifest(tones / "corpus.jsonl").utterances
    for number, (name, message) in enumerate(
        {
            "u7": r"raw: the features have 0\.\d\d s of audio and the store \d\.\d\d s for u7",
            "u8": "raw: another part of their audio than was extracted have u8",
        }.items()
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = {u.id: {"audio": str(tones / str(u.audio))} | (changed[name] if u.id == name else {}) for u in utterances}
        write_manifest(folder / "corpus.jsonl", [u.model_copy(update=own[u.id]) for u in utterances])
        corpus = read_manifest(folder / "corpus.jsonl")
        compute_features(corpus, folder / "features.h5", speeds=(1.0, 1.1), workers=0)
        data = [f"data.corpus={folder}/corpus.jsonl", f"data.features={folder}/features.h5"]
        with pytest.raises(StaleError, match=message):
            run(tones, folder / "run", *towards(ears, "raw/alone/3"), *data)
        data += ["transfer.on_missing=skip", "run.log_every=1", "optim.steps=12"]
        lines = run(tones, folder / "skip", *towards(ears, "raw/alone/3"), *data)
        assert max(line["transfer_skipped.speech"] for line in lines) == 1


def test_training_towards_speech_loads_no_model(tones: Path, ears: Path, tmp_path: Path) -> None:
    changes = [*QUIET, *towards(ears, "ear/alone/3", "distance=codes"), "optim.steps=2"]
    sets = [part for change in changes for part in ("--set", change)]
    code = (
        "import sys; from stillhouse.cli import cli;"
        f"cli({['train', str(tones / 'run.toml'), '--out', str(tmp_path / 'run'), *sets]!r}, standalone_mode=False);"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split()[-1] == "False", done.stderr

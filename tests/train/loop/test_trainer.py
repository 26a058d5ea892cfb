"""The trainer on a corpus that it can learn; killed and gone on, bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.errors import CheckpointError, ConfigError, CorpusError, StaleError, UsageError
from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.train.config import load_config
from stillhouse.train.decode.decode import decoding_loader, transcribe
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.report.run import read_run
from stillhouse.train.run.load import load_run
from stillhouse.train.score.wer import score


def train(tones: Path, out: Path, *changes: str) -> list[dict]:
    Trainer(load_config(tones / "run.toml", changes), out).run()
    return metrics(out)


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in {"time", "seconds", "realtime", "share", "memory"}} for line in lines
    ]


@pytest.fixture(scope="module")
def finished(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    train(tones, out)
    return out


def test_it_learns_to_read_tones(tones: Path, tmp_path: Path) -> None:
    changes = ["optim.steps=260", "run.eval_every=1000", "run.checkpoint_every=1000", "run.log_every=20"]
    lines = train(tones, tmp_path / "run", *changes)
    curve = [line["loss"] for line in lines if line["kind"] == "train"]
    assert curve[-1] < 0.2 * curve[0]
    model, units, config, step = load_run(tmp_path / "run")
    assert step == 260
    corpus = read_manifest(config.data.corpus).select("dev")
    loader = decoding_loader(corpus, config.data.features, units)
    found = list(transcribe(model, loader, device=torch.device("cpu")))
    assert sorted(h.id for h in found) == sorted(u.id for u in corpus.utterances)
    assert score([h.ref for h in found], [h.hyp for h in found]).cer.rate < 0.25


def test_the_loss_on_dev_is_torchaudios(tones: Path, finished: Path) -> None:
    """Of the last weights, an utterance at a time: nothing padded, masked or dropped."""
    rnnt_loss = pytest.importorskip("torchaudio").functional.rnnt_loss
    model, units, config, step = load_run(finished, "last")
    loader = decoding_loader(read_manifest(config.data.corpus).select("dev"), config.data.features, units)
    costs, count = [], 0
    for plan in BatchSampler(loader.frames, max_frames=1, shuffle=False).epoch(0):
        batch = loader.load(plan)
        with torch.no_grad():
            states, lengths = model.encode(batch.features, batch.feature_lengths)
            e, p = model.joint.encoder(states), model.joint.predictor(model.predictor(batch.targets))
            logits = model.joint(e[:, :, None], p[:, None])
        costs.append(rnnt_loss(logits, batch.targets, lengths.int(), batch.target_lengths, blank=0, reduction="sum"))
        count += int(batch.target_lengths)
    (line,) = [m for m in metrics(finished) if m["kind"] == "dev" and m["step"] == step]
    assert len(costs) == 12 and line["rnnt"] == pytest.approx(float(sum(costs)) / count, rel=1e-5)


def test_killed_at_any_step_it_goes_on_bit_by_bit(tones: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "stillhouse.cli", "train", str(tones / "run.toml"), "--out", str(out)]
    for kill_after in ("step 6/", "step 15/"):
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(kill_after):
                    os.kill(process.pid, signal.SIGKILL)
                    break
            else:
                pytest.fail(f"the run ended before {kill_after!r}")
            process.stderr.read()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming" in done.stderr and done.stdout.strip() == str(out)
    assert metrics(out) == metrics(finished)
    ours, theirs = (load_run(p, "last")[0].state_dict() for p in (out, finished))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_audio_without_a_transcript_is_decoded(tones: Path, finished: Path, tmp_path: Path) -> None:
    corpus = read_manifest(tones / "corpus.jsonl")
    silent = [u.model_copy(update={"text": "", "audio": str(corpus.audio_path(u))}) for u in corpus.utterances[:3]]
    write_manifest(tmp_path / "corpus.jsonl", silent)
    command = [sys.executable, "-m", "stillhouse.cli", "decode", str(finished), str(tmp_path / "corpus.jsonl")]
    done = subprocess.run([*command, str(tones / "features.h5")], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(h["id"] for h in found) == ["u0", "u1", "u2"] and {h["ref"] for h in found} == {""}


def test_a_finished_run_does_nothing(tones: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    train(tones, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_of_a_version_with_data_workers_goes_on(tones: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("[data]\n", '[data]\nworkers = 2\nworker_start = "fork"\n'))
    with pytest.raises(ConfigError, match=r"data\.workers"):
        load_config(path)
    load_run(tmp_path / "run", "last")
    read_run(tmp_path / "run")
    lines: list[str] = []
    Trainer(load_config(tones / "run.toml"), tmp_path / "run", lines.append).run()
    assert "is done" in lines[-1] and "workers" not in path.read_text()


def test_other_settings_in_the_same_folder_are_refused_in_words(tones: Path, finished: Path) -> None:
    with pytest.raises(StaleError, match=r"optim\.lr: 0\.003 in the run, 0\.5 in the new settings"):
        Trainer(load_config(tones / "run.toml", ["optim.lr=0.5"]), finished)
    Trainer(load_config(tones / "run.toml", ["run.log_every=7"]), finished)  # not a setting of the result


def test_other_units_in_the_same_folder_are_refused(tones: Path, finished: Path, tmp_path: Path) -> None:
    from stillhouse.data.units import train_units

    train_units(["abcd xyz"], "characters").save(tmp_path / "units")
    with pytest.raises((StaleError, CheckpointError)):
        Trainer(load_config(tones / "run.toml", [f"data.units={tmp_path}/units"]), finished)


def test_a_split_without_utterances_is_an_error(tones: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError):
        Trainer(load_config(tones / "run.toml", ["data.train=nothing"]), tmp_path / "run")


def test_a_loss_that_is_not_finite_changes_nothing_and_stops_the_run(tones: Path, tmp_path: Path) -> None:
    from stillhouse.data.errors import StillhouseError

    trainer = Trainer(load_config(tones / "run.toml"), tmp_path / "run")
    with torch.no_grad():
        trainer.model.joint.output.bias.fill_(float("nan"))
    weight = trainer.model.joint.encoder.weight.clone()
    with pytest.raises(StillhouseError, match="10 steps in a row"):
        trainer.run()
    assert torch.equal(weight, trainer.model.joint.encoder.weight)


def test_a_folder_that_cannot_be_is_refused_in_words(tones: Path) -> None:
    with pytest.raises(UsageError, match="cannot write here: Not a directory"):
        Trainer(load_config(tones / "run.toml"), Path(os.devnull) / "run")


def test_no_language_model_library_is_loaded(tones: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from stillhouse.train.config import load_config;"
        "from stillhouse.train.loop.trainer import Trainer;"
        "import stillhouse.distill.transfer, stillhouse.distill.targets;"
        f"config = load_config(Path({str(tones / 'run.toml')!r}), ['optim.steps=2']);"
        f"Trainer(config, Path({str(tmp_path / 'r')!r})).run();"
        "assert 'transformers' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

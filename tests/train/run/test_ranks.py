"""Training over several ranks: the losses of one process; a lost rank ends the job, and its run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crashes import rank_of

from stillhouse.data.errors import UsageError
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.load import load_run
from stillhouse.train.run.ranks import ALONE, GradientSum, Ranks, _from_environment, joined

CHILD = Path(__file__).with_name("ranks_child.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
APART = {"time", "seconds", "realtime", "share", "memory"}  # what the clock and the machine say
EXACT = ["model.dropout=0", "run.log_every=1", "run.timeout_s=60"]


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in APART} for line in lines]


def same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        assert a == {k: pytest.approx(v, rel=1e-4, abs=1e-9) if isinstance(v, float) else v for k, v in b.items()}


def both(tones: Path, out: Path, runs: dict[str, list[str]]) -> None:
    """Each of `runs` alone and over two ranks: equal."""
    for name, changes in runs.items():
        Trainer(load_config(tones / "run.toml", changes), out / "one" / name).run()
    command = [*TORCHRUN, str(CHILD), str(tones / "run.toml"), str(out / "two"), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    for name in runs:
        same(metrics(out / "two" / name), metrics(out / "one" / name))


def test_two_ranks_compute_the_losses_of_one_process_and_one_goes_on_from_two(
    tones: Path, texts: Path, tmp_path: Path
) -> None:
    """Masks of SpecAugment included; `few` has batches that leave a rank without an utterance, and so has `text`."""
    short = [*EXACT, "optim.steps=8", "run.eval_every=4"]
    runs = {"plain": [*short, "optim.ema=0.9"], "few": [*short, "data.batch_frames=250", "loss.ctc_weight=0"]}
    runs["copies"] = [*short, "data.batch_frames=250", "loss.consistency_weight=0.2", "run.eval_every=100"]
    source = tmp_path / "source"
    Trainer(load_config(tones / "run.toml", [*EXACT, "run.seed=7", "optim.steps=1"]), source).run()
    tuned = [f"init.source={source}", "init.freeze=encoder:1,predictor", "init.lr_factor=0.5", "model.layers=3"]
    runs["tuned"] = [*short, *tuned]
    alone = ["text.split=text", "text.lines=3", "text.batch_units=30", "text.pretrain_steps=5"]
    runs["text"] = [*short, f"data.corpus={texts}", *alone, "optim.weight_decay=0.1", "optim.steps=4", "run.keep=9"]
    both(tones, tmp_path, runs)
    assert [m["step"] for m in metrics(tmp_path / "two/tuned") if m["kind"] == "dev"] == [0, 4, 8]
    assert [m["step"] for m in metrics(tmp_path / "two/text") if "text" in m] == list(range(1, 10))
    encoders = [load_run(tmp_path / n / "text", "4")[0].encoder.state_dict() for n in ("one", "two")]
    assert all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())  # no rank decays them
    state = json.loads((tmp_path / "two/plain/checkpoints/step-00000008/state.json").read_text())
    assert state["ranks"] == 2 and state["averaged"] == 8
    # The last checkpoint but one, of two ranks, taken up by one
    last = tmp_path / "two/plain/checkpoints/step-00000008/model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    said: list[str] = []
    Trainer(load_config(tones / "run.toml", runs["plain"]), tmp_path / "two/plain", said.append).run()
    assert any("Going back to step 4" in line for line in said)
    same(metrics(tmp_path / "two/plain"), metrics(tmp_path / "one/plain"))


@pytest.mark.slow
def test_whatever_a_run_transfers_two_ranks_compute_what_one_does(
    tones: Path, texts: Path, states: Path, store: Path, tmp_path: Path
) -> None:
    views = [*EXACT, "optim.steps=12", f"transfer.stores={store}", 'transfer.views=["minilm/*/3,6"]']
    few, contrast = "data.batch_frames=250", "transfer.distance=contrastive"
    text = [f"data.corpus={texts}", "text.split=text", "text.lines=5", "text.pretrain_steps=6"]
    text += [f"transfer.stores={states}", "transfer.aligner=predictor", "transfer.mixing=learned"]
    both(
        tones,
        tmp_path,
        {
            "contrast": [*views, contrast, "transfer.position=word", "transfer.aligner=occupancy"],
            "idle": [*views, contrast, few],
            "sample": [*views, "transfer.mixing=sample", "transfer.sample=1"],
            "learned": [*views, "transfer.mixing=learned", "transfer.layers=[1,2]", "transfer.aligner=cif"],
            "zero": [*views, "transfer.weight=0", "transfer.aligner=predictor", "loss.ctc_weight=0"],
            "several": [
                *EXACT,
                *("optim.steps=12", f"transfer.stores={store}", few, "transfer.a.views=minilm/*/3"),
                *("transfer.a.distance=contrastive", "transfer.b.views=minilm/*/6", "transfer.b.aligner=predictor"),
            ],
            "text": [*views, contrast, *text],
            "pruned": [*EXACT, "optim.steps=50", "loss.kind=pruned"],
            "chunks": [*EXACT, "optim.steps=12", "model.chunk_frames=16", "model.chunk_choices=[0,8,16]"],
        },
    )


@pytest.mark.slow
def test_towards_speech_two_ranks_compute_what_one_does(tones: Path, ears: Path, tmp_path: Path) -> None:
    """The same states are drawn, and frames of one rank are contrasts of the other's."""
    own = [
        *EXACT,
        "optim.steps=12",
        f"transfer.stores={ears}",
        "transfer.a.aligner=frames",
        "transfer.a.state_share=0.4",
    ]
    contrast = [*own, "transfer.a.views=raw/alone/3", "transfer.a.distance=contrastive"]
    coded = [*own, "transfer.a.views=ear/alone/*", "transfer.a.distance=codes", "data.batch_frames=250"]
    both(tones, tmp_path, {"contrast": contrast, "coded": coded})


def killed(command: list[str], rank: int, after: str) -> str:
    """What was said by a job of which `rank` was killed when it said `after`; it must end by itself."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(after):
                os.kill(rank_of(process, rank), signal.SIGKILL)
                break
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1, "".join(said) + rest
    return "".join(said) + rest


def test_a_killed_rank_ends_the_job_in_words_and_the_last_checkpoint_is_whole(tones: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*TORCHRUN, "-m", "stillhouse.cli", "train", str(tones / "run.toml"), "--out", str(out)]
    said = killed([*command, "--set", "optim.steps=2000"], 1, "step 9/")
    assert "error: another rank is lost" in said or "error: the launcher stopped this rank" in said
    assert load_run(out, "last")[3] >= 8


@pytest.mark.slow
def test_killed_at_random_a_run_of_two_ranks_ends_as_it_would_have(tones: Path, tmp_path: Path) -> None:
    """Bit by bit: a sum over two ranks has one order."""
    changes = ["optim.ema=0.9", "run.checkpoint_every=3", "run.log_every=1", "optim.steps=40"]
    sets = [x for change in changes for x in ("--set", change)]

    def command(name: str) -> list[str]:
        return [
            *TORCHRUN,
            "-m",
            "stillhouse.cli",
            "train",
            str(tones / "run.toml"),
            "--out",
            str(tmp_path / name),
            *sets,
        ]

    subprocess.run(command("whole"), check=True, capture_output=True)
    rng = random.Random(7)
    for first in (5, 15, 25):
        killed(command("killed"), rng.randrange(2), f"step {first + rng.randrange(8)}/")
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    ours, theirs = (load_run(tmp_path / name, "last")[0].state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT.*torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "whole numbers"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _from_environment(environment)


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        assert ranks is ALONE and ranks.gather(3) == [3] and ranks.from_first(lambda: 4) == 4
    assert _from_environment({"RANK": "0", "WORLD_SIZE": "1"}) is ALONE
    assert _from_environment(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    ) == Ranks(3, 4, 1, 4)


def test_buckets_are_sent_in_one_order_whatever_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank must send the same buckets in the same order, or they wait for each other for ever."""
    sent: list[int] = []
    ps = [torch.nn.Parameter(torch.ones(4)) for _ in range(5)]
    sums = GradientSum(ps, bucket_bytes=16)
    monkeypatch.setattr(sums, "_send", lambda: (sent.append(len(sums.works)), sums.works.append(None)))
    for used in ([0, 1, 2, 3, 4], [0, 3], [], [4]):
        sent.clear()
        sums.zero()
        loss = sum((ps[i] * (i + 1)).sum() for i in used) + torch.zeros((), requires_grad=True)
        loss.backward()
        while len(sums.works) < len(sums.buckets):
            sums._send()
        assert sent == [0, 1, 2, 3, 4]
        assert [float(p.grad[0]) for p in ps] == [i + 1 if i in used else 0 for i in range(5)]

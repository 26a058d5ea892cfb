"""The bars of the store: reading against np.memmap and zarr-python, writing against a raw file, sizes.

Usage: python tests/bench/bench_store.py [--shape librispeech|wide|short] [--utterances N] [--width D] [--layers L]
       [--tokens MEAN] [--parts …] [--out FILE]
The disk should be a real one, and quiet; hot readings need the store to fit into memory. `wide` is 24 layers of 1,024,
`short` a million utterances of 5 tokens, which takes minutes to make and 3 GB of disk.
A bar fails only where the whole 95 % interval of the ratio over rounds that take turns lies below it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from made_up import MadeUpTeacher, made_up_corpus
from measuring import NO_BAR, Row, at_least, at_most, write_table
from peers import peers
from store_codes import coded
from store_reading import BATCH, Memmap, cold, int8, loading, reading

from stillhouse.data.manifest import Corpus
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk.locks import Scratch
from stillhouse.extract.store.format.plan import Plan
from stillhouse.extract.store.read.rows import TeacherRows
from stillhouse.extract.store.writer import ItemWriter


def writing(folder: Path, corpus: Corpus, teacher: MadeUpTeacher, layers: list[int]) -> list[Row]:
    """All units of a plan (files, checksums, syncs, commits) against one raw file of the same bytes, fsynced."""
    request = Request("made", layers, ["alone"])

    def planned() -> tuple[Plan, TeacherRows, list[str]]:
        shutil.rmtree(folder / "written", ignore_errors=True)
        plan = make_plan(folder / "written", corpus, teacher, request)  # type: ignore[arg-type]
        return plan, TeacherRows(plan, "made"), Store.open(folder / "written").utterance_ids

    plan, rows, ids = planned()
    states = np.random.default_rng(0).normal(size=(int(rows.length.max()), teacher.width)).astype(np.float16)
    order = np.random.default_rng(1).permutation(len(ids))  # as batches by length come

    def raw(i: int) -> float:
        began = time.perf_counter()
        with open(folder / "raw", "wb") as f:
            for _ in layers:
                for u in order:
                    f.write(states[: rows.length[u]].data)
            f.flush()
            os.fsync(f.fileno())
        return time.perf_counter() - began

    def ours(i: int) -> float:
        plan, rows, ids = planned()
        with Scratch(plan.paths) as scratch:
            began = time.perf_counter()
            for unit in plan.work_items():
                a, b = unit.shard.first, unit.shard.last
                none = np.zeros(b - a, dtype=np.int32)
                record = plan.teachers["made"]
                with ItemWriter(
                    plan.paths, scratch.folder, record, unit, rows.start[a:b], rows.length[a:b], ids[a:b]
                ) as writer:
                    for layer in layers:
                        for u in order[(order >= a) & (order < b)]:
                            writer.write(layer, int(u) - a, 0, states[: rows.length[u]])
                    writer.commit(none, none, none, 0)
            return time.perf_counter() - began

    a, b = [], []
    for i in range(9):
        b.append(raw(i))
        a.append(ours(i))
    payload = int(rows.length.sum()) * teacher.width * 2 * len(layers)
    note = f"{payload / np.median(a) / 1e6:,.0f} MB/s, {len(plan.work_items())} units"
    result = [at_least("writing with fsync and commits vs one raw file", a[1:], b[1:], 0.85, note)]
    tracemalloc.start()
    ours(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result.append(at_most("writing: memory beside the states, MB", (peak - states.nbytes) / 1e6, 64))
    return result


def sizes(store: Store) -> list[Row]:
    from stillhouse.extract.pipeline.progress import folder_bytes

    info = store.teacher(store.views[0].teacher)
    hidden = folder_bytes(store.paths.files, store.path / "data.zarr" / info.name / "hidden")
    payload = info.tokens * info.width * 2 * len(store.views)
    vocabulary = sum(
        folder_bytes(store.paths.files, store.path / "data.zarr" / info.name / n)
        for n in ("embedding", "vocab_id", "vocab_piece")
    )
    rest = folder_bytes(store.paths.files, store.path) - hidden - vocabulary
    ids = sum(len(i.encode()) for i in store.utterance_ids)
    allowed = 16 * info.tokens + 96 * len(store.index) + ids
    return [
        at_most("size: `hidden` over payload", hidden / payload, 1.003, f"{len(store.index):,} utterances"),
        at_most(
            "size: all else (vocabulary apart) over 16 bytes a token + 96 an utterance + ids",
            rest / allowed, 1.0, f"vocabulary {vocabulary / 1e6:.1f} MB",
        ),
    ]  # fmt: skip


_OPENED = """
import json, sys, time
import numpy as np
from stillhouse.extract.store import Store
from stillhouse.extract.inspect.facts.store import store_facts

def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")]

def timed(f):
    began = time.perf_counter()
    return f(), time.perf_counter() - began

before = resident()
store, opened = timed(lambda: Store.open(sys.argv[1]))
views, listed = timed(lambda: store.views)
ids = [store.index.id(int(r)) for r in np.random.default_rng(3).choice(len(store.index), 64, replace=False)]
_, first = timed(lambda: store.gather(ids, views[-1:]))
after = resident()
_, told = timed(lambda: store_facts(store))
memory = [b - a for a, b in zip(before, after)]
print(json.dumps({"open": opened + listed, "first": first, "memory": memory, "info": told}))
"""


def opening(store: Store) -> list[Row]:
    """What a process of its own pays to open the store, for its first batch, and to be told what is in it."""
    found = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", _OPENED, str(store.path)], capture_output=True, check=True)
        found.append(json.loads(done.stdout))

    def row(what: str, values: list[float], note: str = "") -> Row:
        return Row(what, float(np.median(values)), min(values), max(values), NO_BAR, True, note)

    mapped = np.median([f["memory"][1] for f in found])
    return [
        row("opening and listing its views, ms", [1e3 * f["open"] for f in found]),
        row(f"first gather of {BATCH} utterances, ms", [1e3 * f["first"] for f in found], "index and files are opened"),
        row("memory of an open store, MB", [f["memory"][0] for f in found], f"and {mapped:.1f} MB of files, shared"),
        row("what `inspect info` looks up, ms", [1e3 * f["info"] for f in found]),
    ]


PARTS = ("reading", "cold", "opening", "loading", "int8", "codes", "writing", "sizes", "peers")
SHAPES: dict[str, dict[str, Any]] = {
    "librispeech": {"utterances": 5000, "width": 384, "layers": 7, "tokens": 38, "parts": ",".join(PARTS)},
    "wide": {"utterances": 2000, "width": 1024, "layers": 24, "tokens": 38, "parts": "reading,cold,opening,sizes"},
    "short": {"utterances": 1_000_000, "width": 128, "layers": 2, "tokens": 5, "parts": "reading,opening,sizes"},
}
# Sizes of a larger store, where what is read hot must fit into memory twice: fixed ones count for less in it
SIZED = {"wide": 6000}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="librispeech", help="What is not given is as in it.")
    parser.add_argument("--utterances", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=float, help="Of an utterance, on average.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--parts", help=f"Some of {', '.join(PARTS)}, with commas.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu-time", action="store_true", help="Time hot reading in processor seconds: busy machine.")
    options = parser.parse_args()
    for name, value in SHAPES[options.shape].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    whole = {"rounds": parser.get_default("rounds")} | SHAPES[options.shape]
    suffix = "" if options.shape == "librispeech" else f"-{options.shape}"
    out = options.out or Path(__file__).parents[2] / "docs" / "bench" / f"store{suffix}.md"
    parts = options.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts are of {', '.join(PARTS)}")
    clock = time.process_time if options.cpu_time else time.perf_counter
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-bench-", dir=options.folder))
    rows: list[Row] = []
    try:
        corpus = made_up_corpus(options.utterances, options.tokens)
        teacher = MadeUpTeacher(options.width, options.layers - 1)
        layers = list(range(options.layers))

        def made(dtype: str, of: Corpus = corpus) -> Store:
            path = folder / dtype
            extract(path, of, teacher, Request("made", layers, ["alone"], dtype=dtype))  # type: ignore[arg-type]
            return Store.open(path)

        store = made("float16")
        if "reading" in parts:
            flat = folder / "flat"
            flat.mkdir()
            rows += reading(store, Memmap(store, flat), options.rounds, clock)
            shutil.rmtree(flat)
        if "cold" in parts:
            rows += cold(store, 12)
        if "opening" in parts:
            rows += opening(store)
        if "loading" in parts:
            rows += loading(store, 40)
        if "int8" in parts:
            rows += int8(store, made("int8"), options.rounds // 2)
            shutil.rmtree(folder / "int8")
        if "codes" in parts:
            rows += coded(folder, options.rounds, 1000, clock)
        if "writing" in parts:
            rows += writing(folder, corpus, teacher, layers)
        if "sizes" in parts:
            if options.utterances < SIZED.get(options.shape, 0):
                shutil.rmtree(store.path)
                store = made("float16", made_up_corpus(SIZED[options.shape], options.tokens))
            rows += sizes(store)
        if "peers" in parts:
            rows += peers(store, folder / "peers")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    remarks = [
        f"{options.utterances:,} utterances of {options.tokens:g} tokens, {options.layers} layers × {options.width}, "
        "float16. Rounds take turns in one process. Ratios are medians, and are above 1 if Stillhouse is faster. A bar "
        "fails only if the whole interval lies below it. The yardstick for reading is a loop over np.memmap files. It "
        "reads the same states, token ids and spans. Rows without a bar are other ways to keep such states, read for "
        "the same utterances and layers. `gather` reuses the memory of dropped batches. The loop gets its memory from "
        "np.empty, as such loops do.",
        "",
        f"The process held at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of memory.",
    ]
    if options.cpu_time:
        remarks.append(
            "Hot reading is timed in processor seconds. The rest is timed in wall seconds on a busy machine."
        )
    given = [
        f"--{k} {getattr(options, k)}"
        for k in ("utterances", "width", "layers", "rounds", "parts")
        if getattr(options, k) != whole[k]
    ]
    given += ["--cpu-time"] * options.cpu_time
    command = "make bench-store"
    if suffix or given:
        command = " ".join(["python tests/bench/bench_store.py", f"--shape {options.shape}", *given])
    write_table(out, f"The store: bars{suffix and f', {options.shape}'}", command, rows, remarks)
    sys.exit(0 if all(r.holds for r in rows) else 1)


if __name__ == "__main__":
    main()

"""The bars of the store: reading against np.memmap and zarr-python, writing against a raw file, sizes.

Usage: python tests/bench/bench_store.py [--shape librispeech|wide|short] [--utterances N] [--width D] [--layers L]
       [--tokens MEAN] [--parts …] [--out FILE]
The disk should be a real one, and quiet; hot readings need the store to fit into memory. `wide` is 24 layers of 1,024,
`short` a million utterances of 5 tokens, which takes minutes to make and 3 GB of disk.
A bar fails only where the whole 95 % interval of the ratio over rounds that take turns lies below it.
"""

# ruff: noqa: B023 (what is timed runs inside of the loop that defines it)

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from made_up import MadeUpTeacher, made_up_corpus
from measuring import NO_BAR, Row, at_least, at_most, rounds, write_table
from peers import peers

from stillhouse.data.manifest import Corpus
from stillhouse.extract.plan import Request, make_plan
from stillhouse.extract.run import extract
from stillhouse.extract.store import Store
from stillhouse.extract.store.files import Scratch
from stillhouse.extract.store.plan import Plan
from stillhouse.extract.store.rows import TeacherRows
from stillhouse.extract.store.writer import UnitWriter

BATCH = 64


class Memmap:
    """The yardstick: flat np.memmap files of states, token ids and spans, and a loop that copies into packed arrays.

    It does what `gather` does (ids to rows by a dict; states, token ids and spans), and nothing else.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.files, self.where, at = {}, {}, 0
        ids, teacher = store.utterance_ids, store.views[0].teacher
        lengths, token_id, span = store.tokens(ids, teacher)
        for i, n in zip(ids, lengths.tolist()):
            self.where[i] = (at, n)
            at += n
        self.width = store.teacher(teacher).width
        for name, values in (("token_id", token_id), ("span", span)):
            out = np.memmap(folder / f"{name}.raw", dtype=np.int32, mode="w+", shape=values.shape)
            out[:] = values
            out.flush()
            self.files[name] = np.memmap(folder / f"{name}.raw", dtype=np.int32, mode="r", shape=values.shape)
        for view in store.views:
            path = folder / f"{view.layer}.raw"
            out = np.memmap(path, dtype=np.float16, mode="w+", shape=(at, self.width))
            for first in range(0, len(ids), 500):
                part = store.gather(ids[first : first + 500], [view]).states[view]
                begin = self.where[ids[first]][0]
                out[begin : begin + len(part)] = part
            out.flush()
            self.files[view] = np.memmap(path, dtype=np.float16, mode="r", shape=(at, self.width))

    def gather(self, ids: list[str], views: list) -> dict:
        rows = [self.where[i] for i in ids]
        total = sum(n for _, n in rows)
        result = {}
        for view in ("token_id", "span", *views):
            source, at = self.files[view], 0
            out = np.empty((total, *source.shape[1:]), dtype=source.dtype)
            for s, n in rows:
                out[at : at + n] = source[s : s + n]
                at += n
            result[view] = out
        return result


def batches(ids: list[str], count: int) -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [[ids[i] for i in rng.choice(len(ids), BATCH, replace=False)] for _ in range(count)]


def drop_cache(paths: list[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_bytes() -> int:
    with open("/proc/self/io") as f:
        return int(next(line for line in f if line.startswith("read_bytes")).split()[1])


def reading(store: Store, flat: Memmap, n: int, clock: Callable[[], float]) -> list[Row]:
    picks = batches(store.utterance_ids, n + 2)
    one, every = store.views[-1:], store.views
    checked = Store.open(store.path, checksums=True)
    for view in every:  # all pages in memory before anything is timed
        for first in range(0, len(store.utterance_ids), 500):
            store.gather(store.utterance_ids[first : first + 500], [view])
    for view in every:
        flat.files[view].max()
    assert all(np.array_equal(store.gather(picks[0], every).states[v], flat.gather(picks[0], every)[v]) for v in every)
    for p in picks:  # hot: in memory, and mapped into this process by all
        store.gather(p, every)
        checked.gather(p, every)
        flat.gather(p, every)
    rows = []
    for views, name, bar, checked_bar in ((one, "1 layer", 0.85, 0.60), (every, f"{len(every)} layers", 0.90, 0.60)):
        ours, theirs = rounds(lambda i: store.gather(picks[i], views), lambda i: flat.gather(picks[i], views), n, clock)
        rows.append(at_least(f"gather {BATCH} random utterances, hot, {name}, vs np.memmap", ours, theirs, bar))
        payload = sum(flat.where[i][1] for i in picks[5]) * flat.width * 2 * len(views)
        rows[-1] = Row(**(vars(rows[-1]) | {"note": f"{payload / np.median(ours) / 1e9:.2f} GB/s"}))
        ours, theirs = rounds(
            lambda i: checked.gather(picks[i], views), lambda i: flat.gather(picks[i], views), n, clock
        )
        rows.append(at_least(f"the same with checksums, {name}", ours, theirs, checked_bar))
    import zarr

    array = zarr.open_array(store.path / "data.zarr" / one[0].teacher / "hidden", mode="r")
    start, length = store._rows_of(one[0].teacher).start, store._rows_of(one[0].teacher).length

    def through_zarr(i: int, layers: int) -> None:
        for r in store.index.rows(picks[i][:8]):
            s, m = int(start[r]), int(length[r])
            if layers == 1:
                array[0, len(every) - 1, s : s + m]
            else:
                array[0, :, s : s + m]

    for views, name, bar, k in ((one, "1 layer", 100, 1), (every, f"{len(every)} layers", 50, len(every))):
        ours, theirs = rounds(lambda i: store.gather(picks[i], views), lambda i: through_zarr(i, k), 8, clock)
        rows.append(
            at_least(f"hot, {name}, vs zarr-python on the same store", ours, [t * BATCH / 8 for t in theirs], bar)
        )
    return rows


def cold(store: Store, n: int) -> list[Row]:
    every = store.views
    paths = sorted((store.path / "data.zarr" / every[0].teacher / "hidden" / "c").rglob("*"))
    paths = [p for p in paths if p.is_file()]
    picks = batches(store.utterance_ids, n)
    t = store._rows_of(every[0].teacher)

    def plain(i: int) -> None:
        fds: dict[Path, int] = {}
        for view in every:
            c, k = store._axes(view)
            for r in store.index.rows(picks[i]):
                s, m = int(t.start[r]), int(t.length[r])
                path = store.paths.hidden(view.teacher, c, k, s // t.shard_rows)
                if path not in fds:
                    fds[path] = os.open(path, os.O_RDONLY)
                os.pread(fds[path], m * t.row_bytes, s % t.shard_rows * t.row_bytes)
        for fd in fds.values():
            os.close(fd)

    ours, theirs, read, payload = [], [], 0, 0
    for i in range(n):
        for which in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            store.close()  # pages that a map holds cannot be dropped
            for view in every:
                for shard in t.shards:
                    path = store.paths.hidden(view.teacher, *store._axes(view), shard.number)
                    store._handles.open(path, t.shard_rows, t.row_bytes, shard.rows)
            drop_cache(paths)
            before, began = disk_bytes(), time.perf_counter()
            if which == "ours":
                g = store.gather(picks[i], every)
                ours.append(time.perf_counter() - began)
                read += disk_bytes() - before
                payload += sum(s.nbytes for s in g.states.values())
            else:
                plain(i)
                theirs.append(time.perf_counter() - began)
    rows = [at_least(f"cold, {len(every)} layers, vs a plain pread loop", ours, theirs, 1.7)]
    if read:
        rows.append(at_most("cold: bytes from disk over payload", read / payload, 1.2))
    return rows


def int8(store: Store, small: Store, n: int) -> list[Row]:
    """An int8 store of the same states: its size, and reading to float32 against float16 that numpy converts."""
    picks, every = batches(store.utterance_ids, n + 2), store.views
    for p in picks:
        small.gather(p, every)
        store.gather(p, every)

    def converted(i: int) -> list[np.ndarray]:
        return [s.astype(np.float32) for s in store.gather(picks[i], every).states.values()]

    ours, theirs = rounds(lambda i: small.gather(picks[i], every), converted, n)
    own, _ = rounds(lambda i: store.gather(picks[i], every, "float32"), lambda i: None, n)
    note = f'float16 through `gather(…, "float32")` takes {np.median(own) / np.median(ours):.2f} times as long'
    rows = [
        at_least(f"int8 to float32 vs float16 and numpy's conversion, {len(every)} layers", ours, theirs, 1.3, note)
    ]
    from stillhouse.extract.progress import folder_bytes

    width, name = store.teacher(every[0].teacher).width, every[0].teacher
    of = [folder_bytes(small.path / "data.zarr" / name / a) for a in ("hidden", "scale")]
    ratio = sum(of) / folder_bytes(store.path / "data.zarr" / name / "hidden")
    # Its shards end in whole chunks, too, and their index is counted twice
    bar = round((width + 2.5) / (2 * width) + 0.002, 4)
    rows.append(at_most("int8: states and scales over float16's", ratio, bar))
    worst = max(loss.relative for v in every if (loss := small.loss(v)) is not None)
    rows.append(at_most("int8: relative error of the worst layer", worst, 0.01))
    return rows


def loading(store: Store, n: int) -> list[Row]:
    """Batches a second: one thread in this process against a DataLoader with two workers."""
    import torch

    picks, views = batches(store.utterance_ids, n), store.views

    def thread(_: int) -> None:
        ready: queue.Queue = queue.Queue(2)

        def work() -> None:
            for p in picks:
                ready.put(store.gather(p, views))

        worker = threading.Thread(target=work)
        worker.start()
        for _ in picks:
            ready.get()
        worker.join()

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(picks)

        def __getitem__(self, i: int) -> list:
            return [torch.from_numpy(s) for s in store.gather(picks[i], views).states.values()]

    loader = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=2, persistent_workers=True)

    def workers(_: int) -> None:
        for _ in loader:
            pass

    ours, theirs = rounds(thread, workers, 5)
    return [at_least("prefetch thread vs DataLoader with 2 workers", ours, theirs, 3)]


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
            for unit in plan.units():
                a, b = unit.shard.first, unit.shard.last
                none = np.zeros(b - a, dtype=np.int32)
                record = plan.teachers["made"]
                with UnitWriter(
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
    note = f"{payload / np.median(a) / 1e6:,.0f} MB/s, {len(plan.units())} units"
    result = [at_least("writing with fsync and commits vs one raw file", a[1:], b[1:], 0.85, note)]
    tracemalloc.start()
    ours(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result.append(at_most("writing: memory beside the states, MB", (peak - states.nbytes) / 1e6, 64))
    return result


def sizes(store: Store) -> list[Row]:
    from stillhouse.extract.progress import folder_bytes

    info = store.teacher(store.views[0].teacher)
    hidden = folder_bytes(store.path / "data.zarr" / info.name / "hidden")
    payload = info.tokens * info.width * 2 * len(store.views)
    vocabulary = sum(
        folder_bytes(store.path / "data.zarr" / info.name / n) for n in ("embedding", "vocab_id", "vocab_piece")
    )
    rest = folder_bytes(store.path) - hidden - vocabulary
    ids = sum(len(i.encode()) for i in store.utterance_ids)
    allowed = 16 * info.tokens + 96 * len(store.index) + ids
    return [
        at_most("size: `hidden` over payload", hidden / payload, 1.003),
        at_most(
            "size: all else (vocabulary apart) over 16 bytes a token + 96 an utterance + ids",
            rest / allowed, 1.0, f"vocabulary {vocabulary / 1e6:.1f} MB",
        ),
    ]  # fmt: skip


_OPENED = """
import json, sys, time
import numpy as np
from stillhouse.extract.store import Store
from stillhouse.extract.inspect.facts import store_facts

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


PARTS = ("reading", "cold", "opening", "loading", "int8", "writing", "sizes", "peers")
SHAPES: dict[str, dict[str, Any]] = {
    "librispeech": {"utterances": 5000, "width": 384, "layers": 7, "tokens": 38, "parts": ",".join(PARTS)},
    "wide": {"utterances": 500, "width": 1024, "layers": 24, "tokens": 38, "parts": "reading,cold,opening,sizes"},
    "short": {"utterances": 1_000_000, "width": 128, "layers": 2, "tokens": 5, "parts": "reading,opening,sizes"},
}


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
    suffix = "" if options.shape == "librispeech" else f"-{options.shape}"
    out = options.out or Path(__file__).parents[2] / "docs" / f"bench-store{suffix}.md"
    parts = options.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts are of {', '.join(PARTS)}")
    clock = time.process_time if options.cpu_time else time.perf_counter
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-bench-", dir=options.folder))
    rows: list[Row] = []
    try:
        corpus, teacher = (
            made_up_corpus(options.utterances, options.tokens),
            MadeUpTeacher(options.width, options.layers - 1),
        )
        layers = list(range(options.layers))

        def made(dtype: str) -> Store:
            path = folder / dtype
            extract(path, corpus, teacher, Request("made", layers, ["alone"], dtype=dtype))  # type: ignore[arg-type]
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
        if "writing" in parts:
            rows += writing(folder, corpus, teacher, layers)
        if "sizes" in parts:
            rows += sizes(store)
        if "peers" in parts:
            rows += peers(store, folder / "peers")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    remarks = [
        f"{options.utterances:,} utterances of {options.tokens:g} tokens, {options.layers} layers × {options.width}, "
        "float16; rounds take turns in one process; ratios are medians, above 1 where Stillhouse is faster, and a bar "
        "fails only where the whole interval lies below it. The yardstick for reading is a loop over np.memmap files "
        "that brings the same: states, token ids and spans. Rows without a bar are other ways to keep such states, "
        "read for the same utterances and layers.",
        "",
        f"Most memory that the process held: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB.",
    ]
    if options.cpu_time:
        remarks.append("Hot reading is timed in processor seconds, the rest in wall seconds on a busy machine.")
    command = f"python tests/bench/bench_store.py --shape {options.shape}" if suffix else "make bench-store"
    write_table(out, f"The store: bars{suffix and f', {options.shape}'}", command, rows, remarks)
    sys.exit(0 if all(r.holds for r in rows) else 1)


if __name__ == "__main__":
    main()

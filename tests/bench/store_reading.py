"""What bench_store.py times of reading: hot and cold, int8, and through a trainer's loaders, beside np.memmap."""

# ruff: noqa: B023 (what is timed runs inside of the loop that defines it)

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, at_least, at_most, beside, rounds

from stillhouse.extract.store import Gathered, Store

BATCH = 64


class Memmap:
    """The yardstick: flat np.memmap files of states, token ids and spans, and a loop that copies into packed arrays.

    It does what `gather` does (ids to rows by a dict; states, token ids and spans), and nothing else.
    """

    def __init__(self, store: Store, folder: Path, dtype: str | None = None) -> None:
        self.files, self.where, at = {}, {}, 0
        ids, teacher = store.utterance_ids, store.views[0].teacher
        lengths, token_id, span = store.tokens(ids, teacher)
        for i, n in zip(ids, lengths.tolist()):
            self.where[i] = (at, n)
            at += n
        for name, values in (("token_id", token_id), ("span", span)):
            out = np.memmap(folder / f"{name}.raw", dtype=np.int32, mode="w+", shape=values.shape)
            out[:] = values
            out.flush()
            self.files[name] = np.memmap(folder / f"{name}.raw", dtype=np.int32, mode="r", shape=values.shape)
        for view in store.views:
            path = folder / f"{view.layer}.raw"
            empty = store.gather([], [view], dtype).states[view]
            self.width, kind = empty.shape[1], empty.dtype
            out = np.memmap(path, dtype=kind, mode="w+", shape=(at, self.width))
            for first in range(0, len(ids), 500):
                part = store.gather(ids[first : first + 500], [view], dtype).states[view]
                begin = self.where[ids[first]][0]
                out[begin : begin + len(part)] = part
            out.flush()
            self.files[view] = np.memmap(path, dtype=kind, mode="r", shape=(at, self.width))

    def gather(self, ids: list[str], views: list, tokens: bool = True) -> dict:
        rows = [self.where[i] for i in ids]
        total = sum(n for _, n in rows)
        result = {}
        for view in (*(("token_id", "span") if tokens else ()), *views):
            source, at = self.files[view], 0
            out = np.empty((total, *source.shape[1:]), dtype=source.dtype)
            for s, n in rows:
                out[at : at + n] = source[s : s + n]
                at += n
            result[view] = out
        return result


def ours_of(store: Store, ids: list[str], views: list, dtype: str | None = None) -> Gathered:
    """Read states, token ids and spans, as `Memmap.gather` does."""
    batch = store.gather(ids, views, dtype)
    assert all(len(batch.token_id[t]) == len(batch.span[t]) for t in batch.lengths)
    return batch


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
        ours, theirs = rounds(
            lambda i: ours_of(store, picks[i], views), lambda i: flat.gather(picks[i], views), n, clock
        )
        rows.append(at_least(f"gather {BATCH} random utterances, hot, {name}, vs np.memmap", ours, theirs, bar))
        payload = sum(flat.where[i][1] for i in picks[5]) * flat.width * 2 * len(views)
        rows[-1] = Row(**(vars(rows[-1]) | {"note": f"{payload / np.median(ours) / 1e9:.2f} GB/s"}))
        ours, theirs = rounds(
            lambda i: store.gather(picks[i], views), lambda i: flat.gather(picks[i], views, tokens=False), n, clock
        )
        rows.append(at_least(f"the same, states alone, {name}", ours, theirs, 0.85))
        ours, theirs = rounds(
            lambda i: ours_of(checked, picks[i], views), lambda i: flat.gather(picks[i], views), n, clock
        )
        rows.append(at_least(f"the same with checksums, {name}", ours, theirs, checked_bar))
    import zarr

    array = zarr.open_array(store.path / "data.zarr" / one[0].teacher / "hidden", mode="r")
    start, length = store._teacher_rows(one[0].teacher).start, store._teacher_rows(one[0].teacher).length

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
        # What a loop that does nothing but copy would have: at wide states bytes are what takes the time
        loop, theirs = rounds(lambda i: flat.gather(picks[i], views), lambda i: through_zarr(i, k), 8, clock)
        theirs = [t * BATCH / 8 for t in theirs]
        rows.append(beside(f"for comparison: np.memmap, {name}, vs zarr-python", loop, theirs))
    return rows


def cold(store: Store, n: int) -> list[Row]:
    every = store.views
    paths = sorted((store.path / "data.zarr" / every[0].teacher / "hidden" / "c").rglob("*"))
    paths = [p for p in paths if p.is_file()]
    picks = batches(store.utterance_ids, n)
    t = store._teacher_rows(every[0].teacher)

    def plain(i: int) -> None:
        fds: dict[Path, int] = {}
        for view in every:
            c, k = store.axes(view)
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
                    path = store.paths.hidden(view.teacher, *store.axes(view), shard.number)
                    store._states.handles.open(path, t.shard_rows, t.row_bytes, shard.rows)
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
    from stillhouse.extract.pipeline.progress import folder_bytes

    width, name = store.teacher(every[0].teacher).width, every[0].teacher
    of = [folder_bytes(small.paths.files, small.path / "data.zarr" / name / a) for a in ("hidden", "scale")]
    ratio = sum(of) / folder_bytes(store.paths.files, store.path / "data.zarr" / name / "hidden")
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

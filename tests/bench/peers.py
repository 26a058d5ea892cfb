"""What others keep such states in, read beside the store: the same utterances, the same layers, in turns.

Invariant: a peer that is not installed is named as such, never left out; what it reads is compared with the store
first. Lossy ones are compared within their loss. Run: `make bench-store`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import NO_BAR, Row, absent, beside, rounds

from stillhouse.extract.store import Store, View

UTTERANCES, BATCH, ROUNDS = 1000, 64, 8
Read = Callable[[Sequence[str], Sequence[View]], list[np.ndarray]]  # one array [N, D] an utterance and view


def safetensors(store: Store, ids: list[str], folder: Path) -> Read:
    """A file an utterance, a tensor a layer."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    for i, states in each(store, ids):
        save_file({str(v.layer): s for v, s in states.items()}, folder / f"{i}.safetensors")

    def read(ids: Sequence[str], views: Sequence[View]) -> list[np.ndarray]:
        out = []
        for i in ids:
            with safe_open(folder / f"{i}.safetensors", "np") as f:
                out += [f.get_tensor(str(v.layer)) for v in views]
        return out

    return read


def lhotse_hdf5(store: Store, ids: list[str], folder: Path) -> Read:
    """NumpyHdf5Writer: a dataset an utterance and layer."""
    from lhotse.features.io import NumpyHdf5Reader, NumpyHdf5Writer

    with NumpyHdf5Writer(folder / "states") as writer:
        for i, states in each(store, ids):
            for v, s in states.items():
                writer.write(f"{i}-{v.layer}", s)
        path = writer.storage_path
    reader = NumpyHdf5Reader(path)
    return lambda ids, views: [reader.read(f"{i}-{v.layer}") for i in ids for v in views]


def lhotse_lilcom(store: Store, ids: list[str], folder: Path) -> Read:
    """LilcomChunkyWriter: lossy compression, the default of lhotse's recipes."""
    import lilcom  # noqa: F401 (lhotse needs it)
    from lhotse.features.io import LilcomChunkyReader, LilcomChunkyWriter

    keys = {}
    with LilcomChunkyWriter(folder / "states") as writer:
        for i, states in each(store, ids):
            for v, s in states.items():
                keys[i, v.layer] = writer.write(f"{i}-{v.layer}", s.astype(np.float32))
        path = writer.storage_path
    reader = LilcomChunkyReader(path)
    return lambda ids, views: [reader.read(keys[i, v.layer]) for i in ids for v in views]


def hf_datasets(store: Store, ids: list[str], folder: Path) -> Read:
    """An Arrow table, memory-mapped: a row an utterance, a column a layer."""
    import datasets

    datasets.disable_progress_bars()
    width = store.teacher(store.views[0].teacher).width
    row = {i: n for n, i in enumerate(ids)}
    columns = {str(v.layer): datasets.Array2D((None, width), "float16") for v in store.views}

    def rows() -> Any:
        for _, states in each(store, ids):
            yield {str(v.layer): s for v, s in states.items()}

    features = datasets.Features(columns)
    table = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder), writer_batch_size=100)

    def read(ids: Sequence[str], views: Sequence[View]) -> list[np.ndarray]:
        names = [str(v.layer) for v in views]
        found = table.select_columns(names).with_format("numpy")[[row[i] for i in ids]]
        return [found[name][n] for n in range(len(ids)) for name in names]

    return read


def tensorstore(store: Store, ids: list[str], folder: Path) -> Read:
    """The store itself, as the Zarr v3 that it is: all reads of a batch in flight at once."""
    import tensorstore as ts

    view = store.views[0]
    path = store.path / "data.zarr" / view.teacher / "hidden"
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, read=True).result()
    start, length = store._teacher_rows(view.teacher).start, store._teacher_rows(view.teacher).length

    def read(ids: Sequence[str], views: Sequence[View]) -> list[np.ndarray]:
        places = [(int(start[r]), int(length[r])) for r in store.rows(ids)]
        axes = [store.axes(v) for v in views]
        futures = [array[c, k, s : s + n].read() for s, n in places for c, k in axes]
        return [f.result() for f in futures]

    return read


PEERS: list[tuple[str, str, Callable[[Store, list[str], Path], Read], float]] = [
    ("safetensors, a file an utterance", "safetensors", safetensors, 0),
    ("lhotse, NumpyHdf5Writer", "lhotse", lhotse_hdf5, 0),
    ("lhotse, LilcomChunkyWriter", "lilcom", lhotse_lilcom, 0.2),
    ("Hugging Face datasets, Arrow", "datasets", hf_datasets, 0),
    ("tensorstore on the same store", "tensorstore", tensorstore, 0),
]


def each(store: Store, ids: list[str]) -> Any:
    """(utterance, {view: [N, D]}), one after the other."""
    for i in ids:
        yield i, store.gather([i], store.views).states


def peers(store: Store, folder: Path) -> list[Row]:
    """A row a peer and number of layers, without a bar."""
    ids, every = store.utterance_ids[:UTTERANCES], store.views
    rng = np.random.default_rng(2)
    picks = [[ids[i] for i in rng.choice(len(ids), min(BATCH, len(ids)), replace=False)] for _ in range(ROUNDS + 2)]
    info = store.teacher(every[0].teacher)
    payload = int(store.tokens(ids, info.name)[0].sum()) * info.width * 2 * len(every)
    rows = []
    for name, _package, make, loss in PEERS:
        mine = folder / name.split(",")[0].replace(" ", "-").lower() / make.__name__
        mine.mkdir(parents=True)
        began = time.perf_counter()
        try:
            read = make(store, ids, mine)
        except ImportError as e:
            rows.append(absent(f"hot, vs {name}", f"not installed: {e.name} (pip install -e '.[peers]')"))
            continue
        took, size = time.perf_counter() - began, sum(p.stat().st_size for p in mine.rglob("*") if p.is_file())
        if size:
            note = f"written at {payload / took / 1e6:,.0f} MB/s, without fsync"
            rows.append(Row(f"on disk over the states' bytes: {name}", *[size / payload] * 3, NO_BAR, True, note))
        got, want = read(picks[0], every), store.gather(picks[0], every)
        at = 0
        for n, length in enumerate(want.lengths[every[0].teacher].tolist()):
            for k, view in enumerate(every):
                ours = want.states[view][at : at + length].astype(np.float32)
                theirs = np.asarray(got[n * len(every) + k], np.float32)
                assert np.abs(ours - theirs).max(initial=0) <= loss, (name, view)
            at += length
        for views, words in ((every[-1:], "1 layer"), (every, f"{len(every)} layers")):
            ours, theirs = rounds(
                lambda i, v=views: store.gather(picks[i], v), lambda i, v=views, r=read: r(picks[i], v), ROUNDS
            )
            rows.append(beside(f"hot, {words}, vs {name}", ours, theirs))
    return rows

"""What bench_store.py times of pq stores: codes and decoded states beside np.memmap, encoding, and the error.

Invariant: the yardstick reads the same codes, token ids and spans from flat np.memmap files. It decodes them by a
table of what each code stands for, either as numpy looks them up or by the plainest loop that numba compiles.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from made_up import MadeUpTeacher, made_up_corpus
from measuring import NO_BAR, Row, at_least, rounds
from store_reading import BATCH, Memmap, batches, ours_of

from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk.layout import dtype_of
from stillhouse.extract.store.format.pq import decoding_table
from stillhouse.extract.teacher.contexts import Window
from stillhouse.extract.teacher.forward import encode_tensor, tensors

WIDTH, CODES, FRAMES = 768, 32, 400  # WavLM's width, and 8 s at 50 Hz


class SpeechLikeTeacher(MadeUpTeacher):
    """States with such a spectrum: the n-th axis has 1/n of the variance, and five dimensions are huge."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        rng = np.random.default_rng(4)
        axes = np.linalg.qr(rng.normal(size=(width, width)))[0] / np.sqrt(np.arange(1, width + 1))[:, None]
        states = rng.normal(size=(1 << 15, width)) @ axes
        states[:, rng.choice(width, 5, replace=False)] *= 300
        self._pool = torch.from_numpy(states.astype(np.float32))

    def states(self, windows: Sequence[Window], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        b, t = len(windows), max(len(w.ids) for w in windows)
        rows = torch.arange(b * t) + int(windows[0].ids[1])
        return {k: self._pool[(rows + k) % len(self._pool)].reshape(b, t, -1) for k in layers}


@numba.njit
def _looked_up(codes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    for n in range(codes.shape[0]):
        for m in range(codes.shape[1]):
            out[n, m] = table[m, codes[n, m]]


def coded(folder: Path, n: int, utterances: int, clock: Callable[[], float]) -> list[Row]:
    """Return the rows of a pq store of one layer."""
    teacher = SpeechLikeTeacher(WIDTH, 1)
    request = Request("made", [1], ["alone"], dtype=f"pq:{CODES}")
    extract(folder / "pq", made_up_corpus(utterances, FRAMES), teacher, request)  # type: ignore[arg-type]
    store = Store.open(folder / "pq")
    flat_folder = folder / "flat-codes"
    flat_folder.mkdir()
    flat, [view] = Memmap(store, flat_folder, "codes"), store.views
    picks = batches(store.utterance_ids, n + 2)
    mean, std, book = store.norms_stored(view)
    table = decoding_table(mean, std, book, dtype=np.float32)
    part = np.arange(CODES)

    def by_numpy(i: int) -> np.ndarray:
        codes = flat.gather(picks[i], [view])[view]
        return table[part, codes].reshape(len(codes), WIDTH)

    def by_numba(i: int) -> np.ndarray:
        codes = flat.gather(picks[i], [view])[view]
        out = np.empty((len(codes), CODES, WIDTH // CODES), np.float32)
        _looked_up(codes, table, out)
        return out.reshape(len(codes), WIDTH)

    for i in range(len(picks)):  # hot: in memory, and mapped into this process by all
        ours = store.gather(picks[i], [view]).states[view]
        codes = store.gather(picks[i], [view], "codes").states[view]
        assert np.array_equal(ours, by_numpy(i)) and np.array_equal(ours, by_numba(i))
        assert np.array_equal(codes, flat.gather(picks[i], [view])[view])
    what = f"pq:{CODES} of {WIDTH}, {BATCH} random utterances of {FRAMES} rows"
    times = rounds(
        lambda i: ours_of(store, picks[i], [view], "codes"), lambda i: flat.gather(picks[i], [view]), n, clock
    )
    rows = [at_least(f"{what}: codes vs np.memmap of the codes", *times, 0.9)]
    times = rounds(
        lambda i: store.gather(picks[i], [view], "codes"),
        lambda i: flat.gather(picks[i], [view], tokens=False),
        n,
        clock,
    )
    rows.append(at_least("the same, codes alone", *times, 0.85))
    for name, peer in (("numpy's take", by_numpy), ("a numba loop", by_numba)):
        times = rounds(lambda i: store.gather(picks[i], [view]), peer, n, clock)
        rows.append(at_least(f"the same decoded to float32, vs np.memmap of the codes and {name}", *times, 0.9))
    loss = store.loss(view)
    assert loss is not None
    note = "1/n spectrum, five huge dimensions"
    rows.append(Row("pq: error of standardised states", *(loss.standardised,) * 3, NO_BAR, True, note))
    states = teacher._pool[:8192]
    for dtype, norm in ((f"pq:{CODES}", (mean, std, book)), ("int8", (mean, std))):
        taken = []
        for _ in range(6):
            began = time.thread_time()
            encode_tensor(states, dtype_of(dtype), tensors(norm, "cpu"))
            taken.append(len(states) / (time.thread_time() - began) / 1e3)
        best = max(taken)
        rows.append(Row(f"encoding to {dtype}, thousand rows of {WIDTH} a second", best, best, best, NO_BAR, True))
    return rows

"""Measures features: fbank's speed, and random gathers from features.h5 against a memory map.

Run: python -m pytest tests/bench/bench_features.py -m bench -s   (bar: gather ≥ 0.8 of np.memmap, median of rounds)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.audio import change_speed
from stillhouse.data.fbank import fbank
from stillhouse.data.feature_file import FeatureFile, FeatureSettings, Rows, write_rows

pytestmark = pytest.mark.bench
UTTERANCES, BATCH, ROUNDS = 1500, 32, 15


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def test_gather_against_a_memory_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = Rows()
    noise = rng.standard_normal((2000, 80)).astype(np.float16)
    for k in range(UTTERANCES):
        rows.add(f"u{k}", 1.0, k, noise[: int(rng.integers(200, 1700))])
    path = tmp_path / "features.h5"
    write_rows(path, FeatureSettings(), rows)
    del rows
    file = FeatureFile(path).open()
    raw = np.memmap(path, np.float16, "r", file._offset, (int(file.offsets[-1]), 80))
    cuts = file.offsets.tolist()
    batches = [rng.integers(0, UTTERANCES, BATCH).tolist() for _ in range(40)]
    names = [[f"u{k}" for k in batch] for batch in batches]

    def mapped() -> list[np.ndarray]:
        return [np.concatenate([raw[cuts[k] : cuts[k + 1]] for k in batch]) for batch in batches]

    def gathered() -> list[np.ndarray]:
        return [file.gather(ids)[0] for ids in names]

    size = sum(b.nbytes for b in gathered())
    for a, b in zip(mapped(), gathered(), strict=True):
        np.testing.assert_array_equal(a, b)
    pairs = [(seconds(mapped), seconds(gathered)) for _ in range(ROUNDS)]
    ratio = statistics.median(m / g for m, g in pairs)
    map_s, gather_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"\nmemory map {size / map_s / 1e9:.2f} GB/s, gather {size / gather_s / 1e9:.2f} GB/s, ratio {ratio:.2f}")
    assert ratio >= 0.8


def test_fbank_and_speed() -> None:
    import torch

    torch.set_num_threads(1)
    samples = (0.1 * np.random.default_rng(0).standard_normal(16000 * 12)).astype(np.float32)
    fbank(change_speed(samples, 0.9))
    for name, work in (("fbank", lambda: fbank(samples)), ("speed 0.9", lambda: change_speed(samples, 0.9))):
        took = statistics.median(seconds(work) for _ in range(30))
        print(f"\n{name}: {12 / took:.0f}× real time on one thread")

"""The bars of the acoustic features: random gathers against np.memmap; how fast fbank and speed perturbation are.

Usage: python tests/bench/bench_features.py [--utterances 3000] [--out docs/bench/features.md]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, at_least, rounds, write_table

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.audio.read import change_speed, resample
from stillhouse.data.features.file import FeatureFile
from stillhouse.data.features.settings import FeatureSettings, Variant
from stillhouse.data.features.writer import Rows, merge, write_rows

BATCH, ROUNDS = 32, 400


class Memmap:
    """The yardstick: one np.memmap and a loop that copies rows into a packed array; ids by a dict, as `gather`."""

    def __init__(self, file: FeatureFile, path: Path) -> None:
        frames, lengths = file.gather(file.ids)
        frames.tofile(path)
        cuts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self.where = {i: (a, b) for i, a, b in zip(file.ids, cuts, cuts[1:])}
        self.map = np.memmap(path, np.float16, "r", shape=frames.shape)
        self.map.sum()  # every page is in its table; a first touch is several times slower

    def gather(self, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        places = [self.where[i] for i in ids]
        lengths = np.array([b - a for a, b in places], np.int64)
        out, at = np.empty((int(lengths.sum()), self.map.shape[1]), np.float16), 0
        for a, b in places:
            out[at : at + b - a] = self.map[a:b]
            at += b - a
        return out, lengths


def made_up(folder: Path, utterances: int) -> FeatureFile:
    """A feature file as a corpus gives it: parts that are merged; 2 to 17 s an utterance."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2000, 80)).astype(np.float16)
    parts = []
    for first in range(0, utterances, 300):
        rows = Rows()
        for k in range(first, min(first + 300, utterances)):
            rows.add(f"u{k:06d}", Variant(1.0), k, noise[: int(rng.integers(200, 1700))])
        part = folder / f"part-{first}.h5"
        write_rows(part, FeatureSettings(), rows)
        parts.append(part)
    path = folder / "features.h5"
    merge(path, FeatureSettings(), [FeatureFile(p) for p in parts], folder)
    for part in parts:
        part.unlink()
    return FeatureFile(path).open()


def gathers(folder: Path, utterances: int) -> list[Row]:
    file = made_up(folder, utterances)
    memmap = Memmap(file, folder / "features.raw")
    rng = np.random.default_rng(1)
    for _ in range(20):
        ids = [file.row_ids[k] for k in rng.integers(0, utterances, BATCH)]
        for ours, theirs in zip(file.gather(ids), memmap.gather(ids), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # Each reads batches that the other has not just brought into the processor's cache.
    batches = [[file.row_ids[k] for k in rng.permutation(utterances)[:BATCH]] for _ in range(2 * ROUNDS + 4)]
    ours, theirs = rounds(lambda i: file.gather(batches[2 * i]), lambda i: memmap.gather(batches[2 * i + 1]), ROUNDS)
    size = float(np.mean([file.frames(b).sum() * 160 for b in batches]))
    note = f"{size / np.median(ours) / 1e9:.1f} against {size / np.median(theirs) / 1e9:.1f} GB/s, batches of {BATCH}"
    return [at_least(f"gather of {utterances} utterances over np.memmap, warm", ours, theirs, 0.8, note)]


def speeds() -> list[Row]:
    import torch

    torch.set_num_threads(1)
    samples = (0.1 * np.random.default_rng(0).standard_normal(16000 * 12)).astype(np.float32)
    named: list[tuple[str, Callable[[], object]]] = [
        ("fbank", lambda: fbank(samples)),
        ("speed 0.9", lambda: change_speed(samples, 0.9)),
        ("speed 1.1", lambda: change_speed(samples, 1.1)),
        ("44,100 to 16,000 Hz", lambda: resample(samples, 44100, 16000)),
    ]
    out = []
    for name, work in named:
        times = []
        for _ in range(42):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        rate = 12 / np.array(times[2:])
        out.append(
            Row(
                name + ", × real time",
                *(float(np.quantile(rate, q)) for q in (0.5, 0.025, 0.975)),
                "none",
                True,
                "12 s, one thread",
            )
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=3000)
    parser.add_argument("--folder", type=Path, help="where to write about 300 kB an utterance; default: the system's")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = gathers(Path(folder), args.utterances) + speeds()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    with tempfile.TemporaryDirectory() as scratch:
        target = args.out or Path(scratch) / "table.md"
        write_table(
            target,
            "Acoustic features",
            "make bench-features",
            rows,
            [f"The load of the machine at the end was {load}."],
        )
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The cases of bench_loss.py: logits, the losses over them and their peers, interleaved rounds, memory."""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import loss_peers
import numpy as np
import torch
import torchaudio

from stillhouse.train.rnnt import rnnt_loss
from stillhouse.train.rnnt.cpu.memory import release

ROOT = Path(__file__).resolve().parent.parent.parent
CORPORA = Path(os.environ.get("STILLHOUSE_CORPORA", ROOT.parent / "shared" / "corpora"))
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def extra_memory(step: Callable[[], object]) -> int:
    """Return the bytes by which the peak resident set exceeds what was resident before the call."""
    gc.collect()
    release()
    ctypes.CDLL(None).malloc_trim(0)  # Memory freed before must not be used again unmeasured.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def plain_torch(x, y, T, U, blank: int) -> torch.Tensor:
    """Return costs [B] by torch operations alone, along diagonals, as one would write them without a library."""
    B, Tmax, width, _ = x.shape
    norm = x.logsumexp(-1)
    stay = x[..., blank] - norm
    move = x[:, :, :-1].gather(3, y.long()[:, None, :, None].expand(-1, Tmax, -1, -1))[..., 0] - norm[:, :, :-1]
    move = torch.nn.functional.pad(move, (0, 1), value=-1e30)
    # The arcs are skewed: row n holds the cells with t + u = n.
    n = torch.arange(Tmax + width - 1)[:, None] - torch.arange(width)
    inside = ((n >= 0) & (n < Tmax)).expand(B, -1, -1)
    index = n.clamp(0, Tmax - 1).expand(B, -1, -1)
    stay, move = (torch.where(inside, v.gather(1, index), -1e30) for v in (stay, move))
    alpha = torch.full((B, width), -1e30)
    alpha[:, 0] = 0
    rows = [alpha]
    for k in range(1, Tmax + width - 1):
        left = torch.nn.functional.pad((rows[-1] + move[:, k - 1])[:, :-1], (1, 0), value=-1e30)
        rows.append(torch.logaddexp(rows[-1] + stay[:, k - 1], left))
    numbers = torch.arange(B)
    ends = (T + U - 1).long()
    return -(torch.stack(rows, 1)[numbers, ends, U.long()] + stay[numbers, ends, U.long()])


def rectangle(B: int, T: int, U: int, V: int) -> Case:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, U + 1, V, generator=g)
    y = torch.randint(0, V - 1, (B, U), generator=g).int()
    return x, y, torch.full((B,), T).int(), torch.full((B,), U).int()


def length_pairs() -> tuple[list[tuple[int, int]], str]:
    """Return (frames of 40 ms, units of 3.6 characters) of LibriSpeech utterances, and where they come from."""
    table = CORPORA / "librispeech-subset" / "manifest.tsv"
    if table.exists():
        with table.open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return [(round(float(r["seconds"]) * 25), round(len(r["text"]) / 3.6)) for r in rows], "the subset's manifest"
    lines = (Path(__file__).parent / "librispeech_lengths.txt").read_text().splitlines()
    return [(int(a), int(b)) for a, b in (line.split() for line in lines if line[0] != "#")], "the committed list"


def librispeech(B: int = 8, V: int = 500) -> tuple[Case, str]:
    pairs, source = length_pairs()
    order = np.random.default_rng(1).permutation(len(pairs))
    chosen = sorted(pairs)[len(pairs) // 3 :: max(1, len(pairs) // 3 // B)][:B] if len(order) else pairs
    T, U = (torch.tensor(v).int() for v in zip(*chosen))
    x, y, _, _ = rectangle(B, int(T.max()), int(U.max()), V)
    return (x, y, T, U), source


def drawn(B: int, seed: int, V: int = 500) -> Case:
    """Return a batch of B utterances drawn at random from `length_pairs`."""
    pairs = length_pairs()[0]
    T, U = torch.tensor([pairs[k] for k in np.random.default_rng(seed).permutation(len(pairs))[:B]]).int().t()
    x, y, _, _ = rectangle(B, int(T.max()), int(U.max()), V)
    return x, y, T.contiguous(), U.contiguous()


def packed_of(x, T, U):
    return torch.cat([x[b, :t, : u + 1].reshape(-1, x.shape[3]) for b, (t, u) in enumerate(zip(T, U))])


def loss_steps(case: Case) -> dict[str, Callable[[torch.Tensor], Callable[[], object]]]:
    """Return functions by name that take new logits and return the step to time."""
    x, y, T, U = case
    blank = x.shape[3] - 1

    def ours(**options):
        def prepare(z):
            z.requires_grad_()
            return lambda: rnnt_loss(z, y, T, U, reduction="sum", **options).backward()

        return prepare

    def audio(z):
        z.requires_grad_()
        return lambda: torchaudio.functional.rnnt_loss(z, y, T, U, reduction="sum").backward()

    def torch_alone(z):
        z.requires_grad_()
        return lambda: plain_torch(z, y, T, U, blank).sum().backward()

    return {
        "torchaudio": audio,
        "plain torch": torch_alone,
        "ours, own gradient": ours(),
        "ours, in place": ours(inplace=True),
        "ours, packed, in place": ours(inplace=True, layout="packed"),
        **loss_peers.loss_steps(y, T, U, blank),
    }


def roofline(z: torch.Tensor) -> Callable[[], object]:
    """Return a step that reads the logits once, then reads and writes them once, as the loss in place must."""

    def step():
        z.sum()
        z.mul_(1.0)

    return step


def interleaved(steps: dict[str, Callable[[], Callable[[], object]]], rounds: int, slow: dict[str, int]):
    """Return (median wall, median CPU) seconds by name. Each round runs each step, `slow` ones fewer rounds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for k in range(rounds + 1):
        for name, prepare in steps.items():
            if k > slow.get(name, rounds):
                continue
            step = prepare()
            taken = timed(step)
            del step
            if k > 0 or slow.get(name, rounds) == 0:
                times[name].append(taken)
    return {name: tuple(statistics.median(v) for v in zip(*taken)) for name, taken in times.items() if taken}


def agree(makers, fresh) -> None:
    """Exit unless each loss has our gradient for these logits: a peer must compute the same."""
    expected = {}
    for layout in ("", ", packed"):
        z = fresh(f"ours{layout}, in place")
        makers[f"ours{layout}, in place"](z)()
        expected[layout] = z.grad
    for name, make in makers.items():
        z = fresh(name)
        make(z)()
        worst = float((z.grad - expected[", packed" if "packed" in name else ""]).abs().max())
        if worst > 1e-2:
            raise SystemExit(f"bench-loss: the gradient of {name} is {worst:.1e} away from ours")

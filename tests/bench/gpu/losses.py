"""The losses on the device beside torchaudio's: rectangles, and the field's table on lengths of LibriSpeech."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from context import Context
from floors import Card, Work, floor, joint_work, loss_work, pruned_work, tdt_work
from runner import QUOTED, Row, Rows, Unable
from torch import Tensor

from stillhouse.train.rnnt import prune_ranges, rnnt_loss, rnnt_loss_joint, rnnt_loss_simple, tdt_loss

RECTANGLES = [(8, 200, 40, 256), (16, 250, 60, 500), (4, 400, 100, 1024), (32, 400, 100, 1024)]
V, H, BAND = 500, 512, 5  # of the field's table
BATCH, MOST_FRAMES, SPEEDS = 30, 10_000, (1.0, 0.9, 1.1)
BATCHES, WARM = 20, 3
SOURCE = "csukuangfj/transducer-loss-benchmarking, 2022; the GPU is not named"
PUBLISHED = {
    "batches of 30": {"torchaudio": (544.241, 18921.8), "k2 pruned": (63.395, 3820.3)},
    "at most 10,000 frames, sorted": {"torchaudio": (601.447, 12959.2), "k2 pruned": (38.112, 2647.8)},
}
Pairs = list[tuple[int, int]]


def torchaudio_loss(*args: Any, **options: Any) -> Tensor:
    import torchaudio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated.
        return torchaudio.functional.rnnt_loss(*args, **options)


def rectangle(c: Context, B: int, T: int, U: int, V: int) -> tuple[Tensor, ...]:
    """Return logits on the device and integers on the CPU. A rehearsal has a hundredth of the cells."""
    if c.small:
        B, T, U = min(B, 2), T // 10, U // 10
    g = torch.Generator(c.device).manual_seed(0)
    x = torch.randn(B, T, U + 1, V, generator=g, device=c.device)
    y = torch.randint(0, V - 1, (B, U), generator=torch.Generator().manual_seed(0)).int()
    return x, y, torch.full((B,), T).int(), torch.full((B,), U).int()


def on_rectangle(c: Context, shape: Sequence[int], how: str, kind: torch.dtype) -> Row:
    x, y, T, U = rectangle(c, *shape)
    x, size = x.to(kind), kind.itemsize
    work = loss_work(T.tolist(), U.tolist(), x.shape[3], size)
    options: dict[str, Any] = {"inplace": True} if how == "ours, in place" else {}
    loss, integers = rnnt_loss, (y, T, U)
    if how == "torchaudio":
        loss, integers = torchaudio_loss, tuple(v.to(c.device) for v in (y, T, U))

    def prepare() -> Callable[[], object]:
        z = x.clone().requires_grad_()
        return lambda: loss(z, *integers, reduction="sum", **options).backward()

    return c.row(prepare, work)


def durations(c: Context, who: str) -> Row:
    x, y, T, U = rectangle(c, *RECTANGLES[0])
    steps = (0, 1, 2, 3, 4)
    z = torch.randn(*x.shape[:3], len(steps), device=c.device)
    loss: Callable[..., Tensor] = tdt_loss
    integers = y, T, U
    if who != "ours":
        try:
            from transformers.loss.loss_tdt import tdt_loss as theirs
        except ImportError as e:
            raise Unable("this transformers has no tdt_loss") from e
        loss, integers = theirs, tuple(v.long().to(c.device) for v in integers)

    def prepare() -> Callable[[], object]:
        a, b = x.clone().requires_grad_(), z.clone().requires_grad_()
        return lambda: loss(a, b, *integers, x.shape[3] - 1, list(steps), 0.0, "sum").backward()

    work = tdt_work(T.tolist(), U.tolist(), x.shape[3], len(steps))
    return c.row(prepare, work, rounds=10 if who == "ours" else 2)


def rectangles(c: Context) -> Rows:
    rows: list[tuple[str, Callable[[], Row]]] = []
    one, two = torch.float32, torch.bfloat16
    for shape in RECTANGLES:
        name = "×".join(map(str, shape))
        for how, kind in (("ours", one), ("ours, in place", one), ("ours, in place", two), ("torchaudio", one)):
            label = f"{name}, {how}" + (", bfloat16" if kind == two else "")
            rows.append((label, partial(on_rectangle, c, shape, how, kind)))
    for who in ("ours", "transformers"):
        name = "×".join(map(str, RECTANGLES[0]))
        rows.append((f"durations 0 to 4, {name}, {who}", partial(durations, c, who)))
    return rows


# --- the field's table ---


def length_pairs() -> Pairs:
    lines = (Path(__file__).parent / "train_clean_100.txt").read_text(encoding="utf-8").splitlines()
    return [(int(a), int(b)) for a, b in (line.split() for line in lines if line[0] != "#")]


def batches(pairs: Pairs, setting: str) -> list[Pairs]:
    """Return the first batches: of 30 in order, or of at most 10,000 frames at three speeds, the longest first."""
    if setting == "batches of 30":
        found = [pairs[i : i + BATCH] for i in range(0, len(pairs) - BATCH + 1, BATCH)]
    else:
        pairs = sorted(((round(t / s), u) for s in SPEEDS for t, u in pairs), reverse=True)
        cuts, frames = [0], 0
        for i, (t, _) in enumerate(pairs):
            if frames + t > MOST_FRAMES:
                cuts.append(i)
                frames = 0
            frames += t
        found = [pairs[a:b] for a, b in pairwise(cuts)]
    return found[:BATCHES]


def step_of(c: Context, how: str, batch: Pairs, joint: torch.nn.Linear) -> Callable[[], object]:
    """Return forward and backward of joint and loss on random states, as the field's benchmark takes them."""
    T, U = (torch.tensor(v).int() for v in zip(*batch, strict=True))
    B, units = len(batch), int(U.max())
    e, p = (torch.rand(B, n, H, device=c.device, requires_grad=True) for n in (int(T.max()), units + 1))
    y = torch.randint(1, V, (B, units)).int()
    kind = torch.bfloat16 if "bfloat16" in how else torch.float32
    options: dict[str, Any] = {"blank": 0, "reduction": "sum"}
    if how.startswith(("torchaudio", "ours, logits")):
        on_device = tuple(v.to(c.device) for v in (y, T, U))

        def apart() -> None:
            logits = joint(torch.tanh(e[:, :, None] + p[:, None]))
            if how == "torchaudio":
                torchaudio_loss(logits, *on_device, **options).backward()
            else:
                rnnt_loss(logits, y, T, U, inplace=True, **options).backward()

        return apart

    def fused() -> None:
        ranges, simple = None, 0
        if "band" in how:
            simple, gamma = rnnt_loss_simple(e, p, y, T, U, **options)
            ranges = prune_ranges(gamma, T, U, BAND)
        parts = [v.to(kind) for v in (e, p, joint.weight, joint.bias)]
        (rnnt_loss_joint(*parts, y, T, U, ranges=ranges, **options) + 0.5 * simple).backward()

    return fused


def work_of(how: str, batch: Pairs) -> Work:
    """Return what the step of `step_of` must do."""
    T, U = (list(side) for side in zip(*batch, strict=True))
    kind = "bfloat16" if "bfloat16" in how else "float32"
    if "band" in how:
        return pruned_work(T, U, V, H, BAND, precision=kind)
    return joint_work(T, U, V, H, fused="fused" in how, precision=kind)


def mean_floor(works: Sequence[Work], card: Card) -> tuple[float, str]:
    """Return the mean of floors, and what they are made of."""
    seconds, bounds = zip(*(floor(work, card) for work in works), strict=True)
    return statistics.mean(seconds), ", ".join(sorted(set(bounds)))


def over_batches(c: Context, setting: str, how: str) -> Row:
    """Measure the batches one after the other, after the first ones once more."""
    pairs = length_pairs()
    if c.small:
        pairs = [(t // 24, u // 24) for t, u in pairs]
    chosen = batches(pairs, setting)
    if c.small:
        chosen = [b[:2] for b in chosen[:2]]
    joint = torch.nn.Linear(H, V).to(c.device)
    times, peaks = [], [0.0]
    warm = chosen[: 1 if c.small else WARM]
    for number, batch in enumerate([*warm, *chosen]):
        ms, peak = c.once(step_of(c, how, batch, joint))
        joint.zero_grad()
        if number < len(warm):
            continue
        times.append(ms)
        peaks.append(peak or 0.0)
    logits = statistics.mean(len(b) * max(t for t, _ in b) * (max(u for _, u in b) + 1) * V for b in chosen)
    seconds, bound = mean_floor([work_of(how, b) for b in chosen], c.card)
    note = f"{len(times)} batches, {logits / 1e6:.0f} M padded logits each"
    return Row(ms=statistics.mean(times), floor_ms=1e3 * seconds, bound=bound, peak_mb=max(peaks) or None, note=note)


def quoted(ms: float, peak_mb: float) -> Row:
    return Row(state=QUOTED, ms=ms, peak_mb=peak_mb, note=SOURCE)


HOW = (
    "torchaudio",
    "ours, logits in place",
    "ours, fused",
    "ours, fused, bfloat16",
    f"ours, fused on a band of {BAND}",
    f"ours, fused on a band of {BAND}, bfloat16",
)


def field_table(c: Context) -> Iterator[tuple[str, Callable[[], Row]]]:
    for setting, published in PUBLISHED.items():
        for how in HOW:
            yield f"{setting}: {how}", partial(over_batches, c, setting, how)
        for who, figures in published.items():
            yield f"{setting}: {who}, as published", partial(quoted, *figures)


def on_paper() -> dict[str, list[Work]]:
    """Return by name what the rows of ours must do, at full size."""
    found: dict[str, list[Work]] = {}
    for B, T, U, vocabulary in RECTANGLES:
        name = f"{B}×{T}×{U}×{vocabulary}"
        for label, size in (("ours", 4), ("ours, in place, bfloat16", 2)):
            found[f"{name}, {label}"] = [loss_work([T] * B, [U] * B, vocabulary, size)]
    B, T, U, vocabulary = RECTANGLES[0]
    found[f"durations 0 to 4, {B}×{T}×{U}×{vocabulary}, ours"] = [tdt_work([T] * B, [U] * B, vocabulary, 5)]
    for setting in PUBLISHED:
        for how in HOW[1:]:
            found[f"{setting}: {how}"] = [work_of(how, b) for b in batches(length_pairs(), setting)]
    return found

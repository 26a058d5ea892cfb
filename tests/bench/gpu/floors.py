"""The least time of a row on paper: the bytes it must move, its products, its launches and its chain of diagonals.

A floor is what no program of the same method can beat. Bytes and products of a step overlap, and so do its launches, so
the largest of the three counts. The diagonals of a lattice wait for each other, so they are added.
Guarantees: the figures of a card are those of its data sheet, dense. A card without an entry counts as measured.
Try: `pytest tests/bench/test_gpu.py -k floor`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

# One diagonal reads what the one before wrote (200 cycles from the second-level cache, or more), takes a logarithm and
# an exponential, and passes a barrier. That is 0.2 µs at 1.7 GHz at the very least.
DIAGONAL_S = 2e-7
LAUNCH_S = 2e-6  # between two kernels in a row on one stream, unless the card has been measured
CELL_VALUES = 14  # reads and writes of logsumexp and both arcs of a cell, over the four kernels of the loss
CELL_BYTES = 32  # those of its alpha and beta, in float64


@dataclass(frozen=True)
class Card:
    """Bytes a second of its memory, and multiplications and additions a second by type of the inputs."""

    name: str
    bandwidth: float
    flops: dict[str, float]
    launch_s: float = LAUNCH_S
    source: str = "data sheet"


def _card(name: str, terabytes: float, bfloat16: float, tf32: float, float32: float) -> Card:
    """Return a card of TB/s and dense TFLOP/s. Its float16 is as fast as its bfloat16."""
    tera = {"bfloat16": bfloat16, "float16": bfloat16, "tf32": tf32, "float32": float32}
    return Card(name, terabytes * 1e12, {kind: value * 1e12 for kind, value in tera.items()})


# The first pattern that the name of the device matches counts, without regard to case.
CARDS = [
    (r"GH200", _card("GH200", 4.0, 989, 494.7, 67)),
    (r"H200", _card("H200", 4.8, 989, 494.7, 67)),
    (r"H100.*PCIe", _card("H100 PCIe", 2.0, 756, 378, 51)),
    (r"H100.*NVL", _card("H100 NVL", 3.9, 835, 417.5, 60)),
    (r"H100", _card("H100 SXM", 3.35, 989, 494.7, 67)),
    (r"B200", _card("B200", 8.0, 2250, 1125, 75)),
    (r"A100.*80GB.*PCIe", _card("A100 PCIe 80GB", 1.935, 312, 156, 19.5)),
    (r"A100.*80GB", _card("A100 SXM 80GB", 2.039, 312, 156, 19.5)),
    (r"A100", _card("A100 40GB", 1.555, 312, 156, 19.5)),
    (r"L40S", _card("L40S", 0.864, 362, 183, 91.6)),
    (r"\bL4\b", _card("L4", 0.3, 121, 60, 30.3)),
    (r"\bA10$", _card("A10", 0.6, 125, 62.5, 31.2)),
    (r"RTX 5090$", _card("RTX 5090", 1.792, 209.5, 104.8, 104.8)),
    (r"RTX 4090$", _card("RTX 4090", 1.008, 165.2, 82.6, 82.6)),
    (r"RTX 3090$", _card("RTX 3090", 0.936, 71, 35.6, 35.6)),
]


def card_named(name: str) -> Card | None:
    """Return the documented figures of a device, or None."""
    return next((replace(card, name=name) for pattern, card in CARDS if re.search(pattern, name, re.I)), None)


@dataclass(frozen=True)
class Work:
    """What a step must do. `precision` is the type in which it multiplies, and `diagonals` wait for each other."""

    bytes: float = 0
    flops: float = 0
    launches: int = 0
    diagonals: int = 0
    precision: str = "float32"


def floor(work: Work, card: Card) -> tuple[float, str]:
    """Return the least seconds of the work, and what they are made of: "bytes", "FLOPs", "launches" or "diagonals"."""
    parts = {
        "bytes": work.bytes / card.bandwidth,
        "FLOPs": work.flops / card.flops.get(work.precision, card.flops["float32"]),
        "launches": work.launches * card.launch_s,
    }
    by = max(parts, key=lambda name: parts[name])
    chain = work.diagonals * DIAGONAL_S
    return parts[by] + chain, "diagonals" if chain > parts[by] else by


def cells(T: Sequence[int], U: Sequence[int]) -> int:
    """Return the cells of lattices: T * (U + 1) each."""
    return sum(t * (u + 1) for t, u in zip(T, U, strict=True))


def padded_cells(T: Sequence[int], U: Sequence[int]) -> int:
    return len(T) * max(T) * (max(U) + 1)


def loss_work(T: Sequence[int], U: Sequence[int], V: int, size: int = 4, *, packed: bool = False) -> Work:
    """Return the work of the loss of given logits, of `size` bytes each, with its gradient.

    It reads the logits of all cells twice and writes a gradient for each padded cell once. Four kernels share what they
    keep of a cell.
    """
    own, state = cells(T, U), max(4, size)
    written = own if packed else padded_cells(T, U)
    moved = V * size * (2 * own + written) + own * (CELL_VALUES * state + CELL_BYTES)
    return Work(moved, launches=4, diagonals=_longest(T, U))


def joint_work(T: Sequence[int], U: Sequence[int], V: int, H: int, *, fused: bool, precision: str = "float32") -> Work:
    """Return the work of a joint network tanh(e + p) @ W of width H, and the loss, in float32 between the two.

    Apart, the products are of all padded cells: one forwards, two backwards. The logits go through memory six times
    (written; read twice and written by the loss; read twice), and the hidden rows ten times, as torch does it step by
    step. Fused, the products are of the cells alone, the first of them made twice, and nothing needs to go through
    memory but the parts and their gradients.
    """
    count = cells(T, U) if fused else padded_cells(T, U)
    through = 0 if fused else count * 4 * (6 * V + 10 * H)
    parts = 4 * 3 * H * (len(T) * (max(T) + max(U) + 1) + V)  # read, and read again or written by the backward pass
    return Work(through + parts, (8 if fused else 6) * count * H * V, 8, _longest(T, U), precision)


def pruned_work(T: Sequence[int], U: Sequence[int], V: int, H: int, S: int, *, precision: str = "float32") -> Work:
    """Return the work of the simple loss of two projections [.., V], and of the fused joint on a band of S units."""
    B, frames, units = len(T), max(T), max(U) + 1
    band = sum(T) * S
    product = 6 * B * frames * units * V  # the norm of the simple joint, forwards and backwards
    parts = 4 * 3 * (H * (B * (frames + units) + V) + V * B * (frames + units))
    return Work(parts, product + 8 * band * H * V, 16, 2 * _longest(T, U), precision)


def tdt_work(T: Sequence[int], U: Sequence[int], V: int, D: int, size: int = 4) -> Work:
    """Return the work of the token-and-duration loss: that of the loss, and D durations of each cell beside it.

    Their logits are read twice and their gradient written once. What is kept of them is written, read by alphas and
    betas, turned into occupancies and read by the gradient: six times.
    """
    own, tokens = cells(T, U), loss_work(T, U, V, size)
    moved = D * size * (2 * own + padded_cells(T, U)) + 6 * D * max(4, size) * own
    return replace(tokens, bytes=tokens.bytes + moved, launches=6)


def _longest(T: Sequence[int], U: Sequence[int]) -> int:
    return max(t + u for t, u in zip(T, U, strict=True))


def transformer_flops(parameters: float, tokens: float, *, layers: int, width: int, window: float) -> float:
    """Return multiplications and additions of a forward pass: two for each weight, and attention over a window."""
    return tokens * (2 * parameters + 4 * layers * width * window)

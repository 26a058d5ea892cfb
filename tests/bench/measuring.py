"""Interleaved rounds, ratios with intervals, and the table that they go into.

Invariant: two things that are compared take turns in one process, and a bar fails only where the whole 95 % interval
of the ratio lies below it. Run: `make bench-store`.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

NO_BAR = "–"


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, its value with an interval, the bar, and whether it holds."""

    what: str
    value: float
    low: float
    high: float
    bar: str
    holds: bool
    note: str = ""

    def cells(self) -> str:
        interval = f" ({self.low:.3g}–{self.high:.3g})" if self.low < self.high else ""
        holds = "" if self.bar == NO_BAR else "yes" if self.holds else "**no**"
        value = "" if math.isnan(self.value) else f"{self.value:.3g}{interval}"
        return f"| {self.what} | {value} | {self.bar} | {holds} | {self.note} |"


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median of theirs/ours over rounds, and its 95 % bootstrap interval: > 1 where ours is faster."""
    each = np.array(theirs) / np.array(ours)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(each, size=(2000, len(each))), axis=1)
    return float(np.median(each)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def rounds(
    ours: Callable[[int], object],
    theirs: Callable[[int], object],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Seconds of `count` rounds, taking turns, each given the round's number; the first two rounds are dropped."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(count + 2):
        for which in (0, 1) if i % 2 else (1, 0):
            began = clock()
            (ours, theirs)[which](i)
            times[which].append(clock() - began)
    return times[0][2:], times[1][2:]


def at_least(what: str, ours: list[float], theirs: list[float], bar: float, note: str = "") -> Row:
    value, low, high = ratio(ours, theirs)
    return Row(what, value, low, high, f"≥ {bar:g}", high >= bar, note)


def beside(what: str, ours: list[float], theirs: list[float], note: str = "") -> Row:
    """A ratio without a bar."""
    return Row(what, *ratio(ours, theirs), NO_BAR, True, note)


def absent(what: str, why: str) -> Row:
    """What could not be measured."""
    return Row(what, math.nan, math.nan, math.nan, NO_BAR, True, why)


def at_most(what: str, value: float, bar: float, note: str = "") -> Row:
    return Row(what, value, value, value, f"≤ {bar:g}", value <= bar, note)


def write_table(path: Path, title: str, command: str, rows: list[Row], remarks: list[str]) -> None:
    """A Markdown table with the command that makes it again and the machine that it was made on."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"# {title}",
        "",
        f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d}, on {cores} cores, {platform.machine()}, "
        f"Python {platform.python_version()}.",
        "",
        *remarks,
        "",
        "| what | measured (95 % interval) | bar | holds | remark |",
        "|---|---|---|---|---|",
        *(r.cells() for r in rows),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))

"""A study's table as Markdown and as one HTML page with plots.

Invariant: what is said follows from the Table alone, and what the test set cannot show is said beside what it does.
Run: `stillhouse study STUDY`, which writes OUT/study.{json,md,html}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data.files.atomic import write_atomic
from ..report.html import COLOURS, INK, curve, figure, page
from .table import ArmRow, Curve, Detectable, ErrorDifference, Estimate, Table


def points(estimate: Estimate, sign: bool = False) -> str:
    """Per cent, with the interval: "34.5 (32.3 to 36.7)"."""
    form = "{:+.1f}" if sign else "{:.1f}"
    value, low, high = (form.format(100 * x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def limit(found: Detectable) -> str:
    """In words. A spread of nothing (all hypotheses empty, say) says nothing of what could be found."""
    if not found.value:
        return (
            f"{found.split}, {found.utterances} utterances: nothing can be said yet, for no run differs ({found.how})."
        )
    return (
        f"{found.split}, {found.utterances} utterances, {found.seeds} seed{'s' * (found.seeds != 1)} an arm: "
        f"a true difference of {100 * found.value:.1f} points would most likely (4 in 5) be found, "
        f"a smaller one most likely not ({found.how})."
    )


def difference(found: ErrorDifference | None) -> str:
    if found is None:
        return ""
    seeds = ", ".join(f"{100 * x:+.1f}" for x in found.by_seed)
    return f"{points(found.estimate, True)}; {100 * found.relative:+.0f} %; {found.verdict} [{seeds}]"


def to(row: ArmRow, arm: str) -> ErrorDifference | None:
    return next((d for d in row.differences if d.to == arm), None)


def markdown(table: Table) -> str:
    """The whole study as Markdown; what `stillhouse study` prints."""
    name = table.metric.upper()
    lines = [f"# Study {table.study}", ""]
    lines += [f"- What the test set can show: {limit(found)}" for found in table.detectable]
    if table.missing:
        lines.append(f"- Not done yet: {', '.join(table.missing)}.")
    for split in dict.fromkeys(row.split for row in table.rows):
        heads = ["arm", "seeds", "WER % (95 %)", "CER % (95 %)"]
        heads += [f"{name} less {arm}'s: points (95 %); relative; verdict [by seed]" for arm in table.against]
        heads += ["steps", "min a run", "transfer loss", "RNN-T loss on dev"]
        lines += ["", f"## {split}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in table.of(split):
            cells = [row.arm, ", ".join(map(str, row.seeds)), points(row.wer), points(row.cer)]
            cells += [difference(to(row, arm)) for arm in table.against]
            cells += [f"{row.steps:,}", f"{row.seconds / 60:.1f}"]
            cells += ["" if loss is None else f"{loss:.3f}" for loss in (row.transfer, row.dev_loss)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Intervals: bootstraps over utterances of the mean over seeds; differences are paired by utterance and seed. "
        '"lower" and "higher" stand where a difference exceeds 1.96 standard errors, of utterances and seeds together: '
        "by chance alone, once in twenty differences that are none.",
        "",
        "| arm | changes | command |",
        "|---|---|---|",
    ]
    lines += [f"| {arm} | {what} | `{table.commands[arm]}` |" for arm, what in table.changes.items()]
    return "\n".join(lines) + "\n"


def html(table: Table, curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """The page. curves: {caption: {arm: [(step, value)]}}, as `study_table.curves` gives them."""
    plots = [
        (f"{row.split}: {table.metric.upper()} less that of {arm}, points", forest(table, row.split, arm))
        for row in {row.split: row for row in table.rows}.values()
        for arm in table.against
    ]
    plots += [
        (caption, curve(lines, "loss" if "loss" in caption else "%", name=caption)) for caption, lines in curves.items()
    ]
    return page(
        "study.html.j2",
        f"Study {table.study}",
        t=table,
        splits=list(dict.fromkeys(row.split for row in table.rows)),
        runs={row.arm: row for row in table.rows},  # what a run took is the same for every split
        plots=[(caption, svg) for caption, svg in plots if svg],
        points=points,
        limit=limit,
        to=to,
    )


def forest(table: Table, split: str, arm: str) -> str:
    """An inline SVG: each arm's difference to `arm` with its interval, and that of each seed; "" without any."""
    rows = [(row.arm, found) for row in table.of(split) if (found := to(row, arm)) is not None]
    bound = next((found.value for found in table.detectable if found.split == split), None)

    def plot(axes: Any) -> None:
        for place, (_, found) in enumerate(reversed(rows)):
            e = found.estimate
            axes.plot([100 * e.low, 100 * e.high], [place, place], color=COLOURS[0], linewidth=2)
            axes.plot([100 * e.value], [place], "o", color=COLOURS[0], markersize=6)
            axes.plot(
                [100 * x for x in found.by_seed], [place] * len(found.by_seed), "|", color=COLOURS[1], markersize=9
            )
        if bound is not None:
            axes.axvspan(-100 * bound, 100 * bound, color="#888888", alpha=0.15, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_xlabel("points", color=INK)

    return figure(plot, f"{split} {arm}") if rows else ""


def write_reports(table: Table, out: Path, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    """OUT/study.json, study.md and study.html, each whole or as it was."""
    texts = {
        "study.json": json.dumps(asdict(table), ensure_ascii=False, indent=1) + "\n",
        "study.md": markdown(table),
        "study.html": html(table, curves),
    }
    for name, text in texts.items():
        write_atomic(out / name, text)

"""A study's table as Markdown, and as an HTML page with plots.

Guarantees: all statements follow from the Table alone. What the test set cannot show stands beside what it shows.
Try: `stillhouse study STUDY`, which writes OUT/study.{json,md,html}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data.files.atomic import write_atomic
from ..report.html import COLOURS, INK, Points, draw, figure, page
from .table import ArmRow, ClassRow, Detectable, ErrorDifference, Estimate, Table

INTERVALS = (
    "Intervals are bootstraps over utterances of the mean over seeds. Differences are paired by utterance and seed. "
    "“lower” and “higher” mark a difference above 1.96 standard errors, of utterances and seeds together. When there "
    "is no true difference, about 1 comparison in 20 is still marked."
)


def points(estimate: Estimate, sign: bool = False) -> str:
    """Return per cent with the interval: "34.5 (32.3 to 36.7)"."""
    form = "{:+.1f}" if sign else "{:.1f}"
    value, low, high = (form.format(100 * x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def limit_text(limit: Detectable) -> str:
    """Return in words how small a difference the test set can show. Without any spread nothing is known."""
    head = f"{limit.split}, {limit.utterances} utterances"
    if not limit.value:
        return f"{head}: no run differs, so nothing is known yet ({limit.how})."
    return (
        f"{head}, {limit.seeds} seed{'s' * (limit.seeds != 1)} per arm: a true difference of "
        f"{100 * limit.value:.1f} points is found with a probability of 4 in 5, a smaller one less often ({limit.how})."
    )


def difference_to(row: ArmRow | ClassRow, arm: str) -> ErrorDifference | None:
    return next((d for d in row.differences if d.to == arm), None)


def _difference_tables(differences: Sequence[tuple[str, ErrorDifference]]) -> list[str]:
    """Return a table of differences, with those of many seeds in a second one, so that lines stay short."""
    texts = [(to, f"{points(d.estimate, True)}; {100 * d.relative:+.0f} %; {d.verdict}") for to, d in differences]
    seeds = [f"[{', '.join(f'{100 * x:+.1f}' for x in d.by_seed)}]" for _, d in differences]
    if max(len(d.by_seed) for _, d in differences) <= 3:
        rows = [(to, f"{text} {of}") for (to, text), of in zip(texts, seeds, strict=True)]
        return _markdown_table(("arm", "difference"), rows)
    by_seed = [(to, of) for (to, _), of in zip(texts, seeds, strict=True)]
    return [*_markdown_table(("arm", "difference"), texts), "", *_markdown_table(("arm", "by seed"), by_seed)]


def _class_tables(table: Table, split: str) -> list[str]:
    """Return for each class of words how many are wrong, in a table for each arm to compare with."""
    lines: list[str] = []
    of_split = [row for row in table.classes if row.split == split]
    for name in dict.fromkeys(row.name for row in of_split):
        rows = [row for row in of_split if row.name == name]
        lines += ["", f"Words of the class “{name}”: {rows[0].words:,}. Share that is wrong:"]
        for arm in table.against:
            cells = []
            for row in rows:
                found = difference_to(row, arm)
                difference = "" if found is None else f"{points(found.estimate, True)}; {found.verdict}"
                cells.append((row.arm, points(row.wrong), difference))
            lines += ["", *_markdown_table(("arm", "wrong % (95 %)", f"minus that of “{arm}”"), cells)]
    return lines


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def markdown(table: Table) -> str:
    """Return the whole study as Markdown, which `stillhouse study` prints: its tables are narrow."""
    name = table.metric.upper()
    lines = [f"# Study {table.study}", ""]
    lines += [f"- What the test set can show: {limit_text(limit)}" for limit in table.detectable]
    if table.missing:
        lines.append(f"- Not done yet: {', '.join(table.missing)}.")
    for split in table.splits:
        rows = table.of(split)
        lines += ["", f"## {split}", ""]
        results = [(row.arm, ",".join(map(str, row.seeds)), points(row.wer), points(row.cer)) for row in rows]
        lines += _markdown_table(("arm", "seeds", "WER % (95 %)", "CER % (95 %)"), results)
        for arm in table.against:
            differences = [(row.arm, d) for row in rows if (d := difference_to(row, arm)) is not None]
            if differences:
                lines += ["", f"{name} minus that of the arm “{arm}”: points (95 %); relative; verdict [by seed]", ""]
                lines += _difference_tables(differences)
        lines += _class_tables(table, split)
        losses = [["" if x is None else f"{x:.3f}" for x in (row.transfer, row.dev_loss)] for row in rows]
        training = [
            (row.arm, f"{row.steps:,}", f"{row.seconds / 60:.1f}", *of) for row, of in zip(rows, losses, strict=True)
        ]
        heads = ("arm", "steps", "minutes per run", "transfer loss", "RNN-T loss on dev")
        lines += ["", *_markdown_table(heads, training)]
    lines += ["", INTERVALS, ""]
    lines += [
        f"- {arm}: {changes or 'no changes'}\n  `{table.commands[arm]}`" for arm, changes in table.changes.items()
    ]
    return "\n".join(lines) + "\n"


def html(table: Table, curves: Mapping[str, Mapping[str, Points]]) -> str:
    """Return the page. curves: {caption: {arm: points}}, from `mean_curves`."""
    plots = [
        (f"{split}: {table.metric.upper()} minus that of the arm “{arm}”, points", forest(table, split, arm))
        for split in table.splits
        for arm in table.against
    ]
    plots += draw((caption, lines, "loss" if "loss" in caption else "%") for caption, lines in curves.items())
    return page(
        "study.html.j2",
        f"Study {table.study}",
        t=table,
        runs={row.arm: row for row in table.rows},  # Steps and times of a run are the same for every split.
        plots=[(caption, svg) for caption, svg in plots if svg],
        points=points,
        limit_text=limit_text,
        difference_to=difference_to,
        intervals=INTERVALS,
    )


def forest(table: Table, split: str, arm: str) -> str:
    """Return an inline SVG of each arm's difference to `arm`, with its interval and seeds, or "" without any."""
    rows = [(row.arm, d) for row in reversed(table.of(split)) if (d := difference_to(row, arm)) is not None]
    limit = next((100 * found.value for found in table.detectable if found.split == split), None)

    def plot(axes: Any) -> None:
        for place, (_, d) in enumerate(rows):
            e = d.estimate
            axes.plot([100 * e.low, 100 * e.high], [place, place], color=COLOURS[0], linewidth=2)
            axes.plot([100 * e.value], [place], "o", color=COLOURS[0], markersize=6)
            axes.plot([100 * x for x in d.by_seed], [place] * len(d.by_seed), "|", color=COLOURS[1], markersize=9)
        if limit is not None:
            axes.axvspan(-limit, limit, color="#888888", alpha=0.15, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_xlabel("points", color=INK)

    return figure(plot, f"{split} {arm}") if rows else ""


def write_reports(table: Table, out: Path, curves: Mapping[str, Mapping[str, Points]]) -> None:
    """Write OUT/study.json, study.md and study.html, each completely or not at all."""
    write_atomic(out / "study.json", json.dumps(asdict(table), ensure_ascii=False, indent=1) + "\n")
    write_atomic(out / "study.md", markdown(table))
    write_atomic(out / "study.html", html(table, curves))

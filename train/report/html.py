"""The parts that pages share: Jinja templates, inline figures, example hypotheses, numbers as text.

Guarantees: a page has no link, no script and no image from elsewhere. All text of a corpus is escaped.
Try: `stillhouse report RUN`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..score.alignment import SUBSTITUTED, AlignedUtterance, align_utterance
from ..score.wer import Rate

# Legible on white and on near-black
COLOURS = ("#3b82f6", "#e8830c", "#12a06b", "#d6459b", "#8b5cf6", "#0ea5b7", "#a8760b", "#8a94a0")
INK = "#010203"  # stands for the colour of the page's text

Points = list[tuple[float, float]]
Metrics = Sequence[Mapping[str, Any]]  # records of a metrics.jsonl


@dataclass(frozen=True)
class ExampleSection:
    """Hypotheses of one test set, some of them as examples, and its most frequent substitutions.

    homophones: {word: number of its group}. Words of one group sound alike.
    confusions: (reference, hypothesis, count, whether they sound alike).
    substitutions, alike: number of all, and of those that sound alike.
    """

    name: str
    what: str
    utterances: list[AlignedUtterance]
    shown: list[AlignedUtterance]
    homophones: dict[str, int]
    confusions: list[tuple[str, str, int, bool]]
    substitutions: int
    alike: int


def section(
    name: str,
    what: str,
    triples: Sequence[tuple[str, str, str]],
    homophones: Sequence[Sequence[str]] = (),
    show: int = 24,
) -> ExampleSection:
    """Return a section of (id, reference, hypothesis) triples. The examples are `show` of them, evenly spread."""
    utterances = [align_utterance(*triple) for triple in triples]
    groups = {word: k for k, group in enumerate(homophones) for word in group}
    counts = Counter((p.ref, p.hyp) for u in utterances for p in u.pairs if p.kind == SUBSTITUTED)
    alike = {pair: groups.get(pair[0], -1) == groups.get(pair[1], -2) for pair in counts}
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:14]
    return ExampleSection(
        name,
        what,
        utterances,
        utterances[:: max(1, -(-len(utterances) // show))],
        groups,
        [(*pair, count, alike[pair]) for pair, count in frequent],
        counts.total(),
        sum(count for pair, count in counts.items() if alike[pair]),
    )


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], label: str, *, name: str = "", log: bool = False) -> str:
    """Return an inline SVG of {name: (step, value) points}, or "" without any that is finite.

    `label` belongs to the vertical axis, which is logarithmic with `log` if all values are above 0. `name`, by default
    the label, keeps the ids of two figures of a page apart.
    """
    # The same name has the same colour in all plots of a page, also where other curves have no points.
    places = {k: place for place, k in enumerate(lines)}
    lines = {k: few for k, v in lines.items() if (few := thinned(v))}

    def plot(axes: Any) -> None:
        for key, points in lines.items():
            x, y = zip(*points)
            again, colour = divmod(places[key], len(COLOURS))
            style = {"color": COLOURS[colour], "linestyle": ("-", "--", ":", "-.")[again % 4], "linewidth": 1.8}
            axes.plot(x, y, **style, label=key, marker="o" if len(x) < 12 else "", markersize=3.5)
        values = [y for points in lines.values() for _, y in points]
        if log and min(values) > 0:
            _log_axis(axes)
        else:  # Space above the highest point, because the frame's edge would cut a line along it.
            axes.set_ylim(0, 1.06 * max(values) or 1.0)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(label, color=INK)
        if len(lines) > 5:  # A legend of so many names would hide the curves.
            width, height = axes.figure.get_size_inches()
            axes.figure.set_size_inches(width, height + 0.2 * -(-len(lines) // 2))
            axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8)
        elif len(lines) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)

    return figure(plot, name or label) if lines else ""


def _log_axis(axes: Any) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> Points:
    """Return at most `most` points, the means of neighbours, because a plot is not wider."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    many = max(1, -(-len(points) // most))
    groups = [points[i : i + many] for i in range(0, len(points), many)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def figure(plot: Callable[[Any], None], name: str) -> str:
    """Return what `plot` draws on matplotlib axes as an inline SVG, transparent, in the colour of the page's text."""
    import matplotlib
    from matplotlib.figure import Figure

    # The salt keeps the ids of two figures of one page apart, and makes a page reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        canvas = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = canvas.add_subplot()
        plot(axes)
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        axes.grid(alpha=0.25, color="#888888", linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        axes.patch.set_alpha(0)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S).replace(INK, "currentColor")


def draw(plots: Iterable[tuple[str, Mapping[str, Sequence[tuple[float, float]]], str]]) -> list[tuple[str, str]]:
    """Return (caption, SVG) of the plots (caption, curves, label) that have points. A loss has a log axis."""
    drawn = [(caption, curve(lines, label, name=caption, log=label == "loss")) for caption, lines, label in plots]
    return [(caption, svg) for caption, svg in drawn if svg]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, if there is one, without a line that a kill cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def series(metrics: Metrics, key: str, kind: str | None = None, scale: float = 1.0) -> Points:
    """Return (step, value) of the records with a value for `key`. kind: "train", "dev", or None for all."""
    return [(m["step"], scale * m[key]) for m in metrics if kind in (None, m.get("kind")) and m.get(key) is not None]


def curves(metrics: Metrics) -> list[tuple[str, str]]:
    """Return (caption, SVG) of a run's losses, transfer losses by view, error rates, and of text without sound."""
    views = sorted({k for m in metrics for k in m if k.startswith("transfer") and "/" in k})
    losses = {k: series(metrics, k, "train") for k in ("rnnt", "ctc")} | {"rnnt on dev": series(metrics, "rnnt", "dev")}
    rates = {k.upper(): series(metrics, k, "dev", 100.0) for k in ("wer", "cer")}
    text = {"text": series(metrics, "text", "train")}
    perplexities = {"perplexity": series(metrics, "text_perplexity", "dev")}
    transfer = {v.removeprefix("transfer")[1:]: series(metrics, v, "train") for v in views}
    return draw(
        [
            ("Loss per unit", losses, "loss"),
            ("Distance to the teacher, by view", transfer, "loss"),
            ("Error rate on dev", rates, "%"),
            ("Text without sound: loss per unit", text, "loss"),
            ("Perplexity of a unit on dev", perplexities, "perplexity"),
        ]
    )


def step_times(metrics: Metrics) -> list[tuple[str, float]]:
    """Return (part, seconds in a step), means over the run, largest first."""
    times = [m["time"] for m in metrics if m.get("kind") == "train" and m.get("time")]
    parts = {k for time in times for k in time}
    return sorted(((k, sum(t.get(k, 0.0) for t in times) / len(times)) for k in parts), key=lambda kv: -kv[1])


def page(template: str, title: str, **values: Any) -> str:
    """Return a page from a template of this folder, with all values escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"percent": percent, "interval": interval, "size": size, "clock": clock}
    return env.get_template(template).render(title=title, **values)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(rate: Rate) -> str:
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def size(value: float) -> str:
    power = 0
    while value >= 1000 and power < 4:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"

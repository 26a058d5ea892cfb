"""What all pages share: the Jinja page, inline figures and curves, and numbers as text.

Invariant: a page holds no link, no script and no image from elsewhere, and what a corpus says is escaped. Exercised by
`stillhouse report RUN`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..score.wer import Rate

# Legible on white and on near-black
COLOURS = ("#3b82f6", "#e8830c", "#12a06b", "#d6459b", "#8b5cf6", "#0ea5b7", "#a8760b", "#8a94a0")
INK = "#010203"  # stands for the text's colour until the figure is in the page


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill has torn is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], label: str, *, log: bool = False, name: str = "") -> str:
    """An inline SVG of curves [(step, value)], in colours that suit a light and a dark page; "" without a point.

    A curve without points keeps its colour, so that the same names have the same colours in all plots of a page.
    """
    places = {k: place for place, k in enumerate(lines)}
    lines = {k: few for k, v in lines.items() if (few := thinned(v))}

    def plot(axes: Any) -> None:
        for key, points in lines.items():
            x, y = zip(*points)
            again, colour = divmod(places[key], len(COLOURS))
            style = {"color": COLOURS[colour], "linestyle": ("-", "--", ":", "-.")[again % 4], "linewidth": 1.8}
            axes.plot(x, y, **style, label=key, marker="o" if len(x) < 12 else "", markersize=3.5)
        if log:
            axes.set_yscale("log")
        else:
            # Room above the highest, whatever the spread: a line along the frame's edge would be cut off
            axes.set_ylim(0, 1.06 * max((y for points in lines.values() for _, y in points), default=1.0) or 1.0)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(label, color=INK)
        if len(lines) > 5:  # below: they would hide the lines
            width, height = axes.figure.get_size_inches()
            axes.figure.set_size_inches(width, height + 0.2 * -(-len(lines) // 2))
            axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8)
        elif len(lines) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)

    return figure(plot, name or label) if lines else ""


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, for a plot is no wider."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    many = max(1, -(-len(points) // most))
    groups = [points[i : i + many] for i in range(0, len(points), many)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def figure(plot: Callable[[Any], None], name: str) -> str:
    """An inline SVG of what `plot` draws on matplotlib axes, transparent, its ink the page's own."""
    import matplotlib
    from matplotlib.figure import Figure

    # The hash salt keeps the ids of two figures of one page apart, and makes the page the same twice.
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


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(caption, SVG) of a run: losses, transfer by view, error rates."""

    def points(kind: str, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(m["step"], scale * m[key]) for m in metrics if m.get("kind") == kind and m.get(key) is not None]

    views = sorted({k for m in metrics for k in m if k.startswith("transfer/")})
    found = [
        (
            "Loss a unit",
            {k: points("train", k) for k in ("rnnt", "ctc")} | {"rnnt on dev": points("dev", "rnnt")},
            "loss",
        ),
        ("Distance to the teacher, by view", {v.removeprefix("transfer/"): points("train", v) for v in views}, "loss"),
        ("Error rate on dev", {k.upper(): points("dev", k, 100.0) for k in ("wer", "cer")}, "%"),
    ]
    drawn = [(caption, curve(lines, label, name=caption)) for caption, lines, label in found]
    return [(caption, svg) for caption, svg in drawn if svg]


def step_times(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(part, seconds a step), the mean over the run, largest first."""
    lines = [m["time"] for m in metrics if m.get("kind") == "train" and m.get("time")]
    parts = {k for line in lines for k in line}
    return sorted(((k, sum(x.get(k, 0.0) for x in lines) / len(lines)) for k in parts), key=lambda kv: -kv[1])


def page(template: str, **values: Any) -> str:
    """A template of this folder, everything in it escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"percent": percent, "interval": interval, "size": size, "clock": clock}
    return env.get_template(template).render(**values)


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

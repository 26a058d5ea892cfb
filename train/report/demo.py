"""A run as one HTML page that needs nothing else: error rates, curves, hypotheses, the store, commands, times.

Invariant: the page holds no link, no script and no image from elsewhere, and what a corpus says is escaped.
Run: `stillhouse demo`, which ends in one.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..score.wer import Rate, Score

if TYPE_CHECKING:
    from ...extract.store import Store

# Legible on white and on near-black
COLOURS = ("#3b82f6", "#e8830c", "#12a06b", "#d6459b", "#8b5cf6", "#0ea5b7", "#a8760b", "#8a94a0")
INK = "#010203"  # stands for the text's colour until the figure is in the page


@dataclass(frozen=True)
class ErrorRow:
    """A line of the table of error rates; `limit` is the largest WER that passes."""

    name: str
    what: str
    score: Score
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.limit is None or self.score.wer.rate <= self.limit


@dataclass(frozen=True)
class Chunk:
    """Words of an alignment: kind is "equal", "substitute", "delete" (ref only) or "insert" (hyp only)."""

    kind: str
    ref: str
    hyp: str
    alike: bool = False  # a substitution of words that sound alike


@dataclass(frozen=True)
class SpokenPair:
    id: str
    chunks: tuple[Chunk, ...]

    @property
    def errors(self) -> int:
        return sum(max(len(c.ref.split()), len(c.hyp.split())) for c in self.chunks if c.kind != "equal")


@dataclass(frozen=True)
class TestSection:
    """Hypotheses of one test set, and which words were taken for which others how often."""

    name: str
    what: str
    pairs: tuple[SpokenPair, ...]
    shown: tuple[SpokenPair, ...]
    confusions: tuple[tuple[str, str, int, bool], ...]  # (ref, hyp, how often, whether they sound alike)

    @property
    def substitutions(self) -> int:
        return sum(c.kind == "substitute" for p in self.pairs for c in p.chunks)

    @property
    def alike(self) -> int:
        return sum(c.alike for p in self.pairs for c in p.chunks)


@dataclass(frozen=True)
class Stage:
    """A part of the work; `command` as one would type it, `seconds` of wall time."""

    name: str
    command: str
    seconds: float


@dataclass(frozen=True)
class DemoPage:
    title: str
    lead: str
    rows: Sequence[ErrorRow]
    sections: Sequence[TestSection] = ()
    metrics: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    store: Mapping[str, Any] | None = None  # of store_facts
    stages: Sequence[Stage] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill has torn is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def align(reference: str, hypothesis: str, alike: Sequence[Sequence[str]] = ()) -> tuple[Chunk, ...]:
    """The alignment behind the WER, word by word where words were substituted. `alike`: groups of homophones."""
    import jiwer

    ref, hyp = reference.split(), hypothesis.split()
    if not ref:
        return (Chunk("insert", "", " ".join(hyp)),) if hyp else ()
    groups = {word: k for k, group in enumerate(alike) for word in group}
    chunks: list[Chunk] = []
    for c in jiwer.process_words(" ".join(ref), " ".join(hyp)).alignments[0]:
        left, right = ref[c.ref_start_idx : c.ref_end_idx], hyp[c.hyp_start_idx : c.hyp_end_idx]
        if c.type == "substitute":
            chunks += [Chunk(c.type, a, b, groups.get(a, -1) == groups.get(b, -2)) for a, b in zip(left, right)]
        else:
            chunks.append(Chunk(c.type, " ".join(left), " ".join(right)))
    return tuple(chunks)


def section(
    name: str,
    what: str,
    hypotheses: Sequence[tuple[str, str, str]],
    alike: Sequence[Sequence[str]] = (),
    show: int = 24,
) -> TestSection:
    """Of (id, reference, hypothesis) triples; `show` of them, spread evenly over the set."""
    pairs = tuple(SpokenPair(id, align(ref, hyp, alike)) for id, ref, hyp in hypotheses)
    step = max(1, -(-len(pairs) // show))
    counts = Counter((c.ref, c.hyp, c.alike) for p in pairs for c in p.chunks if c.kind == "substitute")
    common = sorted(((n, ref, hyp, same) for (ref, hyp, same), n in counts.items()), key=lambda x: (-x[0], x[1:3]))
    return TestSection(
        name, what, pairs, pairs[::step], tuple((ref, hyp, n, same) for n, ref, hyp, same in common[:14])
    )


def store_facts(store: Store) -> dict[str, Any]:
    """What a store holds, for the page: utterances, bytes on disk, and each teacher with its views."""
    views = store.views
    teachers = []
    for name in sorted({v.teacher for v in views}):
        info = store.teacher(name)
        mine = [v for v in views if v.teacher == name]
        teachers.append(
            {
                "name": name,
                "model": "/".join(Path(info.model).parts[-2:]),  # of a folder the end, a hub's name whole
                "kind": info.kind,
                "width": info.width,
                "depth": info.depth,
                "tokens": info.tokens,
                "dtype": info.dtype,
                "transform": info.transform,
                "views": [v.address for v in mine],
            }
        )
    size = sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
    return {"path": store.path.name, "utterances": len(store.utterance_ids), "bytes": size, "teachers": teachers}


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


def render(report: DemoPage) -> str:
    """The page, self-contained."""
    return page("demo.html.j2", r=report, curves=curves(report.metrics), step_times=step_times(report.metrics))


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

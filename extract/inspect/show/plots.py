"""Pictures of a store by matplotlib: `stillhouse inspect plot`. The file's suffix decides between PNG, SVG and PDF.

Guarantees: a picture shows facts that `--json` prints, too. No window opens; matplotlib's global state is unchanged.
Try: `stillhouse inspect plot STORE cka.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..numbers.choose_views import Choice
from ..numbers.similarity import Similarity
from ..numbers.statistics import Statistics
from ..numbers.word_map import WordMap
from ..output import output_draft

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def similarity(s: Similarity) -> Figure:
    """Draw a heat map of linear CKA, each cell with its number."""
    side = 2.4 + 0.55 * len(s.views)
    figure, axes = _axes(side + 1, side)
    image = axes.imshow(s.cka, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(s.views)), s.views, rotation=45, ha="right")
    axes.set_yticks(range(len(s.views)), s.views)
    for y, row in enumerate(s.cka):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white", size=8)
    figure.colorbar(image, label="linear CKA")
    axes.set_title(f"Similarity of views at {s.places:,} {s.axis}s")
    return figure


def norms(listed: Sequence[Statistics]) -> Figure:
    """Draw the mean norm by layer, one panel per teacher, one line per context, with a band of one deviation.

    Teachers have scales of their own. First tokens that are ten times as long as the others get a logarithmic axis.
    """
    from matplotlib.figure import Figure

    lines: dict[str, dict[str, list[tuple[int, Statistics]]]] = {}
    for s in listed:
        teacher, context, layer = s.view.rsplit("/", 2)
        lines.setdefault(teacher, {}).setdefault(context, []).append((int(layer), s))
    figure = Figure(figsize=(7, 1 + 3.5 * len(lines)), layout="constrained")
    for axes, (teacher, contexts) in zip(figure.subplots(len(lines), squeeze=False)[:, 0], lines.items()):
        for context, of in contexts.items():
            layers, measured = zip(*sorted(of, key=lambda pair: pair[0]))
            [line] = axes.plot(layers, [s.norm_mean for s in measured], marker="o", label=context)
            low, high = ([s.norm_mean + sign * s.norm_std for s in measured] for sign in (-1, 1))
            axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            firsts, label = [s.first_norm_mean for s in measured], f"{context}, first tokens"
            axes.plot(layers, firsts, color=line.get_color(), linestyle="--", linewidth=1, label=label)
        every = [s for of in contexts.values() for _, s in of]
        if max(s.first_norm_mean for s in every) > 10 * max(s.norm_mean for s in every):
            axes.set_yscale("log")
        axes.set_title(teacher)
        axes.set_xlabel("layer")
        axes.set_ylabel("norm of the states")
        axes.set_xticks(sorted({layer for of in contexts.values() for layer, _ in of}))
        axes.legend(frameon=False, fontsize=8)
    return figure


def probes(c: Choice) -> Figure:
    """Draw how well each view predicts the unit at a place and the next one. Suggested views have their rank."""
    ranks = {s.view: f" ({n})" for n, s in enumerate(c.suggested, start=1)}
    shown = [*c.views, *c.static][::-1]
    figure, axes = _axes(7, 1.4 + 0.4 * len(shown))
    for offset, label, values in (
        (0.2, "the unit at a place", [p.here_r2 for p in shown]),
        (-0.2, "the next unit", [p.next_r2 for p in shown]),
    ):
        bars = axes.barh([n + offset for n in range(len(shown))], values, height=0.38, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), [p.view + ranks.get(p.view, "") for p in shown])
    axes.margins(x=0.12)
    axes.set_xlabel("R² of the probe")
    axes.set_title(f"What views tell of ASR units, at {c.places:,} places")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def word(m: WordMap) -> Figure:
    """Draw a word's occurrences on their first two principal components, coloured by view."""
    figure, axes = _axes(7, 6)
    for view in m.views:
        of = [p for p in m.points if p.view == view]
        axes.scatter([p.x for p in of], [p.y for p in of], s=22, alpha=0.75, label=view, linewidths=0)
    axes.set_xlabel(f"first component ({m.explained[0]:.0%} of the variance)")
    second = m.explained[1] if len(m.explained) > 1 else 0.0
    axes.set_ylabel(f"second component ({second:.0%})")
    axes.set_title(f"{m.word!r}, {m.shown} of {m.found} occurrences")
    figure.legend(loc="outside lower center", ncols=min(3, len(m.views)), frameon=False, fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all. The same facts give the same bytes of SVG."""
    import matplotlib

    with output_draft(path) as draft, matplotlib.rc_context({"svg.hashsalt": "stillhouse"}):
        figure.savefig(draft, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)

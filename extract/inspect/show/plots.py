"""Pictures of a store by matplotlib: `stillhouse inspect plot`. The file's suffix decides between PNG, SVG and PDF.

Guarantees: a picture shows facts that `--json` prints, too. No window opens; matplotlib's global state is unchanged.
Try: `stillhouse inspect plot STORE cka.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    axes.set_title(f"Similarity of views at {s.places:,} tokens")
    return figure


def norms(listed: Sequence[Statistics]) -> Figure:
    """Draw the mean norm by layer, one line per teacher and context, with a band of one deviation."""
    figure, axes = _axes(7, 4.5)
    lines: dict[str, list[tuple[int, Statistics]]] = {}
    for s in listed:
        name, _, layer = s.view.rpartition("/")
        lines.setdefault(name, []).append((int(layer), s))
    for name, of in lines.items():
        layers, measured = zip(*sorted(of, key=lambda pair: pair[0]))
        [line] = axes.plot(layers, [s.norm_mean for s in measured], marker="o", label=name)
        low, high = ([s.norm_mean + sign * s.norm_std for s in measured] for sign in (-1, 1))
        axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        firsts = [s.first_norm_mean for s in measured]
        axes.plot(layers, firsts, color=line.get_color(), linestyle="--", linewidth=1, label=f"{name}, first tokens")
    axes.set_xlabel("layer")
    axes.set_ylabel("norm of the states")
    axes.set_xticks(sorted({layer for of in lines.values() for layer, _ in of}))
    axes.legend(frameon=False, fontsize=8)
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

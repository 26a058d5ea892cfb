"""Pictures of a store by matplotlib: `plot`, PNG, SVG or PDF by the file's suffix.

Invariant: a picture is drawn from facts that `--json` prints, too; no window, no global state of matplotlib.
Exercised by: `stillhouse inspect plot STORE cka.png`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....data.errors import StoreError, UsageError
from ..numbers.similarity import Similarity
from ..numbers.statistics import Statistics
from ..numbers.word_map import WordMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def similarity(s: Similarity) -> Figure:
    """A heat map of linear CKA, each cell with its number."""
    from matplotlib.figure import Figure

    side = 2.4 + 0.55 * len(s.views)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
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
    """Mean norm by layer, a line a teacher and context; a band of one deviation; first tokens dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Statistics]] = {}
    for s in listed:
        lines.setdefault(s.view.rpartition("/")[0], []).append(s)
    for name, of in lines.items():
        of = sorted(of, key=lambda s: int(s.view.rpartition("/")[2]))
        layers = [int(s.view.rpartition("/")[2]) for s in of]
        [line] = axes.plot(layers, [s.norm_mean for s in of], marker="o", label=name)
        low, high = [s.norm_mean - s.norm_std for s in of], [s.norm_mean + s.norm_std for s in of]
        axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        firsts = [s.first_norm_mean for s in of]
        axes.plot(layers, firsts, color=line.get_color(), linestyle="--", linewidth=1, label=f"{name}, first tokens")
    axes.set_xlabel("layer")
    axes.set_ylabel("norm of the states")
    axes.set_xticks(sorted({int(s.view.rpartition("/")[2]) for s in listed}))
    axes.legend(frameon=False, fontsize=8)
    return figure


def word(m: WordMap) -> Figure:
    """A word's occurrences on their first two principal components, coloured by view."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for view in m.views:
        of = [p for p in m.points if p.view == view]
        axes.scatter([p.x for p in of], [p.y for p in of], s=22, alpha=0.75, label=view, linewidths=0)
    axes.set_xlabel(f"first component ({m.explained[0]:.0%} of the variance)")
    second = m.explained[1] if len(m.explained) > 1 else 0.0
    axes.set_ylabel(f"second component ({second:.0%})")
    axes.set_title(f"{m.word!r}, {m.shown} of {m.found} occurrences")
    figure.legend(loc="outside lower center", ncols=min(3, len(m.views)), frameon=False, fontsize=8)
    return figure


def check_path(path: Path, force: bool) -> None:
    """Errors: UsageError for a suffix that is no picture's and for a file that is there already."""
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"cannot draw {path.suffix or 'a file without suffix'}", where=path, expected=", ".join(SUFFIXES)
        )
    if path.exists() and not force:
        raise UsageError("is there already", where=path, remedy="remove it or give --force")


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all; the same facts give the same bytes of SVG."""
    import matplotlib

    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "stillhouse"}):
            date = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(scratch, dpi=150, metadata=date)
        os.replace(scratch, path)
    except OSError as e:
        raise StoreError(f"cannot be written: {e.strerror}", where=path) from e
    finally:
        scratch.unlink(missing_ok=True)

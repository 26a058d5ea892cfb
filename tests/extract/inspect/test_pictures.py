"""What the pictures show: norms on a panel for each teacher, and the probes of `views`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stillhouse.data.units import train_units
from stillhouse.extract.inspect.numbers.choose_views import choose
from stillhouse.extract.inspect.numbers.statistics import statistics
from stillhouse.extract.inspect.show import plots
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store

TEXTS = [f"w{a:02} w{b:02} w{a + b:02}" for a in range(6) for b in range(6)]


@pytest.fixture(scope="module")
def two(known: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("two")
    path = known.build(folder, TEXTS, layers=(0, 4)).path
    small = Request("small", [0, 2], ["alone"], transform="lower")
    extract(path, known.corpus_of(folder, TEXTS), known.Teacher(width=4, seed=1), small)
    return Store.open(path)


def test_a_panel_for_each_teacher(two: Store) -> None:
    panels = plots.norms(measured := statistics(two, two.views, full=True, rank=False)).axes
    assert [p.get_title() for p in panels] == ["known", "small"]
    labels = [[text.get_text() for text in p.get_legend().get_texts()] for p in panels]
    both = ["alone", "alone, first tokens", "both:8", "both:8, first tokens"]
    assert labels == [both, both[:2]] and all(p.get_yscale() == "linear" for p in panels)
    norms = {s.view: s.norm_mean for s in measured}
    assert panels[1].lines[0].get_ydata() == pytest.approx([norms["small/alone/0"], norms["small/alone/2"]])


def test_the_probes(two: Store, known: SimpleNamespace, tmp_path: Path) -> None:
    corpus = known.corpus_of(tmp_path, TEXTS)
    choice = choose(two, two.views, corpus, train_units(TEXTS, "characters"))
    figure = plots.probes(choice)
    [axes] = figure.axes
    rows = [*choice.views, *choice.static][::-1]
    widths = [bar.get_width() for bar in axes.patches]
    assert np.allclose(widths, [p.here_r2 for p in rows] + [p.next_r2 for p in rows])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert [n.split(" ")[0] for n in names] == [p.view for p in rows]
    assert sorted(n for n in names if "(" in n) == sorted(f"{s.view} ({i})" for i, s in enumerate(choice.suggested, 1))
    plots.save(figure, tmp_path / "probes.svg")

"""A decoder whose first token of each pass has a long state of its own, which is alike in all texts.

Each number is that of the same store without such states.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.units import train_units
from stillhouse.extract.inspect.facts.diff import diff
from stillhouse.extract.inspect.numbers import choose_views as choosing
from stillhouse.extract.inspect.numbers import neighbours
from stillhouse.extract.inspect.numbers.similarity import centred_gram, similarity, states_at
from stillhouse.extract.inspect.numbers.statistics import statistics
from stillhouse.extract.inspect.numbers.word_map import word_map
from stillhouse.extract.inspect.sample import counted
from stillhouse.extract.inspect.show import numbers as text
from stillhouse.extract.inspect.show import page, plots
from stillhouse.extract.store import Store, View

TEXTS = [" ".join(f"w{(i * 7 + j * j) % 40:02}" for j in range(4 + i % 5)) for i in range(90)] + ["w05"]
LAYERS = (0, 2, 4)
VIEWS = [View("known", "alone", layer) for layer in LAYERS]


def sinking(known: SimpleNamespace, sink: float | None) -> Any:
    """Layer 2 is layer 0 with noise. In layer 4, the first token of each pass is long if there is a `sink`."""

    class Sinking(known.Teacher):  # type: ignore[misc, name-defined]
        def states(self, batch: list[Any], layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
            out = {k: np.zeros((len(batch), max(len(w.ids) for w in batch), self.width), np.float32) for k in layers}
            for row, window in enumerate(batch):
                for k in layers:
                    out[k][row, : len(window.ids)] = own = self.table[window.ids]
                    out[k][row, : len(window.ids)] += 0.1 * k * np.cos(np.arange(own.size)).reshape(own.shape)
                    if k == 4 and sink:
                        out[k][row, 1] = sink
            return {k: torch.from_numpy(v) for k, v in out.items()}

    return Sinking(kind="decoder")


@pytest.fixture(scope="module")
def stores(known: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """With a sink, and without."""
    folders = (tmp_path_factory.mktemp(name) for name in ("sink", "plain"))
    made = (
        known.build(folder, TEXTS, layers=LAYERS, contexts=("alone",), teacher=sinking(known, sink))
        for folder, sink in zip(folders, (160.0, None))
    )
    return next(made), next(made)


def test_the_sink_is_one(stores: tuple[Store, Store]) -> None:
    """What is left out matters: with first tokens, CKA of these views is near 0, and it is high without them."""
    ids = stores[0].utterance_ids
    lengths = stores[0].tokens(ids, "known")[0]
    with_first, without = ([np.arange(least, n) for n in lengths.tolist()] for least in (0, 1))
    for tokens, low, high in ((with_first, -0.1, 0.2), (without, 0.8, 1.0)):
        grams = [centred_gram(states_at(stores[0], view, ids, tokens)) for view in VIEWS[::2]]
        assert low < float((grams[0] * grams[1]).sum()) < high
    found = statistics(stores[0], VIEWS, full=True)[-1]
    assert found.first_norm_mean > 100 * found.norm_mean


def test_similarity_and_stats(stores: tuple[Store, Store]) -> None:
    found, plain = (similarity(s, VIEWS, 5000) for s in stores)
    assert found == plain and found.cka[0][2] > 0.8 and found.places == sum(len(t.split()) - 1 for t in TEXTS)
    assert "without first tokens of decoders" in text.similarity(found)
    both = [statistics(s, VIEWS, full=True) for s in stores]
    assert [(s.norm_mean, s.effective_rank, s.outliers) for s in both[0]] == [
        (s.norm_mean, s.effective_rank, s.outliers) for s in both[1]
    ]


def test_views(stores: tuple[Store, Store], known: SimpleNamespace, tmp_path: Path) -> None:
    corpus, units = known.corpus_of(tmp_path, TEXTS), train_units(TEXTS, "characters")
    found, plain = (choosing.choose(s, VIEWS, corpus, units) for s in stores)
    assert found == plain


def test_words_and_neighbours(stores: tuple[Store, Store]) -> None:
    found, plain = (word_map(s, VIEWS, "w05") for s in stores)
    assert found == plain and all(p.token > 0 for p in found.points) and found.found >= 2
    last = VIEWS[-1]
    utterance = next(i for i in stores[0].utterance_ids if stores[0].tokens([i], "known")[0][0] > 4)
    for word in ("2", "1"):
        near = [neighbours.nearest(s, last, utterance, word, 12) for s in stores]
        assert near[0] == near[1] and all(n.token > 0 for n in near[0].neighbours)
        assert near[0].searched == sum(len(t.split()) - 1 for t in TEXTS) - (len(near[0].sentence.split()) - 1)
    first = neighbours.nearest(stores[0], last, utterance, "0", 5)
    assert first.first_tokens and {n.token for n in first.neighbours} == {0}
    assert "first token" in text.neighbours(first) and "first token" not in text.neighbours(near[0])
    moved = [neighbours.compare(s, utterance, VIEWS[::2])[0] for s in stores]
    assert moved[0].cosine == moved[1].cosine == pytest.approx(np.mean([m.cosine for m in moved[0].tokens[1:]]))
    assert moved[0].tokens[0] != moved[1].tokens[0]


def test_pictures_and_the_page(stores: tuple[Store, Store]) -> None:
    pages = [page.collect(s, words=["w05"]) for s in stores]
    assert pages[0].similarities == pages[1].similarities and pages[0].maps == pages[1].maps
    assert pages[0].neighbours == pages[1].neighbours
    [axes] = plots.norms(statistics(stores[0], VIEWS, full=True)).axes
    assert axes.get_title() == "known" and axes.get_yscale() == "log"
    [axes] = plots.norms(statistics(stores[1], VIEWS, full=True)).axes
    assert axes.get_yscale() == "linear"


def test_a_difference_is_not_hidden(stores: tuple[Store, Store]) -> None:
    """The share of the largest number is that of the largest number of the same kind of token."""
    [numbers] = [n for n in diff(*stores, full=True).numbers if n.view == VIEWS[-1].address]
    assert numbers.equal < 1 and numbers.largest > 100 and 0.9 < numbers.largest_share < 1.1


def test_the_error_of_int8_is_not_hidden(known: SimpleNamespace, tmp_path: Path) -> None:
    """The long states widen the norms, by which all others are quantised, and would make their error look small."""
    made = []
    for dtype in ("float32", "int8"):
        folder, teacher = tmp_path / dtype, sinking(known, 160.0)
        made.append(known.build(folder, TEXTS, layers=(4,), contexts=("alone",), teacher=teacher, dtype=dtype))
    view, ids = VIEWS[-1], made[0].utterance_ids
    true, stored = (s.gather(ids, [view], "float32") for s in made)
    later = counted(made[0], "known", true.lengths["known"])
    error = (true.states[view] - stored.states[view])[later]
    share = float(np.sqrt(np.square(error).mean() / np.square(true.states[view][later]).mean()))
    loss = made[1].loss(view)
    assert share > 0.03 and loss is not None and loss.relative == pytest.approx(share, rel=0.05)
    [found] = statistics(made[1], [view], full=True)
    assert found.int8_error == loss.relative and f"{loss.relative:.2%}" in text.statistics([found])

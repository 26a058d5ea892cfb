"""A store as one HTML page that needs nothing else: `report`.

Invariant: the page holds no link, script or picture from anywhere; every number in it comes from the facts that the
other commands print. Exercised by: `stillhouse inspect report STORE store.html`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import NoStoreError, StoreError, UsageError
from ...store import Store, View
from ..facts import store as facts
from ..facts import utterance as showing
from ..numbers import neighbours, statistics
from ..numbers import similarity as cka
from ..numbers import word_map as occurrences
from ..sample import affordable, held_rows, sample_rows, spread, whole
from .terminal import share, size

COLOURS = 6  # that the page's style names, and views of a word's map
MOST_UTTERANCES = 3
MOST_READ = 5000  # utterances that are looked through for frequent words
MOST_COMPARED = 24  # views in the heat map
MOST_MEASURED = 60  # views whose states are read for the table
MOST_SHOWN = 8  # of each teacher, in the tables of tokens
SEARCHED = 100_000  # tokens that the nearest ones are looked for among, where the view is not too wide


@dataclass(frozen=True)
class StorePage:
    """What the page shows; `maps` are of words in the last layer of each teacher."""

    store: facts.StoreFacts
    views: list[facts.ViewFacts]
    statistics: list[statistics.Statistics]
    similarity: cka.Similarity | None
    utterances: list[showing.Shown]
    maps: list[occurrences.WordMap]
    neighbours: list[neighbours.Neighbours]
    findings: list[Any]
    full: bool


def collect(
    store: Store,
    *,
    words: Sequence[str] = (),
    tokens: int | None = None,
    seed: int = 0,
    full: bool = False,
    report: Callable[[View], None] | None = None,
) -> StorePage:
    """All facts of a page. Views of which nothing is committed are listed and no more; words None has are left out.

    Samples are bounded, so that a page takes seconds of any store; `full`: every view, every token, but for CKA.
    """
    planned = store.planned_views
    listed = facts.view_facts(store, planned)
    there, _ = whole(store, [v for v, f in zip(planned, listed) if f.tokens])
    maps, near = [], []
    for view in _last_views(store, there):
        among = spread([v for v in there if v.teacher == view.teacher and v.layer == view.layer], COLOURS)
        among = among if view in among else [*among[:-1], view]
        searched = None if full else affordable(store, [view], SEARCHED)
        rows = sample_rows(store, among, searched, seed) if len(held_rows(store, among)) else np.zeros(0, np.int64)
        for word in words or _words(store, view):
            try:
                places = occurrences.occurrences(store, view.teacher, word, rows)
                maps.append(occurrences.word_map(store, among, word, seed=seed, places=places))
            except NoStoreError:
                continue
            row, token = places[0]
            name = store.index.id(row)
            near.append(neighbours.nearest(store, view, name, str(token), 6, tokens=searched, report=report))
    similar = None
    compared = there if full else spread(there, MOST_COMPARED)
    if len(compared) > 1 and len(held_rows(store, compared)):
        similar = cka.similarity(store, compared, tokens, seed, report)
    shown = []
    if there:
        views = [v for t in dict.fromkeys(v.teacher for v in there) for v in _shown_views(there, t)]
        for row in held_rows(store, there)[:MOST_UTTERANCES]:
            shown.append(showing.show(store, store.index.id(int(row)), views))
    measured = there if full else spread(there, MOST_MEASURED)
    return StorePage(
        store=facts.store_facts(store),
        views=listed,
        statistics=statistics.statistics(
            store, measured, tokens or affordable(store, measured, 10_000), seed, report, full=full
        ),
        similarity=similar,
        utterances=shown,
        maps=maps,
        neighbours=near,
        findings=facts.verified(store).findings,
        full=full,
    )


def _shown_views(views: Sequence[View], teacher: str) -> list[View]:
    return spread([v for v in views if v.teacher == teacher], MOST_SHOWN)


def _last_views(store: Store, views: Sequence[View]) -> list[View]:
    """Of each teacher the deepest layer in its context with most text."""
    found: dict[str, View] = {}
    for view in views:
        best = found.get(view.teacher)
        if best is None or (view.layer, view.context != "alone") >= (best.layer, best.context != "alone"):
            found[view.teacher] = view
    return list(found.values())


def _words(store: Store, view: View, count: int = 3) -> list[str]:
    """The most frequent words of six letters or more that are tokens by themselves; shorter ones mean too little."""
    rows = held_rows(store, [view])
    _, token_id, _ = store.tokens([store.index.id(int(r)) for r in rows[:MOST_READ]], view.teacher)
    different, times = np.unique(token_id, return_counts=True)
    good = [
        (-n, plain)
        for n, piece in zip(times.tolist(), showing.pieces_of(store, view.teacher, different))
        if n >= 4 and not piece.startswith("##") and len(plain := showing.plain(piece)) >= 6 and plain.isalpha()
    ]
    return list(dict.fromkeys(word for _, word in sorted(good)))[:count]


def render(report: StorePage) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size}
    environment.globals |= {"share": share, "plane": plane, "COLOURS": COLOURS}
    return environment.get_template("page.html.j2").render(r=report)


def plane(points: Sequence[occurrences.Point], width: int = 360, height: int = 260) -> list[tuple[float, float]]:
    """Points in the coordinates of a drawing of that size, both axes at one scale, a margin around."""
    x, y = np.array([p.x for p in points]), np.array([p.y for p in points])
    spread = max(float(np.ptp(x)) / (width - 30), float(np.ptp(y)) / (height - 30), 1e-9)
    left = (width - np.ptp(x) / spread) / 2
    top = (height - np.ptp(y) / spread) / 2
    drawn = np.stack([left + (x - x.min()) / spread, top + (y.max() - y) / spread], 1)
    return [(a, b) for a, b in drawn.round(1).tolist()]


def check_path(path: Path, force: bool) -> None:
    """Errors: UsageError for a file that is there already or does not end in .html."""
    if path.suffix != ".html":
        raise UsageError("a report is a page", where=path, expected=".html")
    if path.exists() and not force:
        raise UsageError("is there already", where=path, remedy="remove it or give --force")


def write(report: StorePage, path: Path) -> None:
    """The page appears whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(render(report), encoding="utf-8")
        os.replace(scratch, path)
    except OSError as e:
        raise StoreError(f"cannot be written: {e.strerror}", where=path) from e
    finally:
        scratch.unlink(missing_ok=True)

"""A store as one HTML page: `stillhouse inspect report`.

Guarantees: the page loads nothing from anywhere. Every number on it comes from the facts that the other commands print.
Try: `stillhouse inspect report STORE store.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....data.errors import NoStoreError
from ...store import Store, View
from ...store.verify.stale import is_newest
from ..facts.store import StoreFacts, ViewFacts, store_facts, verified, view_facts
from ..facts.utterance import Shown, pieces_of, plain, show
from ..frames import is_speech
from ..numbers.neighbours import Neighbours, nearest
from ..numbers.similarity import Similarity, similarity
from ..numbers.statistics import Statistics, statistics
from ..numbers.word_map import Point, WordMap, occurrences, word_map
from ..output import output_draft
from ..sample import OnProgress, available_rows, ids_of, ignore, representative, sample_rows, sample_size, undamaged
from .facts import KINDS, counted
from .terminal import share, size

COLOURS = 6  # that the page's style defines, and views in a word's map
MOST_UTTERANCES = 3
MOST_READ = 5000  # utterances in the search for frequent words
MOST_COMPARED = 24  # views in the heat map
MOST_MEASURED = 60  # views whose states are read for the table
MOST_SHOWN = 8  # views of each teacher in the tables of tokens
MOST_FRAMES = 50  # of an utterance in the tables of frames
SEARCHED = 100_000  # tokens in the search for neighbours, fewer if the view is wide


@dataclass(frozen=True)
class StorePage:
    store: StoreFacts
    views: list[ViewFacts]
    statistics: list[Statistics]
    similarities: list[Similarity]  # of text teachers' views, and of speech teachers'
    utterances: list[Shown]
    maps: list[WordMap]  # of words in the last layer of each teacher
    neighbours: list[Neighbours]
    findings: list[Any]
    full: bool


def collect(
    store: Store,
    *,
    words: Sequence[str] = (),
    tokens: int | None = None,
    seed: int = 0,
    full: bool = False,
    on_progress: OnProgress = ignore,
) -> StorePage:
    """Collect the facts of a page, for `words` or frequent words. `full` reads all views and tokens, except for CKA."""
    planned = store.planned_views
    listed = view_facts(store, planned)
    views, _ = undamaged(store, [v for v, f in zip(planned, listed) if f.tokens])
    maps, near = [], []
    for view in _last_views([v for v in views if not is_speech(store, v.teacher)]):
        among = representative([v for v in views if v.teacher == view.teacher and v.layer == view.layer], COLOURS)
        among = among if view in among else [*among[:-1], view]
        searched = None if full else sample_size(store, [view], SEARCHED)
        rows = sample_rows(store, among, searched, seed) if len(available_rows(store, among)) else np.zeros(0, np.int64)
        for word in words or _words(store, view):
            try:
                places = occurrences(store, view.teacher, word, rows)
                maps.append(word_map(store, among, word, seed=seed, places=places))
            except NoStoreError:
                continue
            row, token = places[0]
            name = store.index.id(row)
            near.append(nearest(store, view, name, str(token), 6, tokens=searched, on_progress=on_progress))
    similar = []
    for axis in ("token", "frame"):
        compared = [v for v in views if store.plan.teachers[v.teacher].axis == axis]
        compared = compared if full else representative(compared, MOST_COMPARED)
        if len(compared) > 1 and len(available_rows(store, compared)):
            similar.append(similarity(store, compared, tokens, seed, on_progress))
    shown = []
    if views:
        by_teacher = [[v for v in views if v.teacher == t] for t in dict.fromkeys(v.teacher for v in views)]
        shown_views = [v for of in by_teacher for v in representative(of, MOST_SHOWN)]
        ids = ids_of(store, available_rows(store, views))
        newest = is_newest(store, views[0].teacher, ids)
        shown = [show(store, ids[i], shown_views) for i in np.flatnonzero(newest)[:MOST_UTTERANCES].tolist()]
    measured = views if full else representative(views, MOST_MEASURED)
    most = tokens or sample_size(store, measured, 10_000)
    return StorePage(
        store=store_facts(store),
        views=listed,
        statistics=statistics(store, measured, most, seed, on_progress, full=full),
        similarities=similar,
        utterances=shown,
        maps=maps,
        neighbours=near,
        findings=verified(store).findings,
        full=full,
    )


def _last_views(views: Sequence[View]) -> list[View]:
    """The deepest layer of each teacher, if possible in a context with neighbours."""
    deepest = {v.teacher: v for v in sorted(views, key=lambda v: (v.layer, v.context != "alone"))}
    return [deepest[teacher] for teacher in dict.fromkeys(v.teacher for v in views)]


def _words(store: Store, view: View, count: int = 3) -> list[str]:
    """The most frequent words that are single tokens and have at least six letters, because short words mean little."""
    rows = available_rows(store, [view])[:MOST_READ]
    _, token_id, _ = store.tokens(ids_of(store, rows), view.teacher)
    different, times = np.unique(token_id, return_counts=True)
    frequent = [
        (-n, word)
        for n, piece in zip(times.tolist(), pieces_of(store, view.teacher, different))
        if n >= 4 and not piece.startswith("##") and len(word := plain(piece)) >= 6 and word.isalpha()
    ]
    return list(dict.fromkeys(word for _, word in sorted(frequent)))[:count]


def render(page: StorePage) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"size": size}
    environment.globals |= {"share": share, "plane": plane, "counted": counted, "COLOURS": COLOURS, "KINDS": KINDS}
    environment.globals["MOST_FRAMES"] = MOST_FRAMES
    return environment.get_template("page.html.j2").render(r=page)


def plane(points: Sequence[Point], width: int = 360, height: int = 260) -> list[tuple[float, float]]:
    """Return the points in the coordinates of a drawing of that size, with one scale for both axes and a margin."""
    x, y = np.array([p.x for p in points]), np.array([p.y for p in points])
    scale = max(float(np.ptp(x)) / (width - 30), float(np.ptp(y)) / (height - 30), 1e-9)
    left = (width - np.ptp(x) / scale) / 2
    top = (height - np.ptp(y) / scale) / 2
    across, down = left + (x - x.min()) / scale, top + (y.max() - y) / scale
    return list(zip(across.round(1).tolist(), down.round(1).tolist()))


def write(page: StorePage, path: Path) -> None:
    """Write the page whole or not at all."""
    with output_draft(path) as draft:
        draft.write_text(render(page), encoding="utf-8")

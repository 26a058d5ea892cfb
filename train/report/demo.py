"""The page of the demo: error rates, curves, hypotheses, the store, commands and times.

Guarantees: those of html.py.
Try: `stillhouse demo`, which ends with this page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..score.wer import Score
from .html import ExampleSection, Metrics, curves, page, step_times

if TYPE_CHECKING:
    from ...extract.store import Store


@dataclass(frozen=True)
class ErrorRow:
    """A row of the table of error rates, where `limit` is the largest WER that passes."""

    name: str
    what: str
    score: Score
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.limit is None or self.score.wer.rate <= self.limit


@dataclass(frozen=True)
class Stage:
    """A part of the work: the command as you would type it, and the seconds that it took."""

    name: str
    command: str
    seconds: float


@dataclass(frozen=True)
class DemoPage:
    """What the page shows. `store` is from `store_facts`."""

    title: str
    lead: str
    rows: Sequence[ErrorRow]
    sections: Sequence[ExampleSection] = ()
    metrics: Metrics = ()
    store: Mapping[str, Any] | None = None
    stages: Sequence[Stage] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def store_facts(store: Store) -> dict[str, Any]:
    """Return what a store holds: utterances, bytes on disk, and each teacher with its views."""
    teachers = []
    for name in sorted({v.teacher for v in store.views}):
        info = store.teacher(name)
        facts = {key: getattr(info, key) for key in ("kind", "width", "depth", "tokens", "dtype")}
        model = "/".join(Path(info.model).parts[-2:])  # the end of a folder, or the whole name of a hub's model
        views = [v.address for v in store.views if v.teacher == name]
        teachers.append({"name": name, "model": model, "views": views, **facts})
    size = sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
    return {"path": store.path.name, "utterances": len(store.utterance_ids), "bytes": size, "teachers": teachers}


def render(report: DemoPage) -> str:
    """Return the page."""
    values = {"curves": curves(report.metrics), "step_times": step_times(report.metrics)}
    return page("demo.html.j2", report.title, r=report, **values)

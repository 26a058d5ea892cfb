"""A run as one HTML page that needs nothing else: error rates, curves, hypotheses, the store, commands, times.

Invariant: the page holds no link, no script and no image from elsewhere, and what a corpus says is escaped.
Run: `stillhouse demo`, which ends in one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..score.wer import Score
from .html import curves, page, step_times

if TYPE_CHECKING:
    from ...extract.store import Store


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


def render(report: DemoPage) -> str:
    """The page, self-contained."""
    return page("demo.html.j2", r=report, curves=curves(report.metrics), step_times=step_times(report.metrics))

"""What two stores have in common and what not: `diff`.

Invariant: numbers are compared only where both stores hold a view of the same text cut into the same tokens.
Exercised by: `stillhouse inspect diff A B`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from ...store import Store, View, to_float32
from ..sample import affordable, cut, held_rows, states_at_once, unmap

NAMED = 20  # utterances of each kind that are listed; all are counted
BLOCK_TOKENS = 16_384
SAMPLE_TOKENS = 20_000


@dataclass(frozen=True)
class SettingDiffers:
    """`setting` of a teacher that both stores have."""

    teacher: str
    setting: str
    a: str
    b: str


@dataclass(frozen=True)
class UtterancesDiffer:
    """Counts, and the first twenty of each kind. `changed`: another text; `tokenised`: the same, cut otherwise."""

    both: int
    only_a: int
    only_b: int
    changed: int
    tokenised: int
    only_a_ids: list[str]
    only_b_ids: list[str]
    changed_ids: list[str]
    tokenised_ids: list[str]


@dataclass(frozen=True)
class NumbersDiffer:
    """A view of both stores at `tokens` common tokens; `equal` is the share whose numbers are the same to the bit."""

    view: str
    tokens: int
    equal: float
    largest: float  # absolute difference of two numbers
    largest_share: float  # of the largest absolute number
    cosine: float  # smallest of a token with itself


@dataclass(frozen=True)
class AvailableDiffers:
    """A view of both stores, of which one has states of more tokens: its extraction is further on."""

    view: str
    a: int
    b: int


@dataclass(frozen=True)
class StoreDifference:
    a: str
    b: str
    same: bool
    teachers_only_a: list[str]
    teachers_only_b: list[str]
    views_only_a: list[str]
    views_only_b: list[str]
    settings: list[SettingDiffers]
    utterances: UtterancesDiffer
    numbers: list[NumbersDiffer]
    held: list[AvailableDiffers] = field(default_factory=list)


# What a teacher has by its place on the axes, or by its history, is told by the views
_NOT_SETTINGS = {"name", "contexts", "layers", "fingerprints"}


def diff(
    a: Store,
    b: Store,
    tokens: int | None = None,
    seed: int = 0,
    report: Callable[[View], None] | None = None,
    full: bool = False,
) -> StoreDifference:
    """Compare settings, utterances and the states of about `tokens` tokens a view (None: 20,000, but fewer of views
    that are wide or many), or `full`: of all.
    """
    teachers = [name for name in a.plan.teachers if name in b.plan.teachers]
    settings = [
        SettingDiffers(name, key, str(old), str(new))
        for name in teachers
        for (key, old), new in zip(
            asdict(a.plan.teachers[name]).items(), asdict(b.plan.teachers[name]).values(), strict=True
        )
        if key not in _NOT_SETTINGS and old != new
    ]
    utterances, common = _utterances(a, b, teachers)
    views_a, views_b = set(a.planned_views), set(b.planned_views)
    shared = [v for v in a.planned_views if v in views_b and a.plan.teachers[v.teacher].width == _width(b, v)]
    numbers = []
    most = None if full else tokens or affordable(a, shared, SAMPLE_TOKENS)
    for view in shared:
        if report is not None:
            report(view)
        found = _numbers(a, b, view, common, most, seed)
        if found is not None:
            numbers.append(found)
    teachers_only_a = [t for t in a.plan.teachers if t not in b.plan.teachers]
    teachers_only_b = [t for t in b.plan.teachers if t not in a.plan.teachers]
    only_a, only_b = sorted(views_a - views_b), sorted(views_b - views_a)
    u = utterances
    whole = set(a.views) & set(b.views)
    counted = [AvailableDiffers(v.address, _held_tokens(a, v), _held_tokens(b, v)) for v in shared if v not in whole]
    held = [h for h in counted if h.a != h.b]
    same = not (held or settings or only_a or only_b or u.only_a or u.only_b or u.changed or u.tokenised)
    return StoreDifference(
        a=str(a.path),
        b=str(b.path),
        same=same and all(n.equal == 1 for n in numbers),
        teachers_only_a=teachers_only_a,
        teachers_only_b=teachers_only_b,
        views_only_a=[v.address for v in only_a],
        views_only_b=[v.address for v in only_b],
        settings=settings,
        utterances=utterances,
        numbers=numbers,
        held=held,
    )


def _held_tokens(store: Store, view: View) -> int:
    return int(store.lengths(view.teacher)[store.available(view)].sum())


def _width(store: Store, view: View) -> int:
    return store.plan.teachers[view.teacher].width


def _utterances(a: Store, b: Store, teachers: list[str]) -> tuple[UtterancesDiffer, np.ndarray]:
    """And the rows in `a` of the utterances that both have, of one text and one tokenisation: bool [U]."""
    ids_a, ids_b = a.utterance_ids, b.utterance_ids
    held_a, held_b = set(ids_a), set(ids_b)
    both = [i for i in ids_a if i in held_b]
    only_a, only_b = [i for i in ids_a if i not in held_b], [i for i in ids_b if i not in held_a]
    unlike = a.text_hash(both) != b.text_hash(both) if both else np.zeros(0, bool)
    cut_otherwise = np.zeros(len(both), bool)
    for teacher in teachers:
        cut_otherwise |= _tokenised_otherwise(a, b, both, teacher)
    changed = [i for i, x in zip(both, unlike.tolist()) if x]
    tokenised = [i for i, x, y in zip(both, cut_otherwise.tolist(), unlike.tolist()) if x and not y]
    common = np.zeros(len(a.index), bool)
    common[a.rows([i for i, x in zip(both, (unlike | cut_otherwise).tolist()) if not x])] = True
    counts = len(both), len(only_a), len(only_b), len(changed), len(tokenised)
    return UtterancesDiffer(*counts, only_a[:NAMED], only_b[:NAMED], changed[:NAMED], tokenised[:NAMED]), common


def _tokenised_otherwise(a: Store, b: Store, ids: list[str], teacher: str) -> np.ndarray:
    """bool [B]."""
    found = np.zeros(len(ids), bool)
    if not ids:
        return found
    lengths_a, token_a, span_a = a.tokens(ids, teacher)
    lengths_b, token_b, span_b = b.tokens(ids, teacher)
    found = lengths_a != lengths_b
    of_a, of_b = np.repeat(np.arange(len(ids)), lengths_a), np.repeat(np.arange(len(ids)), lengths_b)
    keep_a, keep_b = ~found[of_a], ~found[of_b]
    other = (token_a[keep_a] != token_b[keep_b]) | (span_a[keep_a] != span_b[keep_b]).any(1)
    found[of_a[keep_a][other]] = True
    return found


def _numbers(a: Store, b: Store, view: View, common: np.ndarray, tokens: int | None, seed: int) -> NumbersDiffer | None:
    rows = held_rows(a, [view])
    rows = rows[common[rows]]
    ids = [a.index.id(int(r)) for r in rows]
    rows = rows[b.has(ids, view)] if ids else rows
    if tokens is not None:
        rows = np.random.default_rng(seed).permutation(rows)
        rows = np.sort(rows[: int(np.searchsorted(np.cumsum(a.lengths(view.teacher)[rows]), tokens)) + 1])
    count = equal = 0
    largest = scale = 0.0
    cosine = 1.0
    for part in cut(a, view.teacher, rows, states_at_once(a, view.teacher, BLOCK_TOKENS)):
        ids = [a.index.id(int(r)) for r in part]
        raw = a.gather(ids, [view]).states[view], b.gather(ids, [view]).states[view]
        unmap(a)
        unmap(b)
        one, other = (to_float32(x, s.teacher(view.teacher).dtype) for x, s in zip(raw, (a, b)))
        difference = np.abs(one - other)
        count, equal = count + len(one), equal + int((difference == 0).all(1).sum())
        largest, scale = max(largest, float(difference.max())), max(scale, float(np.abs(one).max()))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = min(cosine, float(((one * other).sum(1) / np.maximum(lengths, 1e-30)).min()))
    if not count:
        return None
    share = largest / scale if scale else 0.0
    return NumbersDiffer(view.address, count, equal / count, largest, share, cosine)

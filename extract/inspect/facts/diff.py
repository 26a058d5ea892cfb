"""Compare two stores: `stillhouse inspect diff`.

Guarantees: states are compared only where both stores have a view of the same text with the same tokens, or of the same
audio.
Try: `stillhouse inspect diff A B`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from ...store import Store, View, to_float32
from ...store.format.plan import TeacherRecord
from ...store.verify.stale import behind
from ..sample import OnProgress, available_rows, blocks, counted, draw, ids_of, ignore, read_states, sample_size

NAMED = 20  # utterances of each kind that are listed
SAMPLE_TOKENS = 20_000


@dataclass(frozen=True)
class SettingDiffers:
    teacher: str
    setting: str
    a: str
    b: str


@dataclass(frozen=True)
class UtterancesDiffer:
    both: int
    only_a: int
    only_b: int
    changed: int  # with another text
    tokenised: int  # with the same text and other tokens
    only_a_ids: list[str]  # the first twenty, as of the other kinds
    only_b_ids: list[str]
    changed_ids: list[str]
    tokenised_ids: list[str]
    sounded: int = 0  # with other audio, or other frames, for a speech teacher
    sounded_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NumbersDiffer:
    view: str
    tokens: int  # common tokens or frames that were compared
    equal: float  # share of tokens with equal bits
    largest: float  # largest absolute difference of two numbers
    largest_share: (
        float  # the same as a share of the largest absolute number; a decoder's first tokens are counted apart
    )
    cosine: float  # smallest cosine between a token's states in both stores
    axis: str = "token"  # or "frame"


@dataclass(frozen=True)
class AvailableDiffers:
    view: str
    a: int  # tokens or frames that store a has states of
    b: int
    axis: str = "token"  # or "frame"


@dataclass(frozen=True)
class StoreDifference:
    a: str
    b: str
    same: bool
    teachers_only_a: list[str]
    teachers_only_b: list[str]
    views_only_a: list[str]
    views_only_b: list[str]
    settings: list[SettingDiffers]  # of teachers that both stores have
    utterances: UtterancesDiffer
    numbers: list[NumbersDiffer]
    held: list[AvailableDiffers] = field(default_factory=list)


# These are compared as views, or follow from the history of the store.
_NOT_SETTINGS = {"name", "contexts", "layers", "fingerprints"}


def diff(
    a: Store, b: Store, tokens: int | None = None, seed: int = 0, on_progress: OnProgress = ignore, full: bool = False
) -> StoreDifference:
    """Compare settings, utterances and `tokens` states of each view (None: at most SAMPLE_TOKENS), with `full` all."""
    teachers_a, teachers_b = a.plan.teachers, b.plan.teachers
    teachers = [name for name in teachers_a if name in teachers_b]
    settings = [
        SettingDiffers(name, key, str(old), str(new))
        for name in teachers
        for (key, old), new in zip(asdict(teachers_a[name]).items(), asdict(teachers_b[name]).values(), strict=True)
        if key not in _NOT_SETTINGS and old != new
    ]
    utterances, common = _utterances(a, b, teachers)
    behind_a, behind_b = behind(a), behind(b)
    settings += [
        SettingDiffers(t, "utterances behind the newest corpus", str(n), str(m))
        for t, n, m in ((t, behind_a.get(t, 0), behind_b.get(t, 0)) for t in teachers)
        if n != m
    ]
    views_a, views_b = set(a.planned_views), set(b.planned_views)
    shared = [v for v in a.planned_views if v in views_b and _same_axes(teachers_a[v.teacher], teachers_b[v.teacher])]
    most = None if full else tokens or sample_size(a, shared, SAMPLE_TOKENS)
    numbers = []
    for view in shared:
        on_progress(view)
        numbers += _numbers(a, b, view, common[view.teacher], most, seed)
    complete = set(a.views) & set(b.views)
    counts = [
        AvailableDiffers(v.address, _tokens(a, v), _tokens(b, v), teachers_a[v.teacher].axis)
        for v in shared
        if v not in complete
    ]
    available = [c for c in counts if c.a != c.b]
    only_a, only_b = ([v.address for v in sorted(x - y)] for x, y in ((views_a, views_b), (views_b, views_a)))
    u = utterances
    differs = available or settings or only_a or only_b or u.only_a or u.only_b or u.changed or u.tokenised or u.sounded
    return StoreDifference(
        a=str(a.path),
        b=str(b.path),
        same=not differs and all(n.equal == 1 for n in numbers),
        teachers_only_a=[t for t in teachers_a if t not in teachers_b],
        teachers_only_b=[t for t in teachers_b if t not in teachers_a],
        views_only_a=only_a,
        views_only_b=only_b,
        settings=settings,
        utterances=utterances,
        numbers=numbers,
        held=available,
    )


def _tokens(store: Store, view: View) -> int:
    return int(store.lengths(view.teacher)[store.available(view)].sum())


def _utterances(a: Store, b: Store, teachers: list[str]) -> tuple[UtterancesDiffer, dict[str, set[str]]]:
    """The differences, and by teacher the utterances that both stores have with one text and one tokenisation."""
    ids_a, ids_b = a.utterance_ids, b.utterance_ids
    set_a, set_b = set(ids_a), set(ids_b)
    both = [i for i in ids_a if i in set_b]
    changed = a.text_hash(both) != b.text_hash(both) if both else np.zeros(0, bool)
    tokenised: set[str] = set()
    sounded: set[str] = set()
    common: dict[str, set[str]] = {}
    for teacher in teachers:
        speech = a.plan.teachers[teacher].is_speech
        if speech != b.plan.teachers[teacher].is_speech:
            common[teacher] = set()
            continue
        # A teacher that has not been refreshed has other utterances and texts than its store's newest corpus.
        own = [i for i, x, y in zip(both, *(s.index_of(teacher).rows(both) for s in (a, b))) if x >= 0 and y >= 0]
        if speech:
            differs = {i for i, x in zip(own, _sounded(a, b, own, teacher)) if x}
            sounded |= differs
        else:
            own = [i for i, x, y in zip(own, a.text_hash(own, teacher), b.text_hash(own, teacher)) if x == y]
            differs = {i for i, x in zip(own, _tokenised(a, b, own, teacher)) if x} if own else set()
            tokenised |= differs
        common[teacher] = set(own) - differs
    only_a, only_b = [i for i in ids_a if i not in set_b], [i for i in ids_b if i not in set_a]
    changed_ids = [i for i, x in zip(both, changed) if x]
    tokenised_ids = [i for i, x in zip(both, changed) if i in tokenised and not x]
    counts = len(both), len(only_a), len(only_b), len(changed_ids), len(tokenised_ids)
    ids = only_a[:NAMED], only_b[:NAMED], changed_ids[:NAMED], tokenised_ids[:NAMED]
    sounded_ids = [i for i in both if i in sounded]
    return UtterancesDiffer(*counts, *ids, len(sounded_ids), sounded_ids[:NAMED]), common


def _same_axes(a: TeacherRecord, b: TeacherRecord) -> bool:
    """Whether the states of two teachers can be subtracted."""
    return a.width == b.width and a.axis == b.axis


def _sounded(a: Store, b: Store, ids: list[str], teacher: str) -> np.ndarray:
    """bool [B]: which utterances have other frames in `b`, or other samples, where both have extracted them."""
    lengths, hashes = [], []
    for store in (a, b):
        rows = store.rows(ids, teacher)
        view = next(v for v in store.planned_views if v.teacher == teacher)
        lengths.append(store.row_lengths(teacher, rows))
        hashes.append(np.where(store.available(view)[rows], store.inputs_seen(view)[0][rows], 0))
    known = (hashes[0] != 0) & (hashes[1] != 0)
    return (lengths[0] != lengths[1]) | (known & (hashes[0] != hashes[1]))


def _tokenised(a: Store, b: Store, ids: list[str], teacher: str) -> np.ndarray:
    """bool [B]: which utterances have other tokens or spans in `b`."""
    lengths_a, token_a, span_a = a.tokens(ids, teacher)
    lengths_b, token_b, span_b = b.tokens(ids, teacher)
    differs = lengths_a != lengths_b
    of_a, of_b = np.repeat(np.arange(len(ids)), lengths_a), np.repeat(np.arange(len(ids)), lengths_b)
    same_a, same_b = ~differs[of_a], ~differs[of_b]  # tokens of utterances with equal lengths
    other = (token_a[same_a] != token_b[same_b]) | (span_a[same_a] != span_b[same_b]).any(1)
    differs[of_a[same_a][other]] = True
    return differs


def _numbers(a: Store, b: Store, view: View, common: set[str], tokens: int | None, seed: int) -> list[NumbersDiffer]:
    """The difference of a view, or nothing if the stores have no states in common."""
    rows = available_rows(a, [view])
    rows = rows[[i in common for i in ids_of(a, rows)]]
    rows = rows[b.has(ids_of(a, rows), view)] if len(rows) else rows
    if tokens is not None:
        rows = draw(a, view.teacher, rows, tokens, seed)
    count = equal = 0
    largest = np.zeros(2)  # of first tokens, and of the others
    scale = np.zeros(2)
    cosine = 1.0
    for block in blocks(a, view.teacher, rows):
        ids = ids_of(a, block)
        batches = [read_states(s, view, ids) for s in (a, b)]
        one, other = (to_float32(g.states[view], s.teacher(view.teacher).dtype) for g, s in zip(batches, (a, b)))
        difference = np.abs(one - other)
        count, equal = count + len(one), equal + int((difference == 0).all(1).sum())
        later = counted(a, view.teacher, batches[0].lengths[view.teacher])
        for number, kind in enumerate((~later, later)):
            largest[number] = max(largest[number], difference[kind].max(initial=0))
            scale[number] = max(scale[number], np.abs(one[kind]).max(initial=0))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = min(cosine, float(((one * other).sum(1) / np.maximum(norms, 1e-30)).min()))
    share = float((largest / np.where(scale > 0, scale, 1)).max())
    axis = a.plan.teachers[view.teacher].axis
    found = NumbersDiffer(view.address, count, equal / max(1, count), float(largest.max()), share, cosine, axis)
    return [found] if count else []

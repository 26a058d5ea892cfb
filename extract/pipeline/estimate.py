"""Estimate an extraction: tokens, work items, bytes, free disk, and time measured on a few batches.

Guarantees: nothing is written. Bytes are those that the layout will take, not an approximation.
Try: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import StoreError, UsageError, first_few
from ...data.manifest import Corpus
from ..speech.sounds import Sounds
from ..speech.teacher import AnyTeacher, SpeechTeacher
from ..store.disk.files import StoreFiles
from ..store.disk.layout import dtype_of, shard_bytes
from ..store.format.int8 import SCALE_BYTES
from ..store.format.plan import Generation, Plan, TeacherRecord, WorkItem
from ..store.format.pq import CENTROIDS
from ..store.storage import open_files
from ..store.views import parse_context
from ..teacher.batching import make_batches
from ..teacher.contexts import ItemWindows
from ..teacher.passes import SPEECH_WORDS, passes_of
from ..teacher.replicas import TeacherPool
from .corpus_diff import DraftedCorpus, windows_of
from .generation import draft_plan
from .layout import Layout, PlanDraft
from .progress import rows_text, split_committed
from .request import Request, choose_space, teacher_record

if TYPE_CHECKING:
    import torch

PROBED_BATCHES = 6
MOSTLY = 0.5  # a context that shows a larger share of the utterances nothing is a warning
SESSIONS = "give the corpus sessions (corpus import --session-pattern, or the manifest's field `session`)"
FLOAT16_MAX = 65_504.0


@dataclass(frozen=True)
class Sizing:
    """What an extraction will take. Bytes are those still to be written, and units are work items."""

    store: str
    teacher: str
    utterances: int
    tokens: int
    longest_tokens: int
    units: int
    units_missing: int
    bytes_per_view: dict[str, int]
    other_bytes: int
    bytes: int
    free_bytes: int
    fed_tokens: int
    fed_tokens_per_s: float | None  # None: nothing was measured
    seconds: float | None
    warnings: list[str] = field(default_factory=list)
    largest_value: float | None = None  # magnitude, of the states that were computed to measure the time
    largest_view: str | None = None
    dtype: str = "float16"
    passes: str = ""  # how texts share batches, in words
    axis: str = "token"  # what all numbers of tokens count: "token" or "frame"
    rate_hz: float = 0.0  # frames in a second, of a speech teacher

    @property
    def fits(self) -> bool:
        return self.bytes <= self.free_bytes

    @property
    def overflows(self) -> bool:
        """Whether the dtype cannot hold the largest value of the sample."""
        return self.largest_value is not None and self.dtype == "float16" and not self.largest_value <= FLOAT16_MAX

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits, "overflows": self.overflows}


def size_up(
    store: str | Path | StoreFiles,
    corpus: Corpus,
    teacher: AnyTeacher,
    request: Request,
    measure: bool = True,
    refresh: bool = False,
) -> Sizing:
    """Return what `extract` with the same arguments would take. With `measure`, the model runs a few batches.

    Raises StaleError if the store was made with other settings or from other texts.
    """
    files = open_files(store)
    teacher = choose_space(teacher, request, files)
    record = teacher_record(teacher, request)
    draft = draft_plan(files, corpus, teacher, record, request, refresh)
    plan = draft.plan
    record = plan.teachers[record.name]
    if isinstance(teacher, SpeechTeacher):
        teacher.corpus = corpus
    drafted = DraftedCorpus(draft, record.name)
    other = other_bytes(plan, draft.layout) if draft.new else 0
    items = plan.work_items(record.name)
    _, missing = split_committed(plan, items)
    per_view = view_bytes(record, missing)
    teacher.passes = passes_of(plan, record.name)
    measured = _measure(plan, teacher, missing, drafted) if measure and missing else None
    return Sizing(
        store=files.address,
        teacher=record.name,
        utterances=len(drafted.length),
        tokens=int(drafted.length.sum()),
        longest_tokens=int(drafted.length.max()),
        units=len(items),
        units_missing=len(missing),
        bytes_per_view=per_view,
        other_bytes=other,
        bytes=sum(per_view.values()) + other,
        free_bytes=files.free_bytes(),
        fed_tokens=0 if measured is None else measured.fed_tokens,
        fed_tokens_per_s=None if measured is None else measured.tokens_per_s,
        seconds=None if measured is None else measured.seconds,
        warnings=[*draft.warnings, *itertools.chain(*find_copies(draft))] if draft.new else [],
        largest_value=None if measured is None else measured.largest[0],
        largest_view=None if measured is None else measured.largest[1],
        dtype=record.dtype,
        passes=SPEECH_WORDS if record.is_speech else teacher.passes.words,
        axis=record.axis,
        rate_hz=record.rate_hz,
    )


def view_bytes(record: TeacherRecord, items: list[WorkItem]) -> dict[str, int]:
    """Return the bytes of `hidden` or `code`, and of `scale` in int8 stores, that work items take, by view."""
    dtype = dtype_of(record.dtype)
    arrays = [dtype.row_bytes(record.width)] + ([SCALE_BYTES] if dtype.scaled else [])
    per_view: dict[str, int] = {}
    for item in items:
        for layer in item.layers:
            address = f"{record.name}/{item.context}/{layer}"
            size = sum(shard_bytes(item.shard.rows, item.generation.shard_rows, row_bytes) for row_bytes in arrays)
            per_view[address] = per_view.get(address, 0) + size
    return per_view


def check_draft(draft: PlanDraft, on_warning: Callable[[str], None], force: bool = False) -> None:
    """Warn of what a draft will do, and raise an error if it makes no sense. With `force`, these are warnings, too.

    Raises:
        UsageError: views would be copies of others.
        StoreError: the disk is too small.
    """
    copies, warnings = find_copies(draft)
    for warning in [*draft.warnings, *warnings, *(copies if force else [])]:
        on_warning(warning)
    if force:
        return
    if copies:
        remedy = f"{SESSIONS}, ask for fewer contexts, or give --force to store copies"
        raise UsageError("; ".join(copies), where=draft.plan.paths.root, remedy=remedy)
    check_disk_space(draft)


def find_copies(draft: PlanDraft) -> tuple[list[str], list[str]]:
    """Return, in words, which of the views that a draft adds would be copies of others, and which nearly so."""
    plan, generation = draft.plan, draft.plan.generations[-1]
    name = generation.teacher
    earlier = [w.context for g in plan.generations[:-1] if g.teacher == name for w in g.work]
    added = [c for c in dict.fromkeys(w.context for w in generation.work) if c not in earlier]
    drafted = DraftedCorpus(draft, name)
    copies, warnings = _without_context(added, drafted)
    seen = [c for c in [*dict.fromkeys(earlier), *added] if c not in copies]
    same = [f"{b} would be a copy of {a}: {why}" for a, b, why in _same_contexts(seen, added, drafted)]
    return [*copies.values(), *same, *_same_teacher(plan, generation)], warnings


def _without_context(contexts: list[str], drafted: DraftedCorpus) -> tuple[dict[str, str], list[str]]:
    """{context that shows no utterance anything: why}, and warnings of those that seldom show something."""
    copies, warnings = {}, []
    spoken = drafted.length > 0
    before, after = (t > 0 for t in drafted.around())
    for context in map(parse_context, contexts):
        alone = spoken & ~((before & (context.left > 0)) | (after & (context.right > 0)))
        side = "before or after" if context.left and context.right else "before" if context.left else "after"
        share = alone.sum() / max(1, spoken.sum())
        if context.size and share == 1:
            why = f"no session of the corpus has an utterance {side} another one"
            copies[context.name] = f"{context.name} would be a copy of alone: {why}"
        elif context.size and share > MOSTLY:
            share_text = f"{share:.0%} of the utterances have none {side} them in their session"
            warnings.append(f"{context.name} is the same as alone for most of the corpus: {share_text}; {SESSIONS}")
    return copies, warnings


def _same_contexts(contexts: list[str], added: list[str], drafted: DraftedCorpus) -> Iterator[tuple[str, str, str]]:
    """Pairs of contexts that show every utterance the same, and why."""
    spoken = drafted.length > 0
    for i, b in enumerate(contexts):
        for a in contexts[:i] if b in added else ():
            one, two = parse_context(a), parse_context(b)
            if (bool(one.left), bool(one.right), one.block) != (bool(two.left), bool(two.right), two.block):
                continue
            sides = [(t, min(m, n)) for t, m, n in zip(drafted.around(), (one.left, one.right), (two.left, two.right))]
            longest = max(int(t[spoken].max(initial=0)) for t, n in sides if n)
            if longest <= max(n for _, n in sides):
                yield a, b, f"no session has more than {longest} tokens beside an utterance"


def _same_teacher(plan: Plan, generation: Generation) -> list[str]:
    """Views that another teacher of the store has, with the same model and settings."""
    name, copies = generation.teacher, []
    record = plan.teachers[name]
    for other, known in plan.teachers.items():
        theirs = {known.fingerprints.get(f"{c}/{k}") for c, layers in plan.views(other).items() for k in layers}
        views = [f"{w.context}/{k}" for w in generation.work for k in w.layers]
        same = [f"{name}/{v}" for v in views if record.fingerprints.get(v) in theirs - {None}]
        if other != name and same:
            copies.append(f"{first_few(same)} would be copies of {other}: the same model with the same settings")
    return copies


def check_disk_space(draft: PlanDraft) -> None:
    """Raise StoreError if the disk cannot hold the last generation of a draft."""
    plan = draft.plan
    if not plan.paths.files.fills_disk:
        return  # An object store has space, and a writer keeps one work item at a time on the disk.
    last = plan.generations[-1]
    items = [item for item in plan.work_items(last.teacher) if item.generation is last]
    need = sum(view_bytes(plan.teachers[last.teacher], items).values()) + other_bytes(plan, draft.layout)
    free = plan.paths.files.free_bytes()
    if need > free:
        raise StoreError(
            f"{need / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are free",
            where=plan.paths.root,
            remedy="free disk space, ask for fewer layers or contexts, or give --force to start anyway",
        )


def other_bytes(plan: Plan, layout: Layout | None) -> int:
    """Return the bytes that the last generation adds beside states: hashes, codebooks, and tokens of a new teacher."""
    g = plan.generations[-1]
    record = plan.teachers[g.teacher]
    u, c = plan.corpus["utterances"], len(g.work)
    sums = (16 * c + 4 * sum(len(w.layers) for w in g.work)) * u + 50_000 + codebook_bytes(plan)
    if layout is None:
        return sums
    index = (8 + 8 + 4 + 8 + 4 + 8 + 4) * u + sum(len(i.encode()) for i in layout.ids)
    if isinstance(layout.tokens, Sounds):
        return sums + index + 32 * u
    tokens = 12 * len(layout.shards) * layout.shard_rows
    return sums + tokens + index + len(np.unique(layout.tokens.ids)) * (4 + 10 + 2 * record.width)


def codebook_bytes(plan: Plan) -> int:
    """Return the bytes of the codebooks of the views that the last generation adds."""
    last = plan.generations[-1]
    record = plan.teachers[last.teacher]
    if not dtype_of(record.dtype).codes:
        return 0
    earlier = [g for g in plan.generations[:-1] if g.teacher == last.teacher]
    views = [{(w.context, k) for g in of for w in g.work for k in w.layers} for of in ([last], earlier)]
    return len(views[0] - views[1]) * CENTROIDS * record.width * 2


@dataclass(frozen=True)
class Measured:
    """What a few batches of one work item of each context show."""

    fed_tokens: int  # that the model will read
    tokens_per_s: float
    seconds: float
    largest: tuple[float, str]  # magnitude of a state that is kept, and its view


def _measure(plan: Plan, teacher: AnyTeacher, items: list[WorkItem], drafted: DraftedCorpus) -> Measured:
    fed_total, seconds_total = 0.0, 0.0
    largest = (0.0, "")
    for context in dict.fromkeys(item.context for item in items):
        same = [item for item in items if item.context == context]
        item = same[len(same) // 2]
        windows, generation = _windows(plan, teacher, item, drafted), item.generation
        batches = make_batches(
            windows.windows, generation.batch_tokens, generation.batch_overhead_tokens, teacher.passes
        )
        if not batches:
            continue
        chosen = [batches[i] for i in np.unique(np.linspace(0, len(batches) - 1, PROBED_BATCHES).round().astype(int))]
        with TeacherPool(teacher) as threads:
            for warm in (False, True):  # the first calls of a thread are slower
                began = time.perf_counter()
                probed = chosen if warm else chosen[:1] * threads.count
                ran = list(threads.run(probed, item.layers, _magnitudes, item))
        speed = sum(w.size for b in chosen for w in b) / (time.perf_counter() - began)
        for part, magnitudes in ran:
            for layer, values in magnitudes.items():
                kept = [values[b, k.at : k.at + k.last - k.first] for b, w in enumerate(part) for k in w.kept]
                view = f"{item.teacher}/{context}/{layer}"
                largest = max(largest, (float(np.nan_to_num(np.concatenate(kept), nan=np.inf).max()), view))
        fed = windows.size * sum(i.shard.rows for i in same) / max(1, item.shard.rows)
        fed_total, seconds_total = fed_total + fed, seconds_total + fed / speed
    return Measured(int(fed_total), fed_total / max(seconds_total, 1e-9), seconds_total, largest)


def _windows(plan: Plan, teacher: AnyTeacher, item: WorkItem, drafted: DraftedCorpus) -> ItemWindows:
    """The windows of a work item whose rows need not be on disk."""
    rows = range(item.shard.first, item.shard.last)
    positions = drafted.position[rows.start : rows.stop]
    if isinstance(teacher, SpeechTeacher):
        length = np.where(positions < 0, 0, drafted.length[positions])
        return teacher.windows(drafted.ids(rows), length)
    core_tokens = item.generation.core_tokens
    return windows_of(plan.teachers[item.teacher], item.context, core_tokens, drafted.texts, drafted.session, positions)


def _magnitudes(states: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
    """{layer: largest magnitude of each state, [B, T]}."""
    return {k: v.float().abs().amax(-1).cpu().numpy() for k, v in states.items()}


def render(s: Sizing) -> str:
    """Return an estimate as text."""
    views = [f"  {address:<32} {size / 1e6:>12,.1f} MB" for address, size in s.bytes_per_view.items()]
    longest = f"{s.longest_tokens / s.rate_hz:,.1f} s" if s.rate_hz else f"{s.longest_tokens:,}"
    books = ["codebooks"] if s.dtype.startswith("pq") else []
    *beside, last = ["index", *books] if s.rate_hz else ["tokens", "index", "vocabulary", *books]
    named = f"{', '.join(beside)} and {last}" if beside else last
    lines = [
        f"corpus       {s.utterances:,} utterances, {rows_text(s.tokens, s.rate_hz)} of {s.teacher}, longest {longest}",
        f"passes       {s.passes}",
        f"work items   {s.units_missing} of {s.units} to do",
        *views,
        f"to write     {s.bytes / 1e6:,.1f} MB, of which {named} {s.other_bytes / 1e6:,.1f} MB",
        f"free         {s.free_bytes / 1e6:,.1f} MB: {'enough' if s.fits else 'NOT ENOUGH'}",
    ]
    if s.seconds is not None:
        speed = f"{s.fed_tokens:,} tokens fed, {s.fed_tokens_per_s:,.0f} a second"
        if s.rate_hz:
            fed = f"{s.fed_tokens / s.rate_hz / 3600:,.2f} h of audio"
            speed = f"{fed}, {(s.fed_tokens_per_s or 0) / s.rate_hz:,.1f}× real time"
        lines.append(f"time         about {s.seconds / 60:,.1f} min ({speed}, one process, {os.cpu_count()} cores)")
    if s.overflows:
        lines.append(
            f"overflow     {s.largest_value:,.0f} in {s.largest_view} is beyond {s.dtype}; give --dtype bfloat16"
            if np.isfinite(s.largest_value or 0)
            else f"overflow     {s.largest_view} has values that are not finite; give --model-dtype float32"
        )
    elif s.largest_value is not None:
        lines.append(f"values       up to {s.largest_value:,.1f} in the sample, in {s.largest_view}")
    return "\n".join([*lines, *(f"warning      {warning}" for warning in s.warnings)])

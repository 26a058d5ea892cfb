"""Planning an extraction: tokenise all, order the sessions, lay out the shards, write the store's skeleton.

Invariant: the plan is a function of corpus, teacher and settings; it is on disk, whole, before any unit of work, and
never changes afterwards. Run: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ...data.errors import StaleError, UsageError
from ...data.manifest import Corpus
from ...data.text import check_transform
from ..store.disk.durable import Lock
from ..store.disk.exclusive import exclusive_access
from ..store.disk.layout import Paths, check_teacher_name
from ..store.format import plan as plans
from ..store.format.plan import Generation, Plan, PlannedWork
from ..store.remote.paths import address_of, mirror_of
from ..store.views import parse_context
from ..store.writer import versions
from ..teacher.contexts import check_context
from ..teacher.model import Teacher
from .corpus_diff import diff_corpus
from .generation import PlanDraft, missing_views, plan_more_views, plan_new_teacher, split_of, write_generation
from .layout import Layout, lay_out
from .new_store import write_new_store


@dataclass(frozen=True)
class Request:
    """What a user asks to be extracted. `batch_tokens` None: by device."""

    name: str
    layers: Sequence[int]
    contexts: Sequence[str]
    transform: str = "none"
    join: str = ""
    dtype: str = "float16"
    batch_tokens: int | None = None
    core_tokens: int = 256
    seed: int = 0


def view_fingerprint(record: plans.TeacherRecord, context: str, layer: int) -> str:
    """Hash of all settings that decide a view's numbers."""
    decides = (
        record.kind,
        record.architecture,
        record.weights_hash,
        record.tokenizer_hash,
        record.transform,
        record.join_ids,
        record.prefix_ids,
        record.suffix_ids,
        record.leading_space,
        record.window,
        record.dtype,
        record.model_dtype,
        context,
        layer,
    )
    return hashlib.blake2b(repr(decides).encode(), digest_size=16).hexdigest()


def teacher_record(teacher: Teacher, request: Request) -> plans.TeacherRecord:
    """The teacher as the store will know it. Errors: UsageError for contexts, layers, names that cannot be."""
    check_transform(request.transform)
    layers = teacher.layer_numbers(request.layers)
    contexts = list(dict.fromkeys(request.contexts))
    t = teacher.tokeniser
    room = teacher.window - len(t.prefix) - len(t.suffix)
    for name in contexts:
        check_context(parse_context(name), teacher.kind, room)
        if parse_context(name).block:
            teacher.check_blocks()
    if not layers or not contexts:
        raise UsageError("nothing to extract", expected="a layer and a context at least")
    record = plans.TeacherRecord(
        name=check_teacher_name(request.name),
        kind=teacher.kind,
        model=teacher.source,
        architecture=teacher.architecture,
        revision=teacher.revision,
        weights_hash=teacher.weights_hash(),
        tokenizer_hash=t.hash,
        transform=request.transform,
        join=request.join,
        join_ids=t.join_ids(request.join),
        prefix_ids=t.prefix,
        suffix_ids=t.suffix,
        leading_space=t.leading_space,
        width=teacher.width,
        depth=teacher.depth,
        window=teacher.window,
        dtype=request.dtype,
        model_dtype=teacher.dtype,
        contexts=contexts,
        layers=layers,
        about=teacher.about,
    )
    prints = {f"{c}/{k}": view_fingerprint(record, c, k) for c in contexts for k in layers}
    return replace(record, fingerprints=prints)


_WORDS = {
    "kind": "the kind of model",
    "architecture": "the architecture",
    "weights_hash": "the model's weights",
    "tokenizer_hash": "the tokenizer",
    "transform": "the text transform",
    "join": "the join string",
    "window": "the longest window",
    "prefix_ids": "the special tokens before a text",
    "suffix_ids": "the special tokens after a text",
    "dtype": "the stored dtype",
    "model_dtype": "the dtype of the model",
}


def differences(old: plans.TeacherRecord, new: plans.TeacherRecord) -> list[str]:
    """In words, which settings of a teacher differ."""
    out = []
    for name, words in _WORDS.items():
        if name == "weights_hash" and old.model_dtype != new.model_dtype:
            continue  # the same weights, cast
        a, b = getattr(old, name), getattr(new, name)
        if a != b and name.endswith("_hash"):
            out.append(f"{words} (stored {old.model!r}, {a[:8]}…; now {new.model!r}, {b[:8]}…)")
        elif a != b:
            out.append(f"{words} (stored {a!r}, now {b!r})")
    return out


def check_settings(plan: Plan, record: plans.TeacherRecord) -> None:
    """Errors: StaleError naming, in words, the settings in which a teacher of the store differs."""
    old = plan.teachers.get(record.name)
    differ = differences(old, record) if old is not None else []
    if differ:
        raise StaleError(
            f"teacher {record.name!r} was extracted with other settings: {'; '.join(differ)}",
            where=plan.paths.root,
            remedy="give the same settings, another --name, or another store",
        )


def make_plan(
    root: Path,
    corpus: Corpus,
    teacher: Teacher,
    request: Request,
    before: Callable[[Plan, Layout | None], None] | None = None,
    refresh: bool = False,
) -> Plan:
    """Read the store's plan; write or extend it where something asked for is not in it. Callers may race.

    `before` sees a plan before anything of its last generation is written, and may refuse it. With `refresh`, what the
    corpus no longer says may be replaced and dropped.

    Errors: StaleError where the store was made with other settings or from other texts; LockedError where the corpus
    has changed and others still write what it was.
    """
    record = teacher_record(teacher, request)
    with Lock(Paths(root).lock("plan"), wait=True):
        draft = next_plan(root, corpus, teacher, record, request, refresh)
        if draft.new_rows is not None and mirror_of(draft.plan.paths.root) is not None:
            raise UsageError(
                "the corpus has changed, and rows of a store in an object store cannot be added to",
                where=address_of(root),
                remedy="bring it to a disk, refresh it there and put it under another name: "
                f"stillhouse store cp {address_of(root)} FOLDER, the same command with FOLDER, "
                "stillhouse store cp FOLDER s3://BUCKET/NEW",
            )
        if draft.new:
            if before is not None:
                before(draft.plan, draft.layout)
            if len(draft.plan.generations) == 1 and draft.layout is not None:
                write_new_store(draft.plan, teacher, draft.layout)
            else:
                with exclusive_access(draft.plan.paths) if draft.new_rows is not None else nullcontext():
                    write_generation(draft.plan, teacher, draft.layout, draft.new_rows)
    return draft.plan


def next_plan(
    root: Path, corpus: Corpus, teacher: Teacher, record: plans.TeacherRecord, request: Request, refresh: bool = False
) -> PlanDraft:
    """The plan that holds all that is asked for. Nothing is written here. Errors: as `make_plan`."""
    if not Paths(root).store_json.exists():
        return PlanDraft(*draft_plan(root, corpus, teacher, record, request))
    plan = plans.read_plan(root)
    check_settings(plan, record)
    change = diff_corpus(plan, corpus, record, teacher.tokeniser)
    if change is not None and not refresh:
        change.check(plan, record.name)
    if record.name not in plan.teachers:
        return plan_new_teacher(plan, corpus, teacher, record, batch_sizes(teacher, request), change)
    if change is not None or missing_views(plan, record):
        return plan_more_views(plan, record, change, teacher)
    return PlanDraft(plan, new=False)


def batch_sizes(teacher: Teacher, request: Request) -> tuple[int, int]:
    """(tokens a batch, cost of a call in tokens), by device."""
    cuda = teacher.device.startswith("cuda")
    return request.batch_tokens or (32768 if cuda else 4096), 1024 if cuda else 24


def draft_plan(
    root: Path, corpus: Corpus, teacher: Teacher, record: plans.TeacherRecord, request: Request
) -> tuple[Plan, Layout]:
    """The plan of a new store, on paper: nothing is written."""
    layout = lay_out(corpus, teacher.tokeniser, request.transform, request.seed, teacher.width, request.dtype)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    batch_tokens, overhead = batch_sizes(teacher, request)
    generation = Generation(
        number=0,
        teacher=record.name,
        work=[PlannedWork(c, record.layers, [s.number for s in layout.shards]) for c in record.contexts],
        shard_rows=layout.shard_rows,
        shards=layout.shards,
        batch_tokens=batch_tokens,
        batch_overhead_tokens=overhead,
        core_tokens=request.core_tokens,
        seed=request.seed,
        created=created,
    )
    corpus_facts = {"utterances": len(layout.ids), "sessions": int(layout.session[-1]) + 1} | split_of(corpus.split)
    return Plan(Paths(root), created, corpus_facts, versions(), {record.name: record}, [generation]), layout

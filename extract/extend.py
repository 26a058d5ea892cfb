"""Extending a store by a generation: more layers, more contexts, or another teacher.

Invariant: rows, tokens and committed files that exist stay as they are; a generation only adds work. Arrays grow in
their metadata before store.json names the generation, so a planner may die at any moment.
Run: `stillhouse extract CORPUS STORE --teacher … --layers MORE --context MORE`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stillhouse.data.manifest import Corpus

from .ordering import Layout, cut_shards
from .skeleton import write_teacher
from .store import plan as plans
from .store.commits import Commits
from .store.files import fsync_folder, phase, read_json, write_json
from .store.index import Index
from .store.layout import dtype_of, group_json, shard_rows
from .store.plan import Generation, Plan, Work
from .teacher import Teacher


def missing_views(plan: Plan, record: plans.Teacher) -> dict[str, list[int]]:
    """{context: layers} that are asked for and in no generation yet."""
    have = plan.teachers[record.name].fingerprints if record.name in plan.teachers else {}
    out = {c: [k for k in record.layers if f"{c}/{k}" not in have] for c in record.contexts}
    return {c: layers for c, layers in out.items() if layers}


def next_generation(plan: Plan) -> int:
    """A number above every generation and every commit record of the store."""
    numbers = [g.number for g in plan.generations]
    for name, teacher in plan.teachers.items():
        for context in teacher.contexts:
            numbers += [c.generation for c in Commits(plan.paths, name, context).of.values()]
    return 1 + max(numbers)


def extended(plan: Plan, record: plans.Teacher) -> tuple[Plan, Generation]:
    """The plan with more views of a teacher that it has, on paper, and the generation that adds them."""
    old, latest = plan.teachers[record.name], plan.latest(record.name)
    missing = missing_views(plan, record)
    shards = [s.number for s in latest.shards]
    new = [f"{c}/{k}" for c, layers in missing.items() for k in layers]
    generation = replace(
        latest,
        number=next_generation(plan),
        work=[Work(c, layers, shards) for c, layers in missing.items()],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    grown = replace(
        old,
        contexts=old.contexts + [c for c in record.contexts if c not in old.contexts],
        layers=old.layers + [k for k in record.layers if k not in old.layers],
        fingerprints=old.fingerprints | {view: record.fingerprints[view] for view in new},
    )
    teachers = plan.teachers | {record.name: grown}
    return replace(plan, teachers=teachers, generations=[*plan.generations, generation]), generation


def with_teacher(
    plan: Plan, corpus: Corpus, teacher: Teacher, record: plans.Teacher, batch: tuple[int, int]
) -> tuple[Plan, Layout]:
    """The plan with another teacher, on paper: the same utterances in the same order, its own tokens and shards.

    `batch` is (tokens a batch, overhead in tokens).
    """
    index = Index(plan.paths.data / "utterances")
    ids, first = index.ids(), plan.generations[0]
    tokens = teacher.tokeniser.encode([corpus.by_id[i].text for i in ids], record.transform)
    lengths = tokens.length.astype(np.int64)
    rows = shard_rows(int(lengths.sum()), int(lengths.max()), record.width, dtype_of(record.dtype))
    shards, start = cut_shards(lengths, rows)
    generation = replace(
        first,
        number=next_generation(plan),
        teacher=record.name,
        work=[Work(c, record.layers, [s.number for s in shards]) for c in record.contexts],
        shard_rows=rows,
        shards=shards,
        batch_tokens=batch[0],
        batch_overhead_tokens=batch[1],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    layout = Layout(ids, np.asarray(index.text_hash), np.asarray(index.session), tokens, start, rows, shards)
    teachers = plan.teachers | {record.name: record}
    return replace(plan, teachers=teachers, generations=[*plan.generations, generation]), layout


def write_generation(plan: Plan, teacher: Teacher, layout: Layout | None) -> None:
    """Bring the last generation of a plan into force; the caller holds the lock `plan`.

    With `layout`, its teacher is new to the store.
    """
    paths, generation = plan.paths, plan.generations[-1]
    record = plan.teachers[generation.teacher]
    group = paths.data / record.name
    if layout is not None:
        shutil.rmtree(group, ignore_errors=True)  # a planner died here; the store does not know this teacher yet
        write_teacher(paths, record, teacher, layout)
        write_json(paths.data / "zarr.json", group_json({"stillhouse": {"teachers": list(plan.teachers)}}))
    else:
        c, k = len(record.contexts), len(record.layers)
        scaled = ["scale"] if dtype_of(record.dtype).scaled else []
        for name in ("hidden", "norm_mean", "norm_std", "crc32c", *scaled):
            _grow(group / name / "zarr.json", [c, k])
        for name in ("input_hash", "context_left", "context_right"):
            _grow(group / name / "zarr.json", [c])
        write_json(group / "zarr.json", group_json({"stillhouse": asdict(record)}))
    plans.write_generation(paths, generation)
    phase("planned")
    plans.write_head(plan)
    fsync_folder(paths.root)


def _grow(path: Path, leading: list[int]) -> None:
    meta = read_json(path)
    meta["shape"] = leading + meta["shape"][len(leading) :]
    write_json(path, meta)

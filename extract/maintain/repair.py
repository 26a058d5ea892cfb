"""Mending a store: damaged units are extracted again, and nothing else.

Invariant: a repair commits the next generation of a unit; a reader sees the old record or the new one. What is mended
without a model has the checksum that it had when it was written.
Run: `stillhouse inspect verify STORE --data --repair`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import StaleError
from ..store.disk.durable import Lock, Scratch
from ..store.disk.layout import Paths
from ..store.format.plan import WorkItem, read_plan
from ..store.read.rows import TeacherRows
from ..store.reader import Store
from ..store.remote.client import is_url
from ..store.remote.paths import writable_copy
from ..store.verify.bit_repair import mend_arrays, mend_records
from ..store.verify.sums import norm_damage
from ..store.verify.verify import StoreFinding, damaged_items

if TYPE_CHECKING:
    from ..pipeline.progress import Report
    from ..teacher.model import Teacher


_A_BIT = "one bit put right"


@dataclass(frozen=True)
class Repaired:
    """A unit of work, norms, or one bit of something small, and what had been wrong with it."""

    unit: str
    findings: list[StoreFinding]
    how: str = "extracted again"


def repair_all(
    root: Path, models: dict[str, str], device: str = "auto", report: Report | None = None, data: float = 1.0
) -> list[Repaired]:
    """Mend what is damaged in a store with the teachers that it names; `models` says by name where one lies now.

    What is small is put right by its checksum where one bit of it is wrong; norms are worked out anew. A teacher is
    loaded only where states of it are damaged. Errors: as `repair`; TeacherError where one is gone.
    """
    from ..pipeline.norms import fix_norms_again
    from ..teacher.model import load_teacher

    mended = []
    if not is_url(root):
        for file, what in mend_records(Path(root)):
            mended.append(Repaired(file, [StoreFinding(what, file, "")], _A_BIT))
        for where in mend_arrays(Path(root)):
            mended.append(Repaired(where, [StoreFinding("stored bytes differ from their checksum", where, "")], _A_BIT))
    store = Store.open(root)
    for view in store.views if not is_url(root) else []:
        rot = list(norm_damage(store, view))
        if rot and fix_norms_again(store, view):
            found = [StoreFinding("stored bytes differ from their checksum", r.where, r.remedy) for r in rot]
            mended.append(Repaired(f"{view.address} norms", found, "worked out again"))
    damaged = damaged_items(store, data)
    for name in dict.fromkeys(u.teacher for u, _ in damaged):
        t = store.plan.teachers[name]
        teacher = load_teacher(
            models.get(name, t.model), device=device, dtype=t.model_dtype, window=t.window, revision=t.revision
        )
        mine = [(u, f) for u, f in damaged if u.teacher == name]
        mended += [Repaired(str(u), f) for u, f in repair(root, teacher, name, report, mine)]
    return mended


def repair(
    root: Path,
    teacher: Teacher,
    name: str,
    report: Report | None = None,
    damaged: list[tuple[WorkItem, list[StoreFinding]]] | None = None,
) -> list[tuple[WorkItem, list[StoreFinding]]]:
    """Extract every damaged unit of a teacher again (or those that are known). Returns them with what was wrong.

    Errors: StaleError where the teacher is not the one that the store was made with.
    """
    from ..pipeline.generation import next_generation
    from ..pipeline.progress import ExtractionProgress
    from ..pipeline.request import Request, differences, teacher_record
    from ..pipeline.runner import ItemRunner

    store = Store.open(root)
    settings = store.teacher(name).settings
    request = Request(name, settings.layers, settings.contexts, settings.transform, settings.join, settings.dtype)
    differ = differences(settings, teacher_record(teacher, request))
    if differ:
        raise StaleError(f"this is not the teacher of {name!r}: {'; '.join(differ)}", where=root)
    if damaged is None:
        damaged = [(u, f) for u, f in damaged_items(store) if u.teacher == name]
    with writable_copy(root) as folder, Scratch(Paths(folder)) as scratch:
        plan = read_plan(folder)
        generation = next_generation(plan)
        with ItemRunner(plan, teacher, TeacherRows(plan, name), scratch.folder, ExtractionProgress(), report) as maker:
            for item, _ in damaged:
                with Lock(plan.paths.lock(name, item.context, item.shard.number), wait=True):
                    maker.make(item, generation)
    return damaged

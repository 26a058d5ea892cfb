"""Mending a store: damaged units are extracted again, and nothing else.

Invariant: a repair commits the next generation of a unit; a reader sees the old record or the new one.
Run: `stillhouse extract CORPUS STORE --repair`.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.data.errors import StaleError

from .extend import next_generation
from .plan import Request, differences, teacher_record
from .progress import Progress, Report
from .run import UnitMaker
from .store.files import Lock, Scratch
from .store.plan import Unit
from .store.reader import Store
from .store.rows import TeacherRows
from .store.verify import Finding, damaged_units
from .teacher import Teacher


def repair(root: Path, teacher: Teacher, name: str, report: Report | None = None) -> list[tuple[Unit, list[Finding]]]:
    """Extract every damaged unit of a teacher again. Returns them with what was wrong.

    Errors: StaleError where the teacher is not the one that the store was made with.
    """
    store = Store.open(root)
    settings = store.teacher(name).settings
    request = Request(name, settings.layers, settings.contexts, settings.transform, settings.join, settings.dtype)
    differ = differences(settings, teacher_record(teacher, request))
    if differ:
        raise StaleError(f"this is not the teacher of {name!r}: {'; '.join(differ)}", where=root)
    damaged = [(u, f) for u, f in damaged_units(store) if u.teacher == name]
    generation = next_generation(store.plan)
    with Scratch(store.paths) as scratch:
        rows = TeacherRows(store.plan, name)
        with UnitMaker(store.plan, teacher, rows, scratch.folder, Progress(), report) as maker:
            for unit, _ in damaged:
                with Lock(store.paths.lock(name, unit.context, unit.shard.number), wait=True):
                    maker.make(unit, generation)
    return damaged

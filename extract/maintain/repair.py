"""Repair a store: extract damaged work items again, and nothing else.

Damaged JSON records, tokens and tables of utterances cannot be extracted again. They stay as they are, and the remedy
is a backup of their files.

Guarantees: a repair commits the next generation of a work item, so a reader sees the old record or the new one. Nothing
is extracted from tokens or a plan that are damaged themselves.
Try: `stillhouse inspect verify STORE --data --repair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import CorpusError, StaleError, StoreError, first_few
from ...data.files.lock import FileLock
from ..store.disk.layout import dtype_of
from ..store.disk.locks import Scratch
from ..store.disk.paths import Paths
from ..store.format.plan import WorkItem, read_plan
from ..store.read.rows import TeacherRows
from ..store.reader import Store
from ..store.storage import open_files, writable_files
from ..store.verify.sums import norm_damage, record_damage, table_damage, token_damage
from ..store.verify.verify import StoreFinding, damaged_items, plan_findings
from ..store.views import View

if TYPE_CHECKING:
    from ..pipeline.progress import OnProgress
    from ..speech.teacher import AnyTeacher

DamagedItems = Sequence[tuple[WorkItem, list[StoreFinding]]]


@dataclass(frozen=True)
class Repaired:
    """A work item or the norms of a view, what was wrong with it, and how it was repaired."""

    unit: str
    findings: list[StoreFinding]
    how: str = "extracted again"


def repair_all(
    root: Path,
    models: dict[str, str],
    device: str = "auto",
    on_progress: OnProgress | None = None,
    data: float = 1.0,
    corpus: Path | None = None,
) -> list[Repaired]:
    """Extract damaged work items of a store again with the teachers that it names, and compute damaged norms again.

    Work items of a teacher with damaged tokens stay as they are. `verify` names everything that is left.

    Arguments:
        models: {teacher: folder of its model}, for models that are not where the store says.
        data: share of the utterances whose states are read to find damage.
        corpus: the manifest, for the audio of speech teachers.

    Raises:
        StoreError: names the JSON records that are damaged, or do not fit the arrays.
        StaleError: a model is not the teacher that the store was made with.
        TeacherError: a model cannot be loaded.
        CorpusError: a speech teacher is to be run, and there is no corpus.
    """
    from ..pipeline.norms import restore_norms
    from ..speech.teacher import load_any_teacher

    paths = Paths(open_files(root))
    records = [str(path.relative_to(paths.root)) for _, path in record_damage(paths)]
    if records:
        raise StoreError(
            f"damaged records, which no extraction makes again: {first_few(records)}",
            where=root,
            remedy="restore these files from a backup of the store",
        )
    store = Store.open(root)
    for finding in chain(*plan_findings(store).values()):
        raise StoreError(finding.what, where=finding.where, remedy="restore this file from a backup of the store")
    repaired = []
    # Where tables or tokens are damaged, rows lead to no utterance.
    intact = [] if any(table_damage(store)) else [n for n in store.plan.teachers if not any(token_damage(store, n))]
    norms = {v: found for v in _with_norms(store, intact) if (found := _norm_findings(store, v))}
    learned = [v for v in norms if not restore_norms(store, v) and dtype_of(store.teacher(v.teacher).dtype).quantised]
    damaged = damaged_items(store, data, intact)
    for name in dict.fromkeys([*(v.teacher for v in learned), *(item.teacher for item, _ in damaged)]):
        t = store.plan.teachers[name]
        if t.is_speech and corpus is None:
            what = f"states of the speech teacher {name} are damaged, and need the audio to be extracted again"
            raise CorpusError(what, where=root, remedy="give the manifest with --corpus")
        teacher = load_any_teacher(
            models.get(name, t.model),
            corpus=corpus,
            device=device,
            dtype=t.model_dtype,
            window=None if t.is_speech else t.window,
            revision=t.revision,
        )
        own = [(item, findings) for item, findings in damaged if item.teacher == name]
        views = [v for v in learned if v.teacher == name]
        repaired += [Repaired(str(i), findings) for i, findings in repair(root, teacher, name, on_progress, own, views)]
    store = Store.open(root)
    for view, findings in norms.items():
        if not _norm_findings(store, view):
            repaired.insert(0, Repaired(f"{view.address} norms", findings, "worked out again"))
    return repaired


def _norm_findings(store: Store, view: View) -> list[StoreFinding]:
    """Return what is wrong with committed norms: their checksums, or that a file cannot be read."""
    found = [
        StoreFinding("stored bytes differ from their checksum", d.where, d.remedy) for d in norm_damage(store, view)
    ]
    if not found:
        try:
            store.norms_stored(view)
        except StoreError as e:
            found.append(StoreFinding(e.what, str(e.where), e.remedy or ""))
    return found


def _with_norms(store: Store, teachers: Sequence[str]) -> list[View]:
    """Return the views of these teachers whose norms are committed and could be written again."""
    views = [v for v in store.planned_views if v.teacher in teachers and store.paths.files.writable]
    return [v for v in views if store.commits(v.teacher, v.context).has("norms", [v.layer])]


def repair(
    root: Path,
    teacher: AnyTeacher,
    name: str,
    on_progress: OnProgress | None = None,
    damaged: DamagedItems | None = None,
    norms: Sequence[View] = (),
) -> DamagedItems:
    """Extract the damaged work items of a teacher again, and return them with what was wrong. None: look for them.

    Before that, damaged `norms` of int8 and pq views are learned again. They are left alone where the model does not
    give them any more.
    Raises StaleError if `teacher` is not the one that the store was made with.
    """
    from ..pipeline.generation import next_generation
    from ..pipeline.norms import relearn_norms
    from ..pipeline.progress import ExtractionProgress
    from ..pipeline.request import Request, choose_space, differences, teacher_record
    from ..pipeline.runner import ItemRunner, LockedItem

    store = Store.open(root)
    settings = store.teacher(name).settings
    request = Request(name, settings.layers, settings.contexts, settings.transform, settings.join, settings.dtype)
    teacher = choose_space(teacher, request, store.paths.files)
    differ = differences(settings, teacher_record(teacher, request))
    if differ:
        raise StaleError(f"this is not the teacher of {name!r}: {'; '.join(differ)}", where=root)
    if damaged is None:
        damaged = damaged_items(store, teachers=[name])
    with writable_files(root) as files, Scratch(Paths(files)) as scratch:
        plan = read_plan(files)
        generation, rows, progress = next_generation(plan), TeacherRows(plan, name), ExtractionProgress()
        with ItemRunner(plan, teacher, rows, scratch.folder, progress, on_progress) as runner:
            for view in norms:
                relearn_norms(plan, view, runner.sample)
            for item, _ in damaged:
                with FileLock(plan.paths.lock(name, item.context, item.shard.number), wait=True):
                    runner.run_items([LockedItem(item, None, generation)])
    return damaged

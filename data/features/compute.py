"""Acoustic features, computed by worker processes into parts and merged into one features.h5.

Guarantees: a part gets its name when it is whole, and it is deleted after the file that holds its rows is in place. A
kill at any moment therefore neither loses rows that were reported nor computes them again.
Try: `stillhouse corpus features corpus.jsonl features.h5 --speeds 0.9,1.0,1.1`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..audio.fbank import fbank
from ..audio.noise import NoiseRecipe
from ..errors import ConfigError, FeatureError, PartialError, StaleError
from ..files.atomic import sweep_drafts
from ..files.lock import FileLock
from ..manifest import Corpus
from .file import FeatureFile
from .methods import FbankMethod, FeatureMethod
from .parts import FeatureJob, PartDone, compute_parts
from .provenance import RowSource, compare
from .rates import default_rate
from .settings import FeatureSettings, Variant, differing
from .writer import merge

__all__ = ["FeatureFile", "FeatureReport", "FeatureSettings", "PartDone", "compute_features", "fbank"]

ASSUMED_S = 10.0  # the length of an utterance whose manifest does not give it


@dataclass(frozen=True)
class FeatureReport:
    """What a run of compute_features did.

    A row is an utterance at one speed, or a noisy copy of it. `upsampled` counts utterances.
    """

    rows_before: int
    rows_computed: int
    audio_s: float
    text_only: int
    frames: int
    rate_hz: int = 16000
    upsampled: int = 0


def compute_features(
    corpus: Corpus,
    path: Path | str,
    speeds: Sequence[float] = (1.0,),
    *,
    settings: FeatureSettings | None = None,
    method: FeatureMethod | None = None,
    noise: NoiseRecipe | None = None,
    upsample: bool | None = None,
    workers: int | None = None,
    part_s: float = 300.0,
    redo_changed: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_part: Callable[[PartDone], None] | None = None,
) -> FeatureReport:
    """Compute the rows that features.h5 lacks: every utterance of the corpus at every speed.

    Without a `method` it computes Kaldi fbank. Without `settings`, the rate is `default_rate`. Audio of a lower rate
    than the features fails, unless it may be upsampled, as by default if there are `settings`. With `noise`, each
    utterance also gets noise.copies noisy copies at every speed. With 0 workers it computes in this process, and None
    uses the cores. A kill costs each worker at most a part, of `part_s` seconds of features. `on_start` gets (rows in
    the file, rows to compute), and `on_part` each part when its rows are on disk.
    Raises PartialError if utterances failed, and StaleError if the file has other settings, or if the audio of an
    utterance changed and `redo_changed` is not set.
    """
    path = Path(path)
    parts = path.with_name(path.name + ".parts")
    upsample = settings is not None if upsample is None else upsample
    speeds = _checked_speeds(speeds)
    with_audio = sum(u.audio is not None for u in corpus.utterances)
    if not with_audio:
        raise FeatureError("no utterance of the corpus has audio", where=corpus.path)
    method = method or FbankMethod(settings or FeatureSettings(rate_hz=default_rate(corpus, path)))
    settings = method.settings
    copies = 0 if noise is None else noise.copies
    wanted = tuple(Variant(speed, copy) for speed in speeds for copy in range(copies + 1))
    done: list[PartDone] = []
    with FileLock(parts / "lock", f"features {path}"):
        try:
            sweep_drafts(parts)
            left = [part for part in _part_paths(parts) if _is_whole(part)]
            sources = _files(path, left)
            stored = _stored_rows(settings, noise, sources, parts)
            before = sum(map(len, stored.values()))
            jobs = _missing(corpus, wanted, stored, path, redo_changed, upsample)
            if noise is None and any(v.copy for job in jobs for v in job.variants):
                what = "noisy copies of changed audio have to be computed again"
                raise StaleError(what, where=path, remedy="give the same --noise, --rir and --snr as before")
            if on_start is not None:
                on_start(before, sum(len(j.variants) for j in jobs))
            workers = _worker_count(workers, jobs, method.worker_s)
            first = 1 + max((int(p.stem.removeprefix("part-")) for p in left), default=-1)
            tasks = enumerate(_tasks(jobs, part_s, workers), start=first)
            named = [(parts / f"part-{number:08d}.h5", task) for number, task in tasks]
            for part in compute_parts(named, method, workers, noise):
                done.append(part)
                if on_part is not None and part.ids:
                    on_part(part)
            if new := _part_paths(parts):
                merge(path, settings, _files(path, new), parts)
                for file in new:
                    file.unlink()
        finally:
            if not _part_paths(parts):
                shutil.rmtree(parts)
    with FeatureFile(path) if path.exists() else nullcontext() as merged:
        frames = int(merged.offsets[-1]) if merged is not None else 0
    rows, audio_s = sum(d.rows for d in done), sum(d.audio_s for d in done)
    failures = {id: why for d in done for id, why in d.failures.items()}
    if failures:
        raise _partial(failures, path)
    upsampled = sum(d.upsampled for d in done)
    return FeatureReport(before, rows, audio_s, len(corpus) - with_audio, frames, settings.rate_hz, upsampled)


def _partial(failures: dict[str, str], path: Path) -> PartialError:
    shown = "\n".join(f"  {id}: {why}" for id, why in list(failures.items())[:20])
    more = f"\n  … and {len(failures) - 20} more" if len(failures) > 20 else ""
    n = len(failures)
    what = f"{n} utterance{'s' * (n > 1)} failed, the others are done:\n{shown}{more}\n"
    remedy = "repair the audio or delete the utterances from the manifest, and run the same command again"
    return PartialError(what, where=path, remedy=remedy)


def _checked_speeds(speeds: Sequence[float]) -> tuple[float, ...]:
    out = tuple(dict.fromkeys(float(s) for s in speeds))
    if not out or any(not 0.5 <= s <= 2.0 for s in out) or any(round(s, 3) != s for s in out):
        expected = "factors from 0.5 to 2 with at most three decimals"
        raise ConfigError(f"speeds {', '.join(map(str, out))}", expected=expected)
    return out


def _part_paths(parts: Path) -> list[Path]:
    return sorted(parts.glob("part-*.h5"))


def _files(path: Path, parts: Sequence[Path]) -> list[FeatureFile]:
    return [FeatureFile(p) for p in [*([path] if path.exists() else []), *parts]]


def _is_whole(part: Path) -> bool:
    """Whether a part can be read. A damaged one is deleted, and its rows are computed again."""
    try:
        FeatureFile(part).open().close()
    except FeatureError:
        part.unlink()
        return False
    return True


def _stored_rows(
    settings: FeatureSettings, noise: NoiseRecipe | None, sources: Sequence[FeatureFile], parts: Path
) -> dict[str, dict[Variant, RowSource]]:
    """Return {id: {variant: source}} of all rows. Raises StaleError if a file has other settings or other noise."""
    rows: dict[str, dict[Variant, RowSource]] = {}
    for source in sources:
        with source:
            differ = settings.differences(source.settings)
            if noise is not None and source.noise is not None:
                differ += differing(source.noise, noise.facts, "here")
            if differ:
                unfinished = source.path.parent == parts
                place, which = (parts, "unfinished features were") if unfinished else (source.path, "file was")
                remedy = f"use the same settings, write to another file, or delete {place}"
                what = f"the {which} made with other settings: {'; '.join(differ)}"
                raise StaleError(what, where=place, remedy=remedy)
            for (id, variant), audio, record in zip(source.keys(), source.audio.tolist(), source.records, strict=True):
                rows.setdefault(id, {})[variant] = RowSource(audio, record)
    return rows


def _missing(
    corpus: Corpus,
    wanted: tuple[Variant, ...],
    have: dict[str, dict[Variant, RowSource]],
    place: Path,
    redo_changed: bool,
    upsample: bool,
) -> list[FeatureJob]:
    """Return the rows to compute. Raises StaleError if audio changed, unless `redo_changed` is set."""
    changes = compare(corpus, have, corpus.utterances, full=True)
    if not redo_changed:
        changes.refuse(place, "compute them again with --redo-changed, or restore manifest and audio")
    jobs = []
    for u in corpus.utterances:
        stored = have.get(u.id, {})
        stale = changes.changed.get(u.id, {})
        # What has changed is computed again in every variant that is there, asked for or not.
        todo = [v for v in dict.fromkeys([*wanted, *stale]) if v not in stored or v in stale]
        if u.audio is not None and todo:
            jobs.append(
                FeatureJob(u.id, corpus.audio_path(u), u.start_s, u.duration_s, tuple(todo), u.channel, upsample)
            )
    return jobs


def _seconds(job: FeatureJob) -> float:
    return (job.duration_s or ASSUMED_S) * sum(1 / v.speed for v in job.variants)


def _worker_count(workers: int | None, jobs: list[FeatureJob], worker_s: float) -> int:
    if workers is not None and workers < 0:
        raise ConfigError(f"{workers} workers", expected="0 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        workers = min(cores, int(sum(map(_seconds, jobs)) / worker_s))
        workers = 0 if workers == 1 else workers
    return min(workers, len(jobs))


def _tasks(jobs: list[FeatureJob], part_s: float, workers: int) -> list[list[FeatureJob]]:
    """Runs of utterances, in order, of about part_s seconds each, or less if there are too few for all workers."""
    part_s = min(part_s, sum(map(_seconds, jobs)) / max(4 * workers, 1))
    tasks: list[list[FeatureJob]] = []
    filled = np.inf
    for job in jobs:
        if filled >= part_s:
            tasks.append([])
            filled = 0.0
        tasks[-1].append(job)
        filled += _seconds(job)
    return tasks

"""Acoustic features: Kaldi fbank, computed by worker processes into parts and merged into one features.h5.

Invariant: a part appears under its name only when it is whole, and parts go only after the file that holds their rows
is in place. So what was reported done is never lost nor computed again, whenever the process is killed.
Exercised by `stillhouse corpus features CORPUS features.h5 --speeds 0.9,1.0,1.1`.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from .audio import read_segment, resample
from .errors import AudioError, ConfigError, FeatureError, PartialError, StaleError, StillhouseError
from .feature_file import FeatureFile, FeatureSettings, Rows, merge, write_rows
from .lock import held
from .manifest import Corpus

__all__ = ["FeatureFile", "FeatureReport", "FeatureSettings", "compute_features", "fbank"]

FRAME_S, SHIFT_S = 0.025, 0.010
ASSUMED_S = 10.0  # an utterance whose manifest does not say how long it is


def fbank(samples: np.ndarray, rate_hz: int = 16000, bins: int = 80) -> np.ndarray:
    """Log mel energies of samples in [-1, 1]: float32 [S] -> float32 [T, bins], T = round(S / shift), halves up.

    Computed by `torchaudio.compliance.kaldi.fbank`. The settings are those of sherpa-onnx's features.h and
    features.cc over kaldi-native-fbank, read in their sources, so that an exported model finds at run time what it
    was trained on: samples as they are (`normalize_samples = true`), 25 ms frames every 10 ms, `snip_edges = false`
    (the edges are mirrored), dither 0, DC removed in each frame, pre-emphasis 0.97, povey window, FFT of the next power of
    two, power spectrum, triangular mel filters from 20 Hz to 400 Hz below Nyquist (`high_freq = -400`), natural log
    of the energy floored at float32's epsilon (1.19e-7, that is -15.94), no energy column, no mean subtraction.
    Raises AudioError for fewer samples than one frame.
    """
    import torch
    from torchaudio.compliance import kaldi

    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"samples of shape {samples.shape}, expected [S]")
    if len(samples) < int(rate_hz * FRAME_S):
        raise AudioError(
            f"{len(samples) / rate_hz:.4f} s is shorter than one frame",
            expected=f"at least {FRAME_S} s of audio",
        )
    with torch.inference_mode():
        mel = kaldi.fbank(
            torch.from_numpy(samples)[None],
            sample_frequency=float(rate_hz),
            num_mel_bins=bins,
            frame_length=FRAME_S * 1000,
            frame_shift=SHIFT_S * 1000,
            snip_edges=False,
            dither=0.0,
            low_freq=20.0,
            high_freq=-400.0,
            window_type="povey",
            preemphasis_coefficient=0.97,
            remove_dc_offset=True,
            use_energy=False,
        )
    return mel.numpy()


@dataclass(frozen=True)
class FeatureReport:
    """What a run of compute_features did. Rows count (utterance, speed) pairs."""

    rows_before: int
    rows_computed: int
    audio_s: float
    text_only: int
    frames: int
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One utterance's rows that are to be computed."""

    id: str
    path: Path
    start_s: float
    duration_s: float | None
    speeds: tuple[float, ...]


@dataclass(frozen=True)
class _Done:
    """What a worker says about a part that is in place."""

    ids: list[str]
    rows: int
    audio_s: float
    failures: dict[str, str]


def compute_features(
    corpus: Corpus,
    path: Path | str,
    speeds: Sequence[float] = (1.0,),
    *,
    settings: FeatureSettings | None = None,
    workers: int | None = None,
    part_s: float = 600.0,
    redo_changed: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_part: Callable[[list[str], float], None] | None = None,
) -> FeatureReport:
    """Bring features.h5 to hold every utterance of the corpus at every speed; compute only what is not there yet.

    workers: processes; 0 computes in this one; None takes the cores. part_s: seconds of features in a part, the
    most that a kill can cost each worker. on_start(rows already there, rows to do); on_part(ids, their seconds)
    is called when they are safe on disk.
    Raises StaleError where the file has other settings or an utterance's sound has changed (redo_changed computes
    those anew), LockedError where another process writes, PartialError after the rest is done where utterances failed.
    """
    path, settings = Path(path), settings or FeatureSettings()
    speeds = _checked_speeds(speeds)
    jobs_audio = [u for u in corpus.utterances if u.audio is not None]
    if not jobs_audio:
        raise FeatureError("no utterance of the corpus has audio", where=corpus.path)
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    with held(parts / "lock", what=f"features {path}"):
        try:
            before, made = _bring(
                corpus, path, speeds, settings, parts, workers, part_s, redo_changed, on_start, on_part
            )
        finally:
            if not _part_paths(parts):
                shutil.rmtree(parts)
    with FeatureFile(path) if path.exists() else nullcontext() as file:
        frames = int(file.offsets[-1]) if file is not None else 0
    rows, audio_s = sum(d.rows for d in made), sum(d.audio_s for d in made)
    failures = {id: why for d in made for id, why in d.failures.items()}
    report = FeatureReport(before, rows, audio_s, len(corpus) - len(jobs_audio), frames, failures)
    if failures:
        raise partial(failures, path)
    return report


def _bring(
    corpus: Corpus,
    path: Path,
    speeds: tuple[float, ...],
    settings: FeatureSettings,
    parts: Path,
    workers: int | None,
    part_s: float,
    redo_changed: bool,
    on_start: Callable[[int, int], None] | None,
    on_part: Callable[[list[str], float], None] | None,
) -> tuple[int, list[_Done]]:
    """Compute what is missing into parts, merge them into the file, remove them; the lock is held."""
    for litter in [*parts.glob("*.tmp"), *parts.glob("*.merging")]:
        litter.unlink(missing_ok=True)
    left = _part_paths(parts)
    sources = [FeatureFile(p) for p in ([path] if path.exists() else []) + left]
    before = _refuse_other_settings(settings, sources, parts)
    jobs = list(_missing(corpus, speeds, sources, redo_changed))
    if on_start is not None:
        on_start(before, sum(len(j.speeds) for j in jobs))
    workers = _worker_count(workers, jobs)
    first = 1 + max((int(p.stem.removeprefix("part-")) for p in left), default=-1)
    named = [
        (parts / f"part-{first + k:08d}.h5", task) for k, task in enumerate(_tasks(jobs, part_s, workers))
    ]
    made: list[_Done] = []
    for done in _run(named, settings, workers):
        made.append(done)
        if on_part is not None and done.ids:
            on_part(done.ids, done.audio_s)
    if new := _part_paths(parts):
        whole = [FeatureFile(p) for p in ([path] if path.exists() else []) + new]
        merge(path, settings, whole, parts / "features.merging")
        for part in new:
            part.unlink()
    return before, made


def partial(failures: dict[str, str], path: Path) -> PartialError:
    shown = "\n".join(f"  {id}: {why}" for id, why in list(failures.items())[:20])
    more = f"\n  … and {len(failures) - 20} more" if len(failures) > 20 else ""
    n = len(failures)
    return PartialError(
        f"{n} utterance{'s' * (n > 1)} failed, the others are done:\n{shown}{more}\n",
        where=path,
        remedy="mend the audio or take them out of the manifest, and run the same command again",
    )


def _checked_speeds(speeds: Sequence[float]) -> tuple[float, ...]:
    out = tuple(dict.fromkeys(float(s) for s in speeds))
    if not out or any(not 0.5 <= s <= 2.0 for s in out) or any(round(s, 3) != s for s in out):
        raise ConfigError(
            f"speeds {', '.join(map(str, out))}", expected="factors from 0.5 to 2 with at most three decimals"
        )
    return out


def _part_paths(parts: Path) -> list[Path]:
    return sorted(parts.glob("part-*.h5"))


def _refuse_other_settings(settings: FeatureSettings, sources: Sequence[FeatureFile], parts: Path) -> int:
    """StaleError where a file has other settings; else how many rows there are."""
    keys: set[tuple[str, float]] = set()
    for source in sources:
        with source:
            keys.update(source.keys())
            stored = source.settings
        if differ := settings.differences(stored):
            unfinished = source.path.parent == parts
            place = parts if unfinished else source.path
            raise StaleError(
                f"{'the unfinished features were' if unfinished else 'the file was'} made with other settings: "
                + "; ".join(differ),
                where=place,
                remedy=f"ask for the same settings, write to another file, or delete {place}",
            )
    return len(keys)


def _missing(
    corpus: Corpus, speeds: tuple[float, ...], sources: Sequence[FeatureFile], redo_changed: bool
) -> Iterator[_Job]:
    have: dict[tuple[str, float], int] = {}
    for source in sources:
        with source:
            have.update(zip(source.keys(), source.audio.tolist(), strict=True))
    contents: dict[Path, bytes] = {}
    changed: list[str] = []
    for u in corpus.utterances:
        if u.audio is None:
            continue
        path = corpus.audio_path(u)
        todo = [s for s in speeds if (u.id, s) not in have]
        if len(todo) < len(speeds):
            try:
                now = identity(path, u.start_s, u.duration_s, contents)
            except OSError:
                now = None  # sound that is gone cannot be said to have changed
            stored = [s for s in speeds if (u.id, s) in have]
            stale = [s for s in stored if now is not None and have[u.id, s] != now]
            if stale:
                changed.append(u.id)
                todo += stale
        if todo:
            yield _Job(u.id, path, u.start_s, u.duration_s, tuple(todo))
    if changed and not redo_changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise StaleError(
            f"the audio, start or duration of {', '.join(changed[:5])}{more} has changed since the features were made",
            where=sources[0].path,
            remedy="compute these anew with --redo-changed, or restore them",
        )


def identity(
    path: Path, start_s: float, duration_s: float | None, cache: dict[Path, bytes] | None = None
) -> int:
    """A 64-bit name of a stretch of sound: size and five samples of the file's bytes, start and duration.

    Neither path nor time of change count: a corpus that was moved or copied is still the same.
    """
    content = cache.get(path) if cache is not None else None
    if content is None:
        fd = os.open(path, os.O_RDONLY)
        try:
            size, block = os.fstat(fd).st_size, 4096
            places = (
                range(0, max(size, 1), block)
                if size <= 8 * block
                else [k * (size - block) // 4 for k in range(5)]
            )
            content = repr(size).encode() + b"".join(os.pread(fd, block, at) for at in places)
        finally:
            os.close(fd)
        content = blake2b(content, digest_size=16).digest()
        if cache is not None:
            cache[path] = content
    tail = f"{start_s:.6f} {duration_s if duration_s is None else format(duration_s, '.6f')}".encode()
    return int.from_bytes(blake2b(content + tail, digest_size=8).digest(), "little")


def _seconds(job: _Job) -> float:
    return (job.duration_s or ASSUMED_S) * sum(1 / s for s in job.speeds)


def _worker_count(workers: int | None, jobs: list[_Job]) -> int:
    if workers is not None and workers < 0:
        raise ConfigError(f"{workers} workers", expected="0 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        # Starting a process costs about as much as 15 minutes of audio.
        workers = min(cores, int(sum(map(_seconds, jobs)) / 900))
        workers = 0 if workers == 1 else workers
    return min(workers, len(jobs))


def _tasks(jobs: list[_Job], part_s: float, workers: int) -> list[list[_Job]]:
    """Runs of utterances, in order, of about part_s seconds each; smaller where workers would go without."""
    part_s = min(part_s, sum(map(_seconds, jobs)) / max(4 * workers, 1))
    tasks: list[list[_Job]] = []
    filled = np.inf
    for job in jobs:
        if filled >= part_s:
            tasks.append([])
            filled = 0.0
        tasks[-1].append(job)
        filled += _seconds(job)
    return tasks


def _compute(target: Path, jobs: list[_Job], settings: FeatureSettings) -> _Done:
    """Compute one part and put it in place."""
    rows = Rows()
    ids: list[str] = []
    failures: dict[str, str] = {}
    audio_s = 0.0
    for job in jobs:
        try:
            samples, own_hz = read_segment(job.path, job.start_s, job.duration_s)
            name = identity(job.path, job.start_s, job.duration_s)
            made = []
            for speed in job.speeds:
                mel = fbank(
                    resample(samples, own_hz, settings.rate_hz, speed), settings.rate_hz, settings.bins
                )
                made.append((job.id, speed, name, mel))
        except (AudioError, OSError) as e:
            failures[job.id] = str(e)
            continue
        for row in made:
            rows.add(*row)
        ids.append(job.id)
        audio_s += sum(len(samples) / own_hz / s for s in job.speeds)
    if ids:
        write_rows(target, settings, rows)
    return _Done(ids, len(rows.ids), audio_s, failures)


def _run(named: list[tuple[Path, list[_Job]]], settings: FeatureSettings, workers: int) -> Iterator[_Done]:
    if workers == 0:
        for target, jobs in named:
            yield _compute(target, jobs, settings)
        return
    # Spawned, not forked: torch's threads do not survive a fork. One pipe a worker, closed everywhere else, so that
    # a worker sees the end of this process at once, even after kill -9, and leaves.
    context = multiprocessing.get_context("spawn")
    busy: dict[Any, Any] = {}
    queue = iter(named)
    try:
        for _ in range(min(workers, len(named))):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, settings), daemon=True)
            process.start()
            there.close()
            busy[here] = process
            here.send(next(queue))
        while busy:
            for here in wait(list(busy)):
                assert isinstance(here, Connection)
                try:
                    answer = here.recv()
                except (EOFError, ConnectionError):
                    busy[here].join()
                    raise FeatureError(
                        f"a worker process died (exit code {busy[here].exitcode})",
                        remedy="run the same command again: it goes on where it stopped; "
                        "with fewer --workers if memory ran out",
                    ) from None
                if isinstance(answer, BaseException):
                    raise answer
                task = next(queue, None)
                if task is None:
                    here.close()
                    busy.pop(here).join()
                else:
                    here.send(task)
                yield answer
    finally:
        for here, process in busy.items():
            here.close()
            process.terminate()
            process.join()


def _work(pipe: Connection, settings: FeatureSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            target, jobs = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: _Done | BaseException = _compute(target, jobs, settings)
        except StillhouseError as e:
            answer = e
        except Exception as e:
            answer = FeatureError(f"a worker failed: {type(e).__name__}: {e}", where=jobs[0].id)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            return

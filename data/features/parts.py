"""Parts of a feature file, and the worker processes that compute them.

Guarantees: a part gets its name when it is whole. A worker ends when its parent does.
Try: `stillhouse corpus features corpus.jsonl features.h5 --workers 2`.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.noise import NoiseRecipe
from ..audio.read import change_speed, read_segment, resample
from ..errors import AudioError, FeatureError, StillhouseError
from .methods import FeatureMethod
from .provenance import identity, record
from .settings import EncoderSettings, FeatureSettings, Variant
from .writer import Rows, write_rows


@dataclass(frozen=True)
class FeatureJob:
    """The rows of one utterance to compute."""

    id: str
    path: Path
    start_s: float
    duration_s: float | None
    variants: tuple[Variant, ...]
    channel: int | None = None
    upsample: bool = True  # whether audio of a lower rate than that of the features is used


@dataclass(frozen=True)
class PartDone:
    """A part that is in place: the utterances in it, those that failed, {id: reason}, and how many were upsampled."""

    ids: list[str]
    rows: int
    audio_s: float
    failures: dict[str, str]
    upsampled: int = 0


def compute_part(
    target: Path, jobs: list[FeatureJob], method: FeatureMethod, noise: NoiseRecipe | None = None
) -> PartDone:
    """Compute one part and write it to `target`. Copies above 0 are made with `noise`."""
    settings = method.settings
    rows = Rows()
    ids: list[str] = []
    failures: dict[str, str] = {}
    audio_s, upsampled = 0.0, 0
    excerpts: dict[Path, bytes] = {}
    files: dict[Path, tuple[int, int]] = {}
    for job in jobs:
        segment = (job.path, job.start_s, job.duration_s, job.channel)
        try:
            samples, own_hz = read_segment(*segment)
            if own_hz < settings.rate_hz and not job.upsample:
                raise _narrow(job.path, own_hz, settings)
            name, source = identity(*segment, excerpts), record(*segment, files)
            samples, seconds = resample(samples, own_hz, settings.rate_hz), len(samples) / own_hz
            at_speed = {speed: change_speed(samples, speed) for speed in {v.speed for v in job.variants}}
            heard = [_heard(at_speed[v.speed], settings.rate_hz, job.id, v, noise) for v in job.variants]
            rows_of = [(method.rows(own, job.id), method.loudness(own)) for own in heard]
        except (AudioError, OSError) as e:
            failures[job.id] = str(e)
            continue
        for variant, (frames, loudness) in zip(job.variants, rows_of):
            rows.add(job.id, variant, name, frames, source, loudness)
        ids.append(job.id)
        upsampled += own_hz < settings.rate_hz
        audio_s += seconds
    if ids:
        write_rows(target, settings, rows, None if noise is None else noise.facts)
    return PartDone(ids, len(rows.ids), audio_s, failures, upsampled)


def _heard(samples: np.ndarray, rate_hz: int, id: str, variant: Variant, noise: NoiseRecipe | None) -> np.ndarray:
    """Return samples at the variant's speed as they are, or as its noisy copy."""
    if not variant.copy:
        return samples
    assert noise is not None
    return noise.applied(samples, rate_hz, f"{id} {variant}")


def _narrow(path: Path, own_hz: int, settings: FeatureSettings) -> AudioError:
    """Return the error of audio whose rate is lower than that of the features."""
    rate_hz, remedy = settings.rate_hz, f"give --rate {settings.rate_hz} to upsample it"
    if not isinstance(settings, EncoderSettings):  # An encoder takes one rate alone.
        remedy = f"compute all features at --rate {own_hz} into another file, or {remedy}"
    return AudioError(f"the audio has {own_hz} Hz", where=path, expected=f"{rate_hz} Hz or more", remedy=remedy)


def compute_parts(
    named: list[tuple[Path, list[FeatureJob]]], method: FeatureMethod, workers: int, noise: NoiseRecipe | None = None
) -> Iterator[PartDone]:
    """Compute parts, given as (path, jobs), and yield each when it is in place, in any order.

    Raises FeatureError if a worker died. The parts that the others finished stay.
    """
    if workers == 0:
        import torch

        # Frames are too small to share among threads, and waiting threads slow down a busy machine.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for target, jobs in named:
                yield compute_part(target, jobs, method, noise)
        finally:
            torch.set_num_threads(threads)
        return
    # Workers are spawned, because torch's threads do not survive a fork. No other process has a worker's pipe open, so
    # that it sees the end of this process at once, even after kill -9.
    context = multiprocessing.get_context("spawn")
    busy: dict[Any, Any] = {}
    queue = iter(named)
    try:
        for _ in range(min(workers, len(named))):
            pipe, other = context.Pipe()
            process = context.Process(target=_work, args=(other, method, noise), daemon=True)
            process.start()
            other.close()
            busy[pipe] = process
            pipe.send(next(queue))
        while busy:
            ready: list[Any] = wait(list(busy))
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError):
                    busy[pipe].join()
                    what = f"a worker process died (exit code {busy[pipe].exitcode})"
                    remedy = "run the same command again, which resumes, with fewer --workers if memory ran out"
                    raise FeatureError(what, remedy=remedy) from None
                if isinstance(answer, BaseException):
                    raise answer
                task = next(queue, None)
                if task is None:
                    pipe.close()
                    busy.pop(pipe).join()
                else:
                    pipe.send(task)
                yield answer
    finally:
        for pipe, process in busy.items():
            pipe.close()
            process.terminate()
            process.join()


def _work(pipe: Connection, method: FeatureMethod, noise: NoiseRecipe | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends its workers.
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            target, jobs = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: PartDone | BaseException = compute_part(target, jobs, method, noise)
        except StillhouseError as e:
            answer = e
        except Exception as e:
            answer = FeatureError(f"a worker failed: {type(e).__name__}: {e}", where=jobs[0].id)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionError):
            return

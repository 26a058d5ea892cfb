"""Builds the demo's corpus: the stories, read by synthetic voices, as FLAC files and a corpus.jsonl.

Invariant: each voice speaks in a fresh process of its own, in one fixed order: a rebuilt corpus has the same
audio. The stamp demo.json is written last; a folder stamped with the same stories and voices stays as it is.
Run: `stillhouse demo`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import CorpusError
from ...data.files.atomic import write_atomic
from ...data.manifest import Utterance, write_manifest
from .espeak import EspeakVoice
from .plan import FULL, Reading, Size, Voice, cast, plan
from .stories import read_stories

if TYPE_CHECKING:
    import torch

RATE_HZ = 16000
RECIPE = 1  # raise it when the same stories and voices would give other audio
STAMP = "demo.json"


@dataclass(frozen=True)
class DemoCorpus:
    """What the corpus holds: seconds of audio and utterances of each split."""

    path: Path
    seconds: dict[str, float]
    utterances: dict[str, int]
    engine: str
    fresh: bool  # False: it was there already


def build_demo_corpus(
    folder: Path, voices: str = "espeak", size: Size = FULL, workers: int | None = None
) -> DemoCorpus:
    """Speak the stories into `folder`; `voices` is "espeak" or "hibari". Raises AudioError,
    ConfigError, and CorpusError where the folder holds another demo.
    """
    folder = Path(folder)
    readings = plan(read_stories(), cast(voices), size)
    fingerprint = _fingerprint(readings)
    done = _stamp(folder)
    if done is not None and done["fingerprint"] == fingerprint:
        return DemoCorpus(folder / "corpus.jsonl", done["seconds"], done["utterances"], done["engine"], fresh=False)
    if done is not None:
        raise CorpusError(
            "the folder holds a demo of other stories, voices or size", where=folder, remedy="delete it, or give --out"
        )
    shutil.rmtree(folder / "audio", ignore_errors=True)

    utterances: dict[int, list[Utterance]] = {}  # by place of the reading in the plan
    with _one_thread():
        for place, made in _speak_all(folder, readings, workers):
            utterances[place] = made
    ordered = [u for place in range(len(readings)) for u in utterances[place]]
    write_manifest(folder / "corpus.jsonl", ordered)

    seconds: dict[str, float] = {}
    count: dict[str, int] = {}
    for u in ordered:
        assert u.split is not None and u.duration_s is not None
        seconds[u.split] = seconds.get(u.split, 0.0) + u.duration_s
        count[u.split] = count.get(u.split, 0) + 1
    engine = readings[0].voice.engine
    stamp = {"fingerprint": fingerprint, "engine": engine, "seconds": seconds, "utterances": count}
    write_atomic(folder / STAMP, json.dumps(stamp) + "\n")
    return DemoCorpus(folder / "corpus.jsonl", seconds, count, engine, fresh=True)


def speak(voice: Voice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """One voice by its engine: (rate in Hz, int16 [S] a text)."""
    if isinstance(voice, EspeakVoice):
        from . import espeak

        return espeak.speak(voice, texts)
    from . import hibari

    return hibari.speak(voice, texts)


def speak_fresh(
    voices: Sequence[Voice], texts: Sequence[Sequence[str]], workers: int | None = None
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """`speak` for each voice in a process that did nothing before."""
    context = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, len(voices))
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        yield from pool.map(speak, voices, texts)


def _speak_all(folder: Path, readings: Sequence[Reading], workers: int | None) -> Iterator[tuple[int, list[Utterance]]]:
    of_voice: dict[Voice, list[int]] = {}
    for place, reading in enumerate(readings):
        of_voice.setdefault(reading.voice, []).append(place)
    texts = [[s for place in places for s in readings[place].story.sentences] for places in of_voice.values()]
    for (voice, places), (rate_hz, spoken) in zip(
        of_voice.items(), speak_fresh(list(of_voice), texts, workers), strict=True
    ):
        (folder / "audio" / voice.name).mkdir(parents=True, exist_ok=True)
        samples = iter(spoken)
        for place in places:
            yield place, [_write(folder, readings[place], k, next(samples), rate_hz)
                          for k in range(len(readings[place].story.sentences))]  # fmt: skip


def _write(folder: Path, reading: Reading, sentence: int, samples: np.ndarray, rate_hz: int) -> Utterance:
    import soundfile
    import torch

    voice, story = reading.voice, reading.story
    session = f"{voice.name}-{story.number:02d}"
    name = f"{session}-{sentence + 1:02d}"
    wave = _resampler(rate_hz)(torch.from_numpy(samples.astype(np.float32) / 32768))
    audio = Path("audio", voice.name, f"{name}.flac")
    soundfile.write(folder / audio, wave.clamp(-1, 1).numpy(), RATE_HZ, subtype="PCM_16")
    return Utterance(
        id=name,
        text=story.sentences[sentence],
        audio=str(audio),
        duration_s=len(wave) / RATE_HZ,
        session=session,
        speaker=voice.name,
        split=reading.split,
        meta={"story": story.title, "voice": f"{voice.engine} {voice.voice}"},
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's threads wait for each other longer than the resampling of a sentence takes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _resampler(rate_hz: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The filter is kept: making it costs more than using it on a sentence."""
    import torchaudio

    return torchaudio.transforms.Resample(rate_hz, RATE_HZ)


def _fingerprint(readings: Sequence[Reading]) -> str:
    facts = [[asdict(r.voice), r.voice.engine, r.split, asdict(r.story)] for r in readings]
    return hashlib.sha256(json.dumps([RECIPE, RATE_HZ, facts], sort_keys=True).encode()).hexdigest()[:16]


def _stamp(folder: Path) -> dict | None:
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp if (folder / "corpus.jsonl").is_file() else None

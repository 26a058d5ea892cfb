"""Build the demo's corpus: the stories, read by synthetic voices, as FLAC files and a corpus.jsonl.

Guarantees: each voice speaks in a new process of its own, in a fixed order, so a corpus that is built again has the
same audio. The stamp demo.json is written last. A folder with the stamp of the same stories and voices stays as it is.
Try: `stillhouse demo`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...data.audio.read import resample
from ...data.errors import CorpusError
from ...data.files.atomic import write_atomic
from ...data.manifest import Utterance, write_manifest
from . import espeak, hibari
from .plan import FULL, Reading, Size, Voice, plan, voice_set
from .stories import read_stories

RATE_HZ = 16000
RECIPE = 1  # Raise it if the same stories and voices give other audio.
STAMP = "demo.json"


@dataclass(frozen=True)
class DemoCorpus:
    """A corpus: seconds of audio and number of utterances by split. `built` is False if it already existed."""

    path: Path
    seconds: dict[str, float]
    utterances: dict[str, int]
    engine: str
    built: bool


def build_demo_corpus(
    folder: Path, voices: str = "espeak", size: Size = FULL, workers: int | None = None
) -> DemoCorpus:
    """Speak the stories into a folder with the voices "espeak" or "hibari", in `workers` processes (None: all cores).

    Raises AudioError if the voices are not installed, and CorpusError if the folder has another demo.
    """
    folder = Path(folder)
    readings = plan(read_stories(), voice_set(voices), size)
    facts = [[asdict(r.voice), r.voice.engine, r.split, asdict(r.story)] for r in readings]
    fingerprint = hashlib.sha256(json.dumps([RECIPE, RATE_HZ, facts], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / "corpus.jsonl"
    stamp = _read_stamp(folder)
    if stamp is not None:
        if stamp.pop("fingerprint") == fingerprint:
            return DemoCorpus(path, built=False, **stamp)
        raise CorpusError(
            "the folder has a demo of other stories, voices or size", where=folder, remedy="delete it, or give --out"
        )
    shutil.rmtree(folder / "audio", ignore_errors=True)

    by_reading = dict(_speak_all(folder, readings, workers))
    utterances = [u for place in range(len(readings)) for u in by_reading[place]]
    write_manifest(path, utterances)

    seconds: dict[str, float] = {}
    for u in utterances:
        assert u.split is not None and u.duration_s is not None
        seconds[u.split] = seconds.get(u.split, 0.0) + u.duration_s
    counts = dict(Counter(u.split for u in utterances))
    stamp = {"engine": readings[0].voice.engine, "seconds": seconds, "utterances": counts}
    write_atomic(folder / STAMP, json.dumps({"fingerprint": fingerprint, **stamp}) + "\n")
    return DemoCorpus(path, built=True, **stamp)


def speak(voice: Voice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """Speak some texts with one voice. Return the sample rate in Hz and int16 [S] for each text."""
    return espeak.speak(voice, texts) if isinstance(voice, espeak.EspeakVoice) else hibari.speak(voice, texts)


def speak_in_new_processes(
    voices: Sequence[Voice], texts: Sequence[Sequence[str]], workers: int | None = None
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield what `speak` returns for each voice, from a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, len(voices))
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        yield from pool.map(speak, voices, texts)


def _speak_all(folder: Path, readings: Sequence[Reading], workers: int | None) -> Iterator[tuple[int, list[Utterance]]]:
    """Yield the number of each reading and its utterances, voice by voice."""
    import torch

    by_voice: dict[Voice, list[int]] = {}
    for place, reading in enumerate(readings):
        by_voice.setdefault(reading.voice, []).append(place)
    texts = [[s for place in places for s in readings[place].story.sentences] for places in by_voice.values()]
    spoken = speak_in_new_processes(list(by_voice), texts, workers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads would wait for each other longer than the resampling of a sentence takes.
    try:
        for (voice, places), (rate_hz, waves) in zip(by_voice.items(), spoken, strict=True):
            (folder / "audio" / voice.name).mkdir(parents=True, exist_ok=True)
            remaining = iter(waves)
            for place in places:
                count = len(readings[place].story.sentences)
                yield place, [_write(folder, readings[place], k, next(remaining), rate_hz) for k in range(count)]
    finally:
        torch.set_num_threads(threads)


def _write(folder: Path, reading: Reading, sentence: int, samples: np.ndarray, rate_hz: int) -> Utterance:
    import soundfile

    voice, story = reading.voice, reading.story
    session = f"{voice.name}-{story.number:02d}"
    name = f"{session}-{sentence + 1:02d}"
    wave = resample(samples.astype(np.float32) / 32768, rate_hz, RATE_HZ)
    audio = Path("audio", voice.name, f"{name}.flac")
    soundfile.write(folder / audio, wave.clip(-1, 1), RATE_HZ, subtype="PCM_16")
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


def _read_stamp(folder: Path) -> dict | None:
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp if (folder / "corpus.jsonl").is_file() else None

"""The audio of many utterances as a speech teacher needs it: frames by the headers, where it came from, and its hash.

Guarantees: the frames are those that the encoder gives, if the headers tell the truth. Where they do not, reading the
audio is an error that names the utterance. No sample is read to count frames.
Try: `pytest tests/extract/speech/test_sounds.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np

from ...data.audio.read import open_audio, read_segment, segment_of
from ...data.errors import AudioError, first_few
from ...data.features.provenance import THREADS, stamp
from ...data.manifest import Corpus, Utterance
from ..store.disk.layout import hash64
from .encoder import SpeechEncoder

SHOWN = 20  # failures that an error lists


@dataclass(frozen=True)
class Sounds:
    """Frames and audio of U utterances.

    length  int32 [U], frames; 0 for an utterance without audio, or with too little for a frame
    source  int64 [U, 4]: `stamp` of the file (0: no audio), start and duration in ns (-1: to the end), and the channel
            (-1: the mean)
    notes   what is worth to know about them, in words
    """

    length: np.ndarray
    source: np.ndarray
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Segment:
    frames: int
    stamp: int
    own_hz: int


def segment_source(u: Utterance, stamped: int) -> tuple[int, int, int, int]:
    """Return a row of `Sounds.source`: the version of an utterance's file, and its times and channel there."""
    if u.audio is None:
        return 0, 0, 0, 0
    duration = -1 if u.duration_s is None else round(u.duration_s * 1e9)
    signed = int(np.uint64(stamped).view(np.int64))
    return signed, round(u.start_s * 1e9), duration, -1 if u.channel is None else u.channel


def measure(corpus: Corpus, utterances: Sequence[Utterance | None], encoder: SpeechEncoder) -> Sounds:
    """Return the frames of utterances by the headers of their files. None has no frames.

    Raises AudioError with all utterances whose audio is missing, damaged, or does not hold the segment.
    """
    by_file: dict[Path, list[int]] = {}
    given = {k: u for k, u in enumerate(utterances) if u is not None}
    for k, u in given.items():
        if u.audio is not None:
            by_file.setdefault(corpus.audio_path(u), []).append(k)
    found: dict[int, _Segment | AudioError] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        for part in threads.map(partial(_look, given, encoder), by_file, by_file.values()):
            found |= part
    failures = [(given[k].id, s) for k, s in sorted(found.items()) if isinstance(s, AudioError)]
    if failures:
        shown = "".join(f"\n  {id}: {why}" for id, why in failures[:SHOWN])
        more = f"\n  … and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        n = len(failures)
        what = f"the audio of {n:,} utterance{'s' * (n > 1)} cannot be extracted:{shown}{more}\n"
        remedy = "repair the audio or delete these utterances from the manifest, and run the same command again"
        raise AudioError(what, where=corpus.path, remedy=remedy)
    segments = {k: s for k, s in found.items() if isinstance(s, _Segment)}
    length, source = np.zeros(len(utterances), np.int32), np.zeros((len(utterances), 4), np.int64)
    for k, s in segments.items():
        length[k], source[k] = s.frames, segment_source(given[k], s.stamp)
    groups = {
        "have no audio, and so no frames": [u.id for u in given.values() if u.audio is None],
        "are too short for a frame, and have none": [given[k].id for k, s in segments.items() if not s.frames],
        f"have audio of less than {encoder.sample_rate_hz} Hz, and nothing in the upper band of the model": [
            given[k].id for k, s in segments.items() if s.own_hz < encoder.sample_rate_hz
        ],
    }
    notes = [f"{len(ids):,} utterances {what}: {first_few(ids)}" for what, ids in groups.items() if ids]
    return Sounds(length, source, notes)


def _look(
    utterances: Mapping[int, Utterance], encoder: SpeechEncoder, path: Path, members: Sequence[int]
) -> dict[int, _Segment | AudioError]:
    """Look at the header of one file for the utterances in it."""
    found: dict[int, _Segment | AudioError] = {}
    try:
        with open_audio(path) as file:
            version, own_hz = stamp(path), file.samplerate
            for k in members:
                u = utterances[k]
                try:
                    _, count = segment_of(file, path, u.start_s, u.duration_s, u.channel, scan=False)
                    samples = ceil(count * encoder.sample_rate_hz / own_hz)
                    found[k] = _Segment(encoder.frames(samples), version, own_hz)
                except AudioError as e:
                    found[k] = e
    except (AudioError, OSError) as e:
        error = e if isinstance(e, AudioError) else AudioError(f"cannot be read: {e.strerror}", where=path)
        found = dict.fromkeys(members, error)
    return found


def read_sound(corpus: Corpus, u: Utterance) -> tuple[np.ndarray, int, int]:
    """Return an utterance's samples float32 [S] at the rate of their file, that rate, and their hash, uint64.

    The hash is that of the samples before they are resampled, because a resampler's last bits depend on the machine.
    Raises AudioError with the utterance if they cannot be read.
    """
    try:
        samples, own_hz = read_segment(corpus.audio_path(u), u.start_s, u.duration_s, u.channel)
    except (AudioError, OSError) as e:
        expected = e.expected if isinstance(e, AudioError) else None
        what = f"{e.where}: {e.what}" if isinstance(e, AudioError) else f"its audio cannot be read: {e}"
        remedy = "repair the audio or delete the utterance from the manifest. What is committed stays"
        raise AudioError(what, where=u.id, expected=expected, remedy=remedy) from None
    return samples, own_hz, hash64(own_hz.to_bytes(8, "little") + samples.tobytes())


def same_sounds(
    corpus: Corpus,
    utterances: Sequence[Utterance],
    source: np.ndarray,
    hashes: np.ndarray,
    extracted: np.ndarray,
    encoder: SpeechEncoder | None,
    length: np.ndarray,
) -> np.ndarray:
    """Return which utterances have the audio that a store knows of them, bool [n].

    Audio that is missing cannot be compared, and counts as the same. If a file's stamp or an utterance's times differ,
    the samples decide, or, where nothing is extracted yet, the frames.

    Arguments:
        source: int64 [n, 4], as in `Sounds`.
        hashes: uint64 [n], of the samples that were extracted.
        extracted: bool [n], whether any were.
        encoder: counts frames; None: utterances of which nothing is extracted count as the same.
        length: int [n], frames.
    """
    stamps: dict[Path, int | None] = {}
    paths = {k: corpus.audio_path(u) for k, u in enumerate(utterances) if u.audio is not None}
    with ThreadPoolExecutor(THREADS) as threads:
        files = list(dict.fromkeys(paths.values()))
        stamps.update(zip(files, threads.map(_stamp, files)))

        def same(k: int) -> bool:
            u = utterances[k]
            if u.audio is None or not source[k, 0]:
                return u.audio is None and not source[k, 0]
            now = stamps[paths[k]]
            if now is None or tuple(source[k].tolist()) == segment_source(u, now):
                return True
            if extracted[k]:
                try:
                    return read_sound(corpus, u)[2] == hashes[k]
                except AudioError:
                    return False
            segment = None if encoder is None else _look({k: u}, encoder, paths[k], [k])[k]
            return segment is None or (isinstance(segment, _Segment) and segment.frames == length[k])

        return np.array(list(threads.map(same, range(len(utterances)))), bool)


def _stamp(path: Path) -> int | None:
    try:
        return stamp(path)
    except OSError:
        return None

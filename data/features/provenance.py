"""What each row of a feature file was computed from, and whether the manifest and its audio are still the same.

Guarantees: a corpus that was moved, copied or touched counts as the same. Rows of files that earlier versions wrote are
compared by their audio's identity alone.
Try: `stillhouse corpus features corpus.jsonl features.h5`, with other times in the manifest than before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..errors import StaleError, first_few
from ..files.atomic import open_plain, plain_descriptor
from ..manifest import Corpus, Utterance
from .file import RECORD, FeatureFile
from .settings import FeatureSettings, Variant, differing, is_encoder

THREADS = 16  # They wait for the disk, or for the network.


@dataclass(frozen=True)
class RowSource:
    """What a row was computed from: the `identity` of its audio, and its record, which is all 0 for old rows."""

    audio: int
    record: np.void


@dataclass
class RowChanges:
    """What differs from the rows: {id: {variant: in words}}, and how many utterances have no audio to compare."""

    changed: dict[str, dict[Variant, str]] = field(default_factory=dict)
    absent: int = 0

    def refuse(self, where: Path, remedy: str) -> None:
        """Raise StaleError if any row has changed."""
        if self.changed:
            what = f"the sound of {first_few(list(self.changed))} has changed since the features were made"
            id, variants = next(iter(self.changed.items()))
            raise StaleError(f"{what} ({id}: {next(iter(variants.values()))})", where=where, remedy=remedy)


def stamp(path: Path) -> int:
    """Return a 64-bit name of a version of a file, by its size, times and inode. It changes when the file is copied."""
    s = os.stat(path)
    return _number(repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)).encode())


def content(path: Path) -> int:
    """Return a 64-bit hash of all bytes of a file."""
    digest = blake2b(digest_size=8)
    with open_plain(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return int.from_bytes(digest.digest(), "little")


def excerpt(path: Path) -> bytes:
    """Return a hash of the size of a file and of five blocks of its bytes."""
    fd = plain_descriptor(path)
    try:
        size, block = os.fstat(fd).st_size, 4096
        places = range(0, max(size, 1), block) if size <= 8 * block else [k * (size - block) // 4 for k in range(5)]
        data = repr(size).encode() + b"".join(os.pread(fd, block, at) for at in places)
    finally:
        os.close(fd)
    return blake2b(data, digest_size=16).digest()


def identity(
    path: Path,
    start_s: float,
    duration_s: float | None,
    channel: int | None = None,
    cache: dict[Path, bytes] | None = None,
) -> int:
    """Return a 64-bit name of an audio segment: the file's `excerpt`, start, duration and channel.

    Path and modification time do not count, so a corpus stays the same when it is moved or copied. `cache` keeps what
    was read of each file.
    """
    cache = {} if cache is None else cache
    if path not in cache:
        cache[path] = excerpt(path)
    tail = f"{start_s:.6f} {duration_s if duration_s is None else format(duration_s, '.6f')}".encode()
    tail += b"" if channel is None else f" channel {channel}".encode()
    return _number(cache[path] + tail)


def record(
    path: Path, start_s: float, duration_s: float | None, channel: int | None, cache: dict[Path, tuple[int, int]]
) -> np.void:
    """Return the record of a segment, as in the table `records`. `cache` keeps what was read of each file."""
    if path not in cache:
        cache[path] = (content(path), stamp(path))
    times = (start_s, np.nan if duration_s is None else duration_s, -1 if channel is None else channel)
    return np.array([(*cache[path], *times)], RECORD)[0]


def compare(
    corpus: Corpus, rows: Mapping[str, Mapping[Variant, RowSource]], utterances: Sequence[Utterance], *, full: bool
) -> RowChanges:
    """Compare rows, by utterance and variant, with the manifest and the audio files.

    A file that has another `stamp` than at the time is read: wholly if `full`, else its `excerpt`.
    """
    pairs = [(u, corpus.audio_path(u)) for u in utterances if u.audio is not None and rows.get(u.id)]
    stamps: dict[Path, set[int]] = {}
    for u, path in pairs:
        stamps.setdefault(path, set()).update(int(r.record["stamp"]) for r in rows[u.id].values())
    with ThreadPoolExecutor(THREADS) as threads:
        looked = dict(zip(stamps, threads.map(partial(_look, full=full), stamps, stamps.values(), chunksize=64)))
    found = RowChanges()
    for u, path in pairs:
        look = looked[path]
        found.absent += look is None
        whys = {variant: _difference(u, row, path, look) for variant, row in rows[u.id].items()}
        if stale := {variant: why for variant, why in whys.items() if why}:
            found.changed[u.id] = stale
    return found


@dataclass(frozen=True)
class _Look:
    """A file now: its stamp, and what was read of it if it has another one than at the time."""

    stamp: int
    excerpt: bytes | None = None
    content: int | None = None


def _look(path: Path, stamps: set[int], *, full: bool) -> _Look | None:
    try:
        now = stamp(path)
        if stamps == {now}:
            return _Look(now)
        return _Look(now, excerpt(path), content(path) if full and any(stamps) else None)
    except OSError:
        return None  # Audio that is missing cannot be compared.


def _difference(u: Utterance, row: RowSource, path: Path, look: _Look | None) -> str:
    """Return in words how an utterance differs from the source of a row, or an empty text."""
    then = row.record
    recorded = bool(then["stamp"])
    if recorded:
        times = {
            "start_s": (float(then["start_s"]), u.start_s),
            "duration_s": (None if np.isnan(then["duration_s"]) else float(then["duration_s"]), u.duration_s),
            "channel": (None if then["channel"] < 0 else int(then["channel"]), u.channel),
        }
        differ = [f"{name} was {_shown(a)} and is {_shown(b)}" for name, (a, b) in times.items() if not _same(a, b)]
        if differ:
            return ", ".join(differ)
    if look is None or (recorded and look.stamp == then["stamp"]):
        return ""
    if recorded and look.content is not None:
        return "" if look.content == then["content"] else f"{path} has another content"
    if look.excerpt is None or identity(path, u.start_s, u.duration_s, u.channel, {path: look.excerpt}) == row.audio:
        return ""
    return f"{path} has another content" if recorded else f"{path}, start, duration or channel changed"


def _shown(value: float | None) -> str:
    return "not given" if value is None else f"{value:g}"


def _same(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else abs(a - b) < 1e-6


def sources_of(file: FeatureFile, utterances: Sequence[Utterance]) -> dict[str, dict[Variant, RowSource]]:
    """Return what the rows of some utterances were computed from, by id and variant."""
    file.open()
    wanted = {u.id for u in utterances}
    found: dict[str, dict[Variant, RowSource]] = {}
    for r, (id, variant) in enumerate(file.keys()):
        if id in wanted:
            found.setdefault(id, {})[variant] = RowSource(int(file.audio[r]), file.records[r])
    return found


def refuse_changed_rows(corpus: Corpus, file: FeatureFile, utterances: Sequence[Utterance]) -> int:
    """Raise StaleError if audio or times of utterances changed since their rows were computed.

    Returns how many utterances could not be compared, because their audio is not there.
    """
    changes = compare(corpus, sources_of(file, utterances), utterances, full=False)
    usual = asdict(FeatureSettings())
    others = {k: v for k, v in file.settings.items() if v != usual.get(k)}
    command = f"`stillhouse corpus features {corpus.path} {file.path} --redo-changed{_options(others)}`"
    changes.refuse(file.path, f"compute them again with {command}, or restore manifest and audio")
    return changes.absent


def refuse_other_settings(file: FeatureFile, settings: Mapping[str, object] | None, fingerprint: str | None) -> None:
    """Raise StaleError if a model was trained on features of other settings, as far as these are known."""
    differ: list[str] = []
    if settings is not None:
        there = {name: file.settings.get(name) for name in settings}
        differ = differing(there, settings, "in the model")
    elif fingerprint is not None and fingerprint != file.fingerprint:
        differ = [f"the fingerprint is {file.fingerprint} there and {fingerprint} in the model"]
    if differ:
        what = f"the model needs features of other settings: {'; '.join(differ)}"
        remedy = f"make features for it: `stillhouse corpus features CORPUS OTHER.h5{_options(settings or {})}`"
        raise StaleError(what, where=file.path, remedy=remedy)


def _options(settings: Mapping[str, object]) -> str:
    """Return settings as options of `corpus features`."""
    names = {"encoder": "encoder", "layer": "layer"} if is_encoder(settings) else {"rate_hz": "rate", "bins": "bins"}
    return "".join(f" --{option} {settings[name]}" for name, option in names.items() if name in settings)


def _number(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")

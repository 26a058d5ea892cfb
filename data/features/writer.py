"""Write features.h5 and the parts that it is made of, in the layout of `file.py`.

Guarantees: a file gets its name when it is whole and on disk.
Try: `stillhouse corpus features corpus.jsonl features.h5`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import h5py
import numpy as np

from ..errors import FeatureError
from ..files.atomic import draft_of
from ..files.patient import PatientFile
from ..files.trouble import in_words, os_error
from .file import FORMAT, RECORD, VERSION, FeatureFile, checksum, sum_of_tables
from .settings import FeatureSettings, Variant

# A write has so many frames: 20 MB of whole pages for any number of bins. Linux makes large folios of page cache from
# large aligned writes. Reads copy them twice as fast as those from one write for each utterance.
WRITE_FRAMES = 1 << 17


@dataclass
class Rows:
    """Rows to write: any number of utterances and variants with their frames."""

    ids: list[str] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    audio: list[int] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    records: list[np.void] = field(default_factory=list)
    loudness: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        id: str,
        variant: Variant,
        audio: int,
        frames: np.ndarray,
        record: np.void | None = None,
        loudness: np.ndarray | None = None,
    ) -> None:
        """Add a row. `audio` is the identity of its sound, `frames` are [T, bins], and `record` says its source.

        `loudness` [F] is what `FeatureFile.loudness` returns.
        """
        self.loudness.append(np.zeros(0, np.float16) if loudness is None else np.asarray(loudness, np.float16))
        self.records.append(np.zeros(1, RECORD)[0] if record is None else record)
        self.ids.append(id)
        self.variants.append(variant)
        self.audio.append(audio)
        self.frames.append(np.ascontiguousarray(frames, dtype=np.float16))


def write_rows(path: Path, settings: FeatureSettings, rows: Rows, noise: dict | None = None) -> None:
    """Write a part, whole or not at all. `noise` is what its copies were made with."""
    crc = np.array([checksum(*own) for own in zip(rows.frames, rows.loudness)], np.uint32)
    records = np.array(rows.records, RECORD)
    frames, loud = (_Run(np.array([*map(len, own)], np.int64), iter(own)) for own in (rows.frames, rows.loudness))
    keys = list(zip(rows.ids, rows.variants))
    _write(path, settings, noise, keys, rows.audio, records, crc, frames, loud)


def merge(path: Path, settings: FeatureSettings, sources: Sequence[FeatureFile], drafts: Path) -> int:
    """Write all rows of `sources` to `path`, and return how many. If several sources have a row, the last one counts.

    The draft lies in the folder `drafts`.
    """
    last: dict[tuple[str, Variant], tuple[int, int]] = {}
    noise = None
    for s, source in enumerate(sources):
        with source:  # Only one file is open, because a large corpus has more parts than a process may open.
            noise = source.noise or noise
            for r, key in enumerate(source.keys()):
                last[key] = (s, r)
    keys = sorted(last, key=lambda key: last[key])
    picked = [last[key] for key in keys]
    audio = [int(sources[s].audio[r]) for s, r in picked]
    crc = np.array([sources[s].crc32c[r] for s, r in picked], np.uint32)
    records = np.array([sources[s].records[r] for s, r in picked], RECORD)
    lengths = [np.array([sources[s].lengths[r] for s, r in picked], np.int64)]
    lengths.append(np.array([np.diff(sources[s].loud_offsets[r : r + 2])[0] for s, r in picked], np.int64))
    read = (FeatureFile.rows, FeatureFile.loudness)
    frames, loud = (_Run(own, _blocks(sources, picked, own, of)) for own, of in zip(lengths, read, strict=True))
    _write(path, settings, noise, keys, audio, records, crc, frames, loud, drafts)
    return len(picked)


def _blocks(
    sources: Sequence[FeatureFile],
    picked: list[tuple[int, int]],
    lengths: np.ndarray,
    read: Callable[[FeatureFile, np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:
    """Yield what `read` returns of the picked rows, which have `lengths`. Neighbours are read together."""
    k = 0
    while k < len(picked):
        s, first = picked[k]
        last, frames = first, int(lengths[k])
        k += 1
        while k < len(picked) and picked[k] == (s, last + 1) and frames < WRITE_FRAMES:
            last, frames, k = last + 1, frames + int(lengths[k]), k + 1
        yield read(sources[s], np.arange(first, last + 1))
        if k == len(picked) or picked[k][0] != s:
            sources[s].close()


@dataclass
class _Run:
    """Numbers of all rows, one row behind the other: how many each has, and blocks of them."""

    lengths: np.ndarray
    blocks: Iterator[np.ndarray]

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)


def _write(
    path: Path,
    settings: FeatureSettings,
    noise: dict | None,
    keys: list[tuple[str, Variant]],
    audio: list[int],
    records: np.ndarray,
    crc: np.ndarray,
    frames: _Run,
    loudness: _Run,
    drafts: Path | None = None,
) -> None:
    encoded = [id.encode("utf-8") for id, _ in keys]
    try:
        aligned = {"alignment_threshold": 1 << 16, "alignment_interval": 4096}
        # Since version 1.10 HDF5 has checksums of its structures, and it crashes on some damaged older ones. They cover
        # texts of fixed length, but not other texts.
        with (
            draft_of(path, folder=drafts) as draft,
            PatientFile(draft) as output,
            h5py.File(output, "w", libver="v110", **aligned) as file,
        ):
            file.attrs["format"] = np.bytes_(FORMAT)
            file.attrs["version"] = VERSION
            file.attrs["settings"] = np.bytes_(json.dumps(asdict(settings), sort_keys=True))
            file.attrs["fingerprint"] = np.bytes_(settings.fingerprint)
            tables: dict[str, np.ndarray] = {
                "offsets": frames.offsets,
                "ids": np.frombuffer(b"".join(encoded), np.uint8),
                "id_offsets": np.concatenate([[0], np.cumsum([len(e) for e in encoded])]).astype(np.int64),
                "speeds": np.array([v.speed for _, v in keys], np.float64),
                "audio": np.array(audio, np.uint64),
                "crc32c": crc,
            }
            for name, table in tables.items():
                file[name] = table
            file["records"] = records
            file.attrs["records_crc32c"] = np.uint32(checksum(records))
            file.attrs["tables_crc32c"] = np.uint32(sum_of_tables(tables))
            copies = np.array([v.copy for _, v in keys], np.uint16)
            if copies.any():
                file["copies"] = copies
                file.attrs["copies_crc32c"] = np.uint32(checksum(copies))
                file.attrs["noise"] = np.bytes_(json.dumps(noise, sort_keys=True))
            if loudness.offsets[-1]:
                file["loudness_offsets"] = loudness.offsets
                file.attrs["loudness_crc32c"] = np.uint32(checksum(loudness.offsets))
                _fill(file, "loudness", loudness)
            _fill(file, "features", frames, settings.bins)
    except (OSError, RuntimeError) as e:  # h5py raises both.
        trouble = in_words(os_error(e, path) or e)
        what, remedy = (trouble.what, trouble.remedy) if trouble else (str(e), "repeat the command")
        raise FeatureError(f"cannot write: {what}", where=path, remedy=remedy) from e


def _fill(file: h5py.File, name: str, run: _Run, *width: int) -> None:
    """Write a run into a new dataset [frames, *width]."""
    count, at = int(run.offsets[-1]), 0
    data = file.create_dataset(name, (count, *width), np.float16)
    for block in _large(run.blocks, *width):
        data[at : at + len(block)] = block
        at += len(block)
    assert at == count, (name, at, count)


def _large(blocks: Iterator[np.ndarray], *width: int) -> Iterator[np.ndarray]:
    """Yield the same frames in runs of WRITE_FRAMES. Each is valid until the next."""
    buffer, filled = np.empty((WRITE_FRAMES, *width), np.float16), 0
    for block in blocks:
        done = 0
        while done < len(block):
            step = min(len(block) - done, WRITE_FRAMES - filled)
            buffer[filled : filled + step] = block[done : done + step]
            done, filled = done + step, filled + step
            if filled == WRITE_FRAMES:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]

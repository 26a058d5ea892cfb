"""features.h5 and the parts that it is made of: the layout, the writer and the fast reader.

    features    float16 [frames, bins]   contiguous: rows of one utterance are one run of bytes
    offsets     int64 [rows + 1]         first frame of each row; a row is one (utterance, speed)
    ids, id_offsets                      UTF-8 bytes [..] and int64 [rows + 1]
    speeds      float64 [rows]           audio  uint64 [rows], identity of the sound     crc32c  uint32 [rows]
    attributes: format, version, settings (JSON), fingerprint (of the settings), tables_crc32c (of all but features)

Invariant: a file at its final name is whole (written aside, fsynced, renamed), and a reader holds one inode from the
first look to the last read. Exercised by `stillhouse corpus info features.h5` and tests/bench/bench_features.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import google_crc32c
import h5py
import numpy as np

from .durable import sync
from .errors import FeatureError

FORMAT, VERSION = "stillhouse-features", 1
TABLES = {
    "offsets": np.int64,
    "ids": np.uint8,
    "id_offsets": np.int64,
    "speeds": np.float64,
    "audio": np.uint64,
    "crc32c": np.uint32,
}
# Frames a write: whole pages, whatever the number of bins, and 20 MB of them. From large aligned writes Linux makes
# large folios of page cache, which reads copy twice as fast as those that a write an utterance leaves.
WRITE_FRAMES = 1 << 17


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the numbers in a feature file; the words of StaleError are these names.

    The rest of fbank's settings is fixed (see `features.fbank`) and stands behind `method`, which changes with them.
    """

    method: str = "kaldi fbank 1"
    rate_hz: int = 16000
    bins: int = 80

    def __post_init__(self) -> None:
        from .errors import ConfigError

        if not 1000 <= self.rate_hz <= 192000:
            raise ConfigError(f"a rate of {self.rate_hz} Hz", expected="1000 to 192000 Hz")
        if not 4 <= self.bins <= 256:
            raise ConfigError(f"{self.bins} mel bins", expected="4 to 256")

    @property
    def fingerprint(self) -> str:
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()

    def differences(self, stored: dict) -> list[str]:
        """In words, what differs from the settings that a file holds."""
        mine = asdict(self)
        names = [*mine, *(k for k in stored if k not in mine)]
        return [
            f"{name} is {stored.get(name)!r} there and {mine.get(name)!r} here"
            for name in names
            if stored.get(name) != mine.get(name)
        ]


@dataclass
class Rows:
    """Rows to be written: any number of (utterance, speed) with their frames."""

    ids: list[str] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    audio: list[int] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)

    def add(self, id: str, speed: float, audio: int, frames: np.ndarray) -> None:
        self.ids.append(id)
        self.speeds.append(speed)
        self.audio.append(audio)
        self.frames.append(np.ascontiguousarray(frames, dtype=np.float16))


def write_rows(path: Path, settings: FeatureSettings, rows: Rows) -> None:
    """Write a part: whole at `path`, or not there."""
    lengths = np.array([len(f) for f in rows.frames], np.int64)
    crc = np.array([checksum(f) for f in rows.frames], np.uint32)
    _write(path, settings, rows.ids, rows.speeds, rows.audio, crc, lengths, iter(rows.frames))


def merge(path: Path, settings: FeatureSettings, sources: Sequence[FeatureFile], temporary: Path) -> int:
    """Write all rows of `sources` to `path`; of a row that several hold, the last one counts. Returns the rows."""
    last: dict[tuple[str, float], tuple[int, int]] = {}
    for s, source in enumerate(sources):
        with source:  # one file open at a time: a large corpus has more parts than a process may open
            for r, key in enumerate(source.keys()):
                last[key] = (s, r)
    picked = sorted(last.values())
    ids = [sources[s].row_ids[r] for s, r in picked]
    speeds = [float(sources[s].row_speeds[r]) for s, r in picked]
    audio = [int(sources[s].audio[r]) for s, r in picked]
    crc = np.array([sources[s].crc32c[r] for s, r in picked], np.uint32)
    lengths = np.array([sources[s].lengths[r] for s, r in picked], np.int64)
    blocks = _blocks(sources, picked)
    _write(path, settings, ids, speeds, audio, crc, lengths, blocks, temporary)
    return len(picked)


def _blocks(sources: Sequence[FeatureFile], picked: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The frames of the picked rows, neighbours read together."""
    k = 0
    while k < len(picked):
        s, first = picked[k]
        last, frames = first, int(sources[s].lengths[first])
        k += 1
        while k < len(picked) and picked[k] == (s, last + 1) and frames < WRITE_FRAMES:
            last += 1
            frames += int(sources[s].lengths[last])
            k += 1
        yield sources[s].rows(np.arange(first, last + 1))
        if k == len(picked) or picked[k][0] != s:
            sources[s].close()


def _write(
    path: Path,
    settings: FeatureSettings,
    ids: list[str],
    speeds: list[float],
    audio: list[int],
    crc: np.ndarray,
    lengths: np.ndarray,
    blocks: Iterator[np.ndarray],
    temporary: Path | None = None,
) -> None:
    temporary = temporary or path.with_name(f"{path.name}.{os.getpid()}.tmp")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    encoded = [i.encode("utf-8") for i in ids]
    try:
        aligned = {"alignment_threshold": 1 << 16, "alignment_interval": 4096}
        # HDF5 checks its own structures by checksums only since version 1.10, and crashes on some damaged older ones;
        # texts of fixed length lie among what is checked, others do not.
        with h5py.File(temporary, "w", locking=False, libver="v110", **aligned) as file:
            file.attrs["format"] = np.bytes_(FORMAT)
            file.attrs["version"] = VERSION
            file.attrs["settings"] = np.bytes_(json.dumps(asdict(settings), sort_keys=True))
            file.attrs["fingerprint"] = np.bytes_(settings.fingerprint)
            tables: dict[str, np.ndarray] = {
                "offsets": offsets,
                "ids": np.frombuffer(b"".join(encoded), np.uint8),
                "id_offsets": np.concatenate([[0], np.cumsum([len(e) for e in encoded])]).astype(np.int64),
                "speeds": np.array(speeds, np.float64),
                "audio": np.array(audio, np.uint64),
                "crc32c": crc,
            }
            for name, table in tables.items():
                file[name] = table
            file.attrs["tables_crc32c"] = np.uint32(_sum_of_tables(tables))
            data = file.create_dataset("features", (int(offsets[-1]), settings.bins), np.float16)
            at = 0
            for block in _large(blocks, settings.bins):
                data[at : at + len(block)] = block
                at += len(block)
            assert at == offsets[-1], (at, offsets[-1])
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, RuntimeError) as e:  # h5py has both
        why = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else str(e)
        raise FeatureError(f"cannot write: {why}", where=path, remedy="make room and run the same command again") from e
    finally:
        temporary.unlink(missing_ok=True)


def _sum_of_tables(tables: Mapping[str, np.ndarray]) -> int:
    """crc32c over all tables, in the order of TABLES."""
    total = 0
    for name in TABLES:
        total = google_crc32c.extend(total, np.ascontiguousarray(tables[name]).tobytes())
    return total


def _said(value: object) -> str:
    """An attribute as text; files written before it was of a fixed length have it as a str."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _large(blocks: Iterator[np.ndarray], bins: int) -> Iterator[np.ndarray]:
    """The same frames in runs of WRITE_FRAMES; each is valid until the next is asked for."""
    buffer, filled = np.empty((WRITE_FRAMES, bins), np.float16), 0
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


def checksum(frames: np.ndarray) -> int:
    return google_crc32c.value(np.ascontiguousarray(frames).tobytes())


def _table(data: h5py.Dataset, kind: type, most: int) -> np.ndarray:
    """One of TABLES as it lies in the file; ValueError where it is no list of such numbers."""
    if data.ndim != 1 or data.dtype != kind or data.nbytes > most:
        raise ValueError(f"{data.name} is {data.dtype} {data.shape}")
    return data[:]


class FeatureFile:
    """Random access to a feature file. Opens when first used, anew in each process; pickles as its path.

    Raises FeatureError for a file that is missing, damaged or of another format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._pid: int | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"FeatureFile({str(self.path)!r})"

    def __enter__(self) -> FeatureFile:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its tables stay, and the next read opens it again."""
        if getattr(self, "_pid", None) == os.getpid():
            os.close(self._fd)
        self._pid = None

    def open(self) -> FeatureFile:
        if self._pid == os.getpid():
            return self
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise FeatureError(
                f"cannot open the features: {e.strerror}",
                where=self.path,
                remedy="make them with `stillhouse corpus features CORPUS FEATURES`",
            ) from e
        try:
            self._load(fd)
            end = self._offset + int(self.offsets[-1]) * self.width * 2
            if (size := os.fstat(fd).st_size) < end:
                raise self._damaged(f"{size} bytes of {end}")
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._pid = fd, os.getpid()
        return self

    def _damaged(self, what: str) -> FeatureError:
        return FeatureError(
            f"the feature file is damaged: {what}",
            where=self.path,
            remedy="delete it and make it again with `stillhouse corpus features CORPUS FEATURES`",
        )

    def _load(self, fd: int) -> None:
        """Read the tables through the descriptor that later reads use, so that both see one file."""
        try:
            with os.fdopen(fd, "rb", closefd=False) as stream, h5py.File(stream, "r") as file:
                if _said(file.attrs.get("format")) != FORMAT:
                    raise FeatureError(
                        "not a feature file of Stillhouse",
                        where=self.path,
                        expected=f"attribute format = {FORMAT}",
                    )
                if file.attrs["version"] != VERSION:
                    raise FeatureError(
                        f"version {file.attrs['version']} of the format",
                        where=self.path,
                        expected=f"version {VERSION}",
                    )
                self._settings = json.loads(_said(file.attrs["settings"]))
                if not isinstance(self._settings, dict):
                    raise self._damaged("its settings are none")
                self._fingerprint = _said(file.attrs["fingerprint"])
                size = os.fstat(fd).st_size
                tables = {name: _table(file[name], kind, size) for name, kind in TABLES.items()}
                if (stored := file.attrs.get("tables_crc32c")) is not None and stored != _sum_of_tables(tables):
                    raise self._damaged("its tables are not those that were written")
                self.offsets: np.ndarray = tables["offsets"]
                blob, cuts = tables["ids"].tobytes(), tables["id_offsets"].tolist()
                self.row_ids = [blob[a:b].decode("utf-8") for a, b in pairwise(cuts)]
                self.row_speeds: np.ndarray = tables["speeds"]
                self.audio: np.ndarray = tables["audio"]
                self.crc32c: np.ndarray = tables["crc32c"]
                data = file["features"]
                if data.dtype != np.float16 or data.chunks is not None or data.ndim != 2 or data.shape[1] < 1:
                    raise self._damaged(f"features are {data.dtype} {data.shape}, chunks {data.chunks}")
                if not len(self.offsets) or len(data) != self.offsets[-1]:
                    raise self._damaged(f"{len(data)} frames of {int(self.offsets[-1]) if len(self.offsets) else 0}")
                self.width = int(data.shape[1])
                self._offset = data.id.get_offset() or 0  # None where there are no frames at all
        except FeatureError:
            raise
        # What h5py raises for damage depends on where it is; nothing else happens in the block above.
        except (OSError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as e:
            raise self._damaged(str(e)) from e
        except MemoryError as e:
            raise self._damaged("its tables claim to be larger than the memory") from e
        n = len(self.row_ids)
        if not n + 1 == len(self.offsets) or {len(self.row_speeds), len(self.audio), len(self.crc32c)} != {n}:
            raise self._damaged("its tables disagree on the number of rows")
        self.lengths = np.diff(self.offsets)
        if n and (self.offsets[0] != 0 or self.lengths.min() < 0):
            raise self._damaged("offsets run backwards")
        self._row: dict[float, dict[str, int]] = {}
        for r, (id, speed) in enumerate(self.keys()):
            self._row.setdefault(speed, {})[id] = r

    def keys(self) -> Iterator[tuple[str, float]]:
        """(id, speed) of every row, in file order."""
        return zip(self.row_ids, self.row_speeds.tolist(), strict=True)

    @property
    def settings(self) -> dict:
        """What the numbers were made with, as `FeatureSettings` names it."""
        return self.open()._settings

    @property
    def fingerprint(self) -> str:
        """Hash of the settings. Each row's sound has its own identity (`audio`), so adding rows changes neither."""
        return self.open()._fingerprint

    @property
    def ids(self) -> list[str]:
        """Every utterance once, in file order."""
        return list(dict.fromkeys(self.open().row_ids))

    @property
    def speeds(self) -> list[float]:
        """The speeds that some utterance has, ascending."""
        return sorted(set(self.open().row_speeds.tolist()))

    def has(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> np.ndarray:
        """bool [B]"""
        self.open()
        return np.array([self._has(i, s) for i, s in self._pairs(ids, speeds)], bool)

    def frames(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> np.ndarray:
        """Lengths in frames, int64 [B]. Raises FeatureError naming what is not there."""
        return self.open().lengths[self._find(ids, speeds)]

    def gather(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [ΣT, bins] one utterance after the other, int64 lengths [B])."""
        found = self.open()._find(ids, speeds)
        return self.rows(found), self.lengths[found]

    def _has(self, id: str, speed: float) -> bool:
        return id in self._row.get(speed, ())

    def _pairs(self, ids: Sequence[str], speeds: Sequence[float] | float) -> Iterable[tuple[str, float]]:
        if isinstance(speeds, (int, float)):
            return ((i, float(speeds)) for i in ids)
        return zip(ids, map(float, speeds), strict=True)

    def _find(self, ids: Sequence[str], speeds: Sequence[float] | float) -> np.ndarray:
        rows = self._row
        try:
            if isinstance(speeds, (int, float)):
                row = rows[speeds] if ids else {}
                return np.array([row[i] for i in ids], np.int64)
            return np.array([rows[s][i] for i, s in zip(ids, speeds, strict=True)], np.int64)
        except KeyError:
            missing = [f"{i} at speed {s:g}" for i, s in self._pairs(ids, speeds) if not self._has(i, s)]
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise FeatureError(
                f"no features of {', '.join(missing[:5])}{more}",
                where=self.path,
                expected=f"speeds {', '.join(f'{s:g}' for s in self.speeds)}",
                remedy="add them with `stillhouse corpus features CORPUS FEATURES --speeds …`",
            ) from None

    def rows(self, found: np.ndarray) -> np.ndarray:
        """Frames of rows by number: int64 [B] -> float16 [ΣT, bins]."""
        self.open()
        frame = self.width * 2
        sizes = self.lengths[found] * frame
        out = np.empty((int(sizes.sum()) // frame, self.width), np.float16)
        target, at, fd, read = out.view(np.uint8).reshape(-1).data, 0, self._fd, os.preadv
        starts = self.offsets[found] * frame + self._offset
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            end = at + size
            # One call reads at most 2 GiB, and may read less.
            while (got := read(fd, [target[at:end]], start)) < end - at:
                if got == 0:
                    raise self._damaged(f"it ends {end - at} bytes early")
                at, start = at + got, start + got
            at = end
        return out

    def damaged_rows(self) -> list[tuple[str, float]]:
        """(id, speed) of the rows whose bytes are not those that were written."""
        self.open()
        return [key for r, key in enumerate(self.keys()) if checksum(self.rows(np.array([r]))) != self.crc32c[r]]

    def verify(self) -> list[str]:
        """The damaged rows, as "ID at speed S"."""
        return [f"{i} at speed {s:g}" for i, s in self.damaged_rows()]

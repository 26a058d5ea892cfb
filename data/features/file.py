"""features.h5 and the parts that it is made of: the layout, and the fast reader. `writer.py` writes them.

    features    float16 [frames, bins]   contiguous: rows of one utterance are one run of bytes
    offsets     int64 [rows + 1]         first frame of each row; a row is one (utterance, speed)
    ids, id_offsets                      UTF-8 bytes [..] and int64 [rows + 1]
    speeds      float64 [rows]           audio  uint64 [rows], identity of the sound     crc32c  uint32 [rows]
    records     RECORD [rows]            what each row was computed from; absent from older files
    loudness    float16 [..] and loudness_offsets int64 [rows + 1]   see `FeatureFile.loudness`; absent from fbank
    attributes: format, version, settings (JSON), fingerprint (of the settings), tables_crc32c (of TABLES),
    records_crc32c, loudness_crc32c (of its offsets)

Guarantees: a reader holds one inode from the first look to the last read.
Try: `stillhouse corpus info features.h5`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np

from ..errors import ConfigError, FeatureError, first_few
from ..files.atomic import plain_descriptor
from ..files.declared import own_dataset

HDF5 = b"\x89HDF\r\n\x1a\n"
FORMAT, VERSION = "stillhouse-features", 1
TABLES = {
    "offsets": np.int64,
    "ids": np.uint8,
    "id_offsets": np.int64,
    "speeds": np.float64,
    "audio": np.uint64,
    "crc32c": np.uint32,
}
# The audio file of a row, by its bytes and by its size and times, and the segment. A duration of NaN reaches to the
# end, and channel -1 is the mean. A stamp of 0 says that nothing is recorded.
RECORD = np.dtype([("content", "<u8"), ("stamp", "<u8"), ("start_s", "<f8"), ("duration_s", "<f8"), ("channel", "<i4")])
MAKE = "`stillhouse corpus features CORPUS FEATURES`"
FBANK_HZ = 100.0  # frames in a second of files that record no frame_hz
PLACES = ("encoder",)  # Settings that say where something lies, and decide no number.


@dataclass(frozen=True)
class FeatureSettings:
    """The settings that decide the numbers in a feature file. StaleError uses their names.

    The other settings of fbank are fixed (see `audio.fbank`). `method` changes with them.
    """

    method: str = "kaldi fbank 1"
    rate_hz: int = 16000
    bins: int = 80

    def __post_init__(self) -> None:
        if not 1000 <= self.rate_hz <= 192000:
            raise ConfigError(f"a rate of {self.rate_hz} Hz", expected="1000 to 192000 Hz")
        self._check_width()

    def _check_width(self) -> None:
        if not 4 <= self.bins <= 256:
            raise ConfigError(f"{self.bins} mel bins", expected="4 to 256")

    @property
    def fingerprint(self) -> str:
        """A hash of the settings, without the place of an encoder."""
        deciding = {name: value for name, value in asdict(self).items() if name not in PLACES}
        return blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=8).hexdigest()

    def differences(self, stored: dict) -> list[str]:
        """Return, as texts, what differs from the settings of a file. An encoder may lie elsewhere."""
        return differing(stored, asdict(self), "here")


@dataclass(frozen=True)
class EncoderSettings(FeatureSettings):
    """The settings of rows that are the states of a speech encoder. `bins` is the width of a state.

    encoder         where it was loaded from: a folder, or its name on the Hugging Face hub
    architecture    its model_type, such as "whisper"
    weights         a hash of its weights and of its feature extractor's settings
    layer           0 is what goes into the first layer
    frame_hz        rows in a second of audio
    offset_s        time of the middle of row 0
    """

    method: str = "encoder 1"
    encoder: str = ""
    architecture: str = ""
    weights: str = ""
    layer: int = 0
    frame_hz: float = 50.0
    offset_s: float = 0.0

    def _check_width(self) -> None:
        if not 1 <= self.bins <= 1 << 16:
            raise ConfigError(f"states of {self.bins} numbers", expected="1 to 65536")


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of features are: `hz` in a second, and the first begins at `start_s`."""

    hz: float = FBANK_HZ
    start_s: float = 0.0


FBANK_TIMES = FrameTimes()


def times_of(settings: Mapping[str, Any] | None) -> FrameTimes:
    """Return when the frames are, by the settings of a feature file. None is fbank, which begins with the audio."""
    if settings is None or "frame_hz" not in settings:
        return FBANK_TIMES
    hz = float(settings["frame_hz"])
    if not 0 < hz <= 1000:
        raise ValueError(f"{hz} frames in a second")
    return FrameTimes(hz, float(settings["offset_s"]) - 0.5 / hz)


def is_encoder(settings: Mapping[str, Any] | None) -> bool:
    """Return whether rows of these settings are the states of a speech encoder."""
    return settings is not None and "encoder" in settings


def differing(stored: Mapping[str, Any], own: Mapping[str, Any], place: str) -> list[str]:
    """Return in words which settings of a file differ from `own` ones, which are those at `place`."""
    return [
        f"{name} is {stored.get(name)!r} there and {own.get(name)!r} {place}"
        for name in {**own, **stored}
        if stored.get(name) != own.get(name) and name not in PLACES
    ]


def sum_of_tables(tables: Mapping[str, np.ndarray]) -> int:
    """Return the crc32c over all tables, in the order of TABLES."""
    total = 0
    for name in TABLES:
        total = google_crc32c.extend(total, np.ascontiguousarray(tables[name]).tobytes())
    return total


def checksum(frames: np.ndarray, loudness: np.ndarray | None = None) -> int:
    """Return the crc32c of a row's frames, followed by its loudness."""
    total = google_crc32c.value(np.ascontiguousarray(frames).tobytes())
    return total if loudness is None else google_crc32c.extend(total, loudness.tobytes())


def _text(value: object) -> str:
    """An attribute as text. Older files have it as a str and not as bytes of fixed length."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _table(file: h5py.File, name: str, kind: type | np.dtype, most: int) -> np.ndarray:
    """One of TABLES, or the records. ValueError if it is not a list of such numbers in this file."""
    data = own_dataset(file, name)
    if data.ndim != 1 or data.dtype != kind or data.nbytes > most:
        raise ValueError(f"{data.name} is {data.dtype} {data.shape}")
    return data[:]


def _place(file: h5py.File, name: str, offsets: np.ndarray, axes: int) -> tuple[tuple[int, ...], int]:
    """Return the shape of contiguous float16 numbers up to the last offset, and where in the file they begin."""
    data = own_dataset(file, name)
    if data.dtype != np.float16 or data.chunks is not None or data.ndim != axes or 0 in data.shape[1:]:
        raise ValueError(f"{name} is {data.dtype} {data.shape}, chunks {data.chunks}")
    if not len(offsets) or len(data) != offsets[-1]:
        raise ValueError(f"{name} has {len(data)} frames of {int(offsets[-1]) if len(offsets) else 0}")
    at = data.id.get_offset()  # It is None if there are no frames at all.
    if at is None and len(data):
        raise ValueError(f"{name} has {len(data)} frames without bytes of their own")
    return data.shape, at or 0


class FeatureFile:
    """Random access to a feature file. It opens at the first use, again in each process, and pickles as its path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._pid: int | None = None

    def __reduce__(self) -> tuple:
        return FeatureFile, (self.path,)

    def __repr__(self) -> str:
        return f"FeatureFile({str(self.path)!r})"

    def __enter__(self) -> FeatureFile:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Its tables stay, and the next read opens it again."""
        if getattr(self, "_pid", None) == os.getpid():
            os.close(self._fd)
        self._pid = None

    def open(self) -> FeatureFile:
        """Open the file, unless it is open in this process, and return the reader itself. Raises FeatureError."""
        if self._pid == os.getpid():
            return self
        try:
            fd = plain_descriptor(self.path)
        except OSError as e:
            what = f"cannot open the features: {e.strerror}"
            raise FeatureError(what, where=self.path, remedy=f"make them with {MAKE}") from e
        try:
            if os.pread(fd, 8, 0) != HDF5:
                what = "not a feature file, or one without its beginning"
                raise FeatureError(what, where=self.path, expected=f"a feature file, as {MAKE} makes it")
            try:
                self._load(fd)
            # What h5py raises for damage depends on where it is. `_load` can raise these for no other reason.
            except (OSError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as e:
                raise self._damaged(str(e)) from e
            except MemoryError as e:
                raise self._damaged("its tables claim to be larger than the memory") from e
            ends = (
                self._offset + int(self.offsets[-1]) * self.width * 2,
                self._loud_at + int(self.loud_offsets[-1]) * 2,
            )
            if (size := os.fstat(fd).st_size) < (end := max(ends)):
                raise self._damaged(f"{size} bytes of {end}")
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._pid = fd, os.getpid()
        return self

    def _damaged(self, what: str) -> FeatureError:
        remedy = f"delete it and make it again with {MAKE}"
        return FeatureError(f"the feature file is damaged: {what}", where=self.path, remedy=remedy)

    def _load(self, fd: int) -> None:
        """Read the tables through the descriptor that later reads use, so that both see one file."""
        with os.fdopen(fd, "rb", closefd=False) as stream, h5py.File(stream, "r") as file:
            if _text(file.attrs.get("format")) != FORMAT:
                expected = f"attribute format = {FORMAT}"
                raise FeatureError("not a feature file of Stillhouse", where=self.path, expected=expected)
            if (version := file.attrs["version"]) != VERSION:
                what = f"version {version} of the format"
                raise FeatureError(what, where=self.path, expected=f"version {VERSION}")
            self._settings = json.loads(_text(file.attrs["settings"]))
            if not isinstance(self._settings, dict):
                raise ValueError("its settings are not an object")
            times_of(self._settings)
            self._fingerprint = _text(file.attrs["fingerprint"])
            size = os.fstat(fd).st_size
            tables = {name: _table(file, name, kind, size) for name, kind in TABLES.items()}
            if (stored := file.attrs.get("tables_crc32c")) is not None and stored != sum_of_tables(tables):
                raise ValueError("its tables do not match their checksum")
            self.records: np.ndarray = np.zeros(len(tables["audio"]), RECORD)
            if "records" in file:
                self.records = _table(file, "records", RECORD, size)
                if file.attrs["records_crc32c"] != checksum(self.records):
                    raise ValueError("its records do not match their checksum")
            self.offsets: np.ndarray = tables["offsets"]
            blob, cuts = tables["ids"].tobytes(), tables["id_offsets"].tolist()
            self.row_ids = [blob[a:b].decode("utf-8") for a, b in pairwise(cuts)]
            self.row_speeds, self.audio, self.crc32c = tables["speeds"], tables["audio"], tables["crc32c"]
            (_, self.width), self._offset = _place(file, "features", self.offsets, 2)
            self.loud_offsets: np.ndarray = np.zeros(len(self.offsets), np.int64)
            self._loud_at = 0
            if "loudness" in file:
                self.loud_offsets = _table(file, "loudness_offsets", np.int64, size)
                if file.attrs["loudness_crc32c"] != checksum(self.loud_offsets):
                    raise ValueError("the places of its loudness do not match their checksum")
                _, self._loud_at = _place(file, "loudness", self.loud_offsets, 1)
        n = len(self.row_ids)
        if {len(self.offsets), len(self.loud_offsets)} != {n + 1} or {*map(len, self._columns())} != {n}:
            raise ValueError("its tables disagree on the number of rows")
        self.lengths = np.diff(self.offsets)
        for offsets in (self.offsets, self.loud_offsets):
            if n and (offsets[0] != 0 or np.diff(offsets).min() < 0):
                raise ValueError("offsets run backwards")
        self._row: dict[float, dict[str, int]] = {}
        for r, (id, speed) in enumerate(self.keys()):
            self._row.setdefault(speed, {})[id] = r

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.row_speeds, self.audio, self.crc32c, self.records

    def keys(self) -> Iterator[tuple[str, float]]:
        """Return (id, speed) of every row, in file order."""
        return zip(self.row_ids, self.row_speeds.tolist(), strict=True)

    @property
    def settings(self) -> dict:
        """The settings of the file, named as in `FeatureSettings`."""
        return self.open()._settings

    @property
    def fingerprint(self) -> str:
        """The hash of the settings. New rows do not change it, because each row has its own identity (`audio`)."""
        return self.open()._fingerprint

    @property
    def frame_times(self) -> FrameTimes:
        """When the frames are."""
        return times_of(self.settings)

    @property
    def tells_loudness(self) -> bool:
        """Whether it can be told where the audio is quiet: from mel bins, or from `loudness`."""
        return not is_encoder(self.settings) or bool(self.loud_offsets[-1])

    @property
    def ids(self) -> list[str]:
        """Every utterance once, in file order."""
        return list(dict.fromkeys(self.open().row_ids))

    @property
    def speeds(self) -> list[float]:
        """The speeds that any utterance has, ascending."""
        return sorted(set(self.open().row_speeds.tolist()))

    def frames(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> np.ndarray:
        """Return lengths in frames, int64 [B]. Raises FeatureError, which names the rows that are missing."""
        return self.open().lengths[self.numbers(ids, speeds)]

    def sounds(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> np.ndarray:
        """Return the identity of the sound of each row, uint64 [B]. Raises FeatureError as `frames`."""
        return self.open().audio[self.numbers(ids, speeds)]

    def gather(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Return (float16 [ΣT, bins], one utterance after the other, and int64 lengths [B])."""
        numbers = self.open().numbers(ids, speeds)
        return self.rows(numbers), self.lengths[numbers]

    def numbers(self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0) -> np.ndarray:
        """Return the numbers of rows, int64 [B]. Raises FeatureError as `frames`."""
        if isinstance(speeds, (int, float)):
            speeds = [speeds] * len(ids)
        rows = self.open()._row
        try:
            return np.array([rows[s][i] for i, s in zip(ids, speeds, strict=True)], np.int64)
        except KeyError:
            missing = [f"{i} at speed {s:g}" for i, s in zip(ids, speeds) if i not in rows.get(s, ())]
            what = f"no features of {first_few(missing)}"
            expected = f"speeds {', '.join(f'{s:g}' for s in self.speeds)}"
            remedy = "add them with `stillhouse corpus features CORPUS FEATURES --speeds …`"
            raise FeatureError(what, where=self.path, expected=expected, remedy=remedy) from None

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the frames of rows by number: int64 [B] -> float16 [ΣT, bins]."""
        self.open()
        frame = self.width * 2
        starts = self.offsets[numbers] * frame + self._offset
        return self._read(starts, self.lengths[numbers] * frame).reshape(-1, self.width)

    def loudness(self, numbers: np.ndarray) -> np.ndarray:
        """Return the mean log mel energy of every 10 ms of rows by number, where the frames do not tell it.

        int64 [B] -> float16 [ΣF]. A row of fbank has none, and neither has one that an earlier version wrote.
        """
        self.open()
        starts, ends = self.loud_offsets[numbers], self.loud_offsets[numbers + 1]
        return self._read(starts * 2 + self._loud_at, (ends - starts) * 2)

    def _read(self, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Read `sizes` bytes from each of `starts`, as float16."""
        out = np.empty(int(sizes.sum()) // 2, np.float16)
        target, at, fd, read = out.view(np.uint8).data, 0, self._fd, os.preadv
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
        """Return (id, speed) of the rows whose bytes do not match their checksum."""
        self.open()
        rows = [(key, np.array([r])) for r, key in enumerate(self.keys())]
        return [key for key, r in rows if checksum(self.rows(r), self.loudness(r)) != self.crc32c[r[0]]]

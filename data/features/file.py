"""features.h5 and the parts that it is made of: the layout, and the fast reader. `writer.py` writes them.

    features    float16 [frames, bins]   contiguous: rows of one utterance are one run of bytes
    offsets     int64 [rows + 1]         first frame of each row; a row is one (utterance, speed, copy)
    ids, id_offsets                      UTF-8 bytes [..] and int64 [rows + 1]
    speeds      float64 [rows]           audio  uint64 [rows], identity of the sound     crc32c  uint32 [rows]
    records     RECORD [rows]            what each row was computed from; absent from older files
    loudness    float16 [..] and loudness_offsets int64 [rows + 1]   see `FeatureFile.loudness`; absent from fbank
    copies      uint16 [rows]   which noisy copy a row is, 0 without noise; absent if all are 0
    attributes: format, version, settings (JSON), fingerprint (of the settings), tables_crc32c (of TABLES),
    records_crc32c, loudness_crc32c (of its offsets), copies_crc32c, noise (JSON: what copies were made with)

Guarantees: a reader holds one inode from the first look to the last read.
Try: `stillhouse corpus info features.h5`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import google_crc32c
import h5py
import numpy as np

from ..errors import FeatureError, first_few
from ..files.atomic import plain_descriptor
from ..files.declared import own_dataset
from .settings import FrameTimes, Variant, is_encoder, times_of

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
            self.row_copies: np.ndarray = np.zeros(len(tables["audio"]), np.uint16)
            self._noise = json.loads(_text(file.attrs.get("noise", "null")))
            if "copies" in file:
                self.row_copies = _table(file, "copies", np.uint16, size)
                if file.attrs["copies_crc32c"] != checksum(self.row_copies) or not isinstance(self._noise, dict):
                    raise ValueError("its copies do not match their checksum")
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
        self._row: dict[Variant, dict[str, int]] = {}
        for r, (id, variant) in enumerate(self.keys()):
            self._row.setdefault(variant, {})[id] = r

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.row_speeds, self.row_copies, self.audio, self.crc32c, self.records

    def keys(self) -> Iterator[tuple[str, Variant]]:
        """Return the utterance and the variant of every row, in file order."""
        return zip(self.row_ids, map(Variant, self.row_speeds.tolist(), self.row_copies.tolist()), strict=True)

    @property
    def noise(self) -> dict | None:
        """What noisy copies were made with, as `NoiseRecipe.facts`. None if the file has none."""
        return self.open()._noise

    @property
    def copies(self) -> int:
        """How many noisy copies utterances have at most."""
        return int(self.open().row_copies.max(initial=0))

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

    def gather(
        self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0, copies: Sequence[int] | int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (float16 [ΣT, bins], one utterance after the other, and int64 lengths [B])."""
        numbers = self.open().numbers(ids, speeds, copies)
        return self.rows(numbers), self.lengths[numbers]

    def numbers(
        self, ids: Sequence[str], speeds: Sequence[float] | float = 1.0, copies: Sequence[int] | int = 0
    ) -> np.ndarray:
        """Return the numbers of rows, int64 [B]. Raises FeatureError as `frames`."""
        speeds = [speeds] * len(ids) if isinstance(speeds, (int, float)) else speeds
        copies = [copies] * len(ids) if isinstance(copies, int) else copies
        wanted = [Variant(*of) for of in zip(speeds, copies, strict=True)]
        rows = self.open()._row
        try:
            return np.array([rows[v][i] for i, v in zip(ids, wanted, strict=True)], np.int64)
        except KeyError:
            missing = [f"{i} at {v}" for i, v in zip(ids, wanted) if i not in rows.get(v, ())]
            what = f"no features of {first_few(missing)}"
            expected = f"speeds {', '.join(f'{s:g}' for s in self.speeds)}"
            options = "--speeds …"
            if any(copies):
                expected, options = f"{expected}, {self.copies} noisy copies", "--speeds … --noise … --copies …"
            remedy = f"add them with `stillhouse corpus features CORPUS FEATURES {options}`"
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

    def damaged_rows(self) -> list[tuple[str, Variant]]:
        """Return the utterance and the variant of the rows whose bytes do not match their checksum."""
        self.open()
        rows = [(key, np.array([r])) for r, key in enumerate(self.keys())]
        return [key for key, r in rows if checksum(self.rows(r), self.loudness(r)) != self.crc32c[r[0]]]

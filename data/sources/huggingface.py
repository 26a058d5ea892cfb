"""Hugging Face datasets on disk into a manifest: folders of `save_to_disk`, and parquet files.

Invariant: a row becomes one utterance or one finding; embedded audio is written out byte for byte, once, under a name
that its bytes decide. Nothing of the dataset's own code runs. Exercised by `stillhouse corpus import huggingface`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AudioError, ConfigError, CorpusError
from ..files.paths import below, confined, relative_audio
from .audio_files import AudioFiles, Unpacked, above
from .common import Imported, SessionPattern, by_time, in_session_order, inside, is_seconds, meta_of
from .table import FIELDS, USUAL

MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"FORM": ".aiff"}
SUFFIXES = {*MAGIC.values(), ".opus", ".aif", ".au", ".sph", ".w64", ".m4a", ".mp4", ".webm"}
PARQUET = re.compile(r"(?P<split>[A-Za-z][\w.]*)-\d+-of-\d+")


def import_huggingface(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    columns: Mapping[str, str] | None = None,
    *,
    root: Path | None = None,
    session_pattern: str | None = None,
) -> Imported:
    """Read datasets: (split or None, folder that `save_to_disk` wrote, or of parquet files, or one such file).

    columns: field of `table.FIELDS` -> name of a column; others are found under their usual names, the audio by its
    type. Without an id column, ids are those of the audio files where they have names, else split and row. Raises
    ConfigError where pyarrow is absent, CorpusError for a folder that holds no dataset.
    """
    try:
        import pyarrow
    except ImportError as e:
        raise ConfigError(
            "Hugging Face datasets are read with pyarrow, which is not installed",
            remedy="pip install 'stillhouse[huggingface]'",
        ) from e
    given = dict(columns or {})
    if unknown := set(given) - set(FIELDS):
        raise ConfigError(f"unknown field {', '.join(sorted(unknown))}", expected=", ".join(FIELDS))
    pattern = SessionPattern(session_pattern) if session_pattern else None
    result = Imported()
    unpacked = Unpacked(manifest)
    for split, source in sources:
        rows: dict[str | None, int] = {}
        for path, name in _files(source, split):
            places = AudioFiles([path.absolute().parent, *above(source)], root)
            reader = _DatasetReader(path, name, given, places, unpacked, manifest, pattern, root, result)
            row = rows.get(name, 0)
            try:
                for batch in _batches(path):
                    batch.validate(full=True)
                    reader.batch(batch, row)
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as e:
                raise CorpusError(
                    f"not readable as Arrow: {str(e).splitlines()[0][:200] if str(e) else type(e).__name__}",
                    where=path,
                    remedy="save the dataset again",
                ) from e
            rows[name] = row
    if unpacked.written:
        result.note(f"{unpacked.written} audio files were written to {unpacked.folder}")
    result.utterances = in_session_order(result)
    return result


def _files(source: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """The files of a dataset in order, each with its split."""
    if source.is_file() and source.suffix == ".parquet":
        return [(source, split or _parquet_split(source))]
    if (source / "dataset_dict.json").is_file():
        names = _json(source / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(n, str) and n and "/" not in n for n in names):
            raise CorpusError("no list of splits", where=source / "dataset_dict.json")
        return [found for name in names for found in _files(source / name, split or name)]
    if (source / "state.json").is_file():
        listed = _json(source / "state.json").get("_data_files")
        files = [f.get("filename") for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
        if not all(isinstance(f, str) and f and "/" not in f and f != ".." for f in files):
            raise CorpusError("names of data files that are none", where=source / "state.json")
        return [(source / str(f), split) for f in files]
    found = below(source, ".parquet")
    if not found:
        raise CorpusError(
            "no dataset in it",
            where=source,
            expected="a folder that save_to_disk wrote (state.json or dataset_dict.json), or parquet files",
        )
    return [(path, split or _parquet_split(path)) for path in found]


def _parquet_split(path: Path) -> str | None:
    match = PARQUET.fullmatch(path.stem)
    return match["split"] if match else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CorpusError(f"not JSON: {e}", where=path, remedy="save the dataset again") from e
    if not isinstance(found, dict):
        raise CorpusError("JSON, but no object", where=path, remedy="save the dataset again")
    return found


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of an Arrow stream or a parquet file, one at a time."""
    import pyarrow
    import pyarrow.ipc

    if path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=256)
        return
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
        yield from stream


def _features(schema: Any) -> dict[str, Any]:
    """What the columns mean, out of the schema's metadata; empty where it says nothing."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


class _DatasetReader:
    """The rows of one file."""

    def __init__(
        self,
        path: Path,
        split: str | None,
        given: Mapping[str, str],
        places: AudioFiles,
        unpacked: Unpacked,
        manifest: Path,
        pattern: SessionPattern | None,
        root: Path | None,
        result: Imported,
    ) -> None:
        self.path, self.split, self.given, self.places, self.unpacked = path, split, given, places, unpacked
        self.manifest, self.pattern, self.root, self.result = manifest, pattern, root, result

    def batch(self, batch: Any, first_row: int) -> None:
        features = _features(batch.schema)
        columns = self._columns(list(batch.schema.names), batch.schema, features)
        labels = {
            name: f["names"]
            for name, f in features.items()
            if isinstance(f, dict) and f.get("_type") == "ClassLabel" and isinstance(f.get("names"), list)
        }
        for k in range(batch.num_rows):
            # One row at a time: with embedded audio a batch may hold a gigabyte.
            row = {name: batch.column(name)[k].as_py() for name in batch.schema.names}
            for name, names in labels.items():
                value = row.get(name)
                if isinstance(value, int) and 0 <= value < len(names):
                    row[name] = names[value]
            self._row(row, columns, first_row + k)

    def _columns(self, names: list[str], schema: Any, features: dict[str, Any]) -> dict[str, str]:
        if len(set(names)) != len(names):
            raise CorpusError("two columns have the same name", where=self.path, expected=", ".join(names))
        columns = {}
        for field, name in self.given.items():
            if name not in names:
                raise ConfigError(
                    f"no column {name!r} for --{field}-column", where=self.path, expected=", ".join(names)
                )
            columns[field] = name
        if "audio" not in columns:
            typed = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Audio" and n in names]
            typed += [n for n in names if _is_audio(schema.field(n).type)]
            if not typed:
                raise CorpusError(
                    "no column of audio",
                    where=self.path,
                    expected=", ".join(names),
                    remedy="cast_column('audio', Audio()) before saving, or say --audio-column",
                )
            columns["audio"] = typed[0]
        for field in FIELDS:
            taken = set(columns.values())
            usual = (n for wanted in USUAL[field] for n in names if n.casefold() == wanted and n not in taken)
            if field not in columns and (own := next(usual, None)) is not None:
                columns[field] = own
        if "text" not in columns:
            raise CorpusError(
                "no column holds the transcript",
                where=self.path,
                expected=f"one of {', '.join(names)}",
                remedy="--text-column NAME",
            )
        return columns

    def _row(self, row: dict[str, Any], columns: dict[str, str], number: int) -> None:
        where = f"{self.path}:{number + 1}"
        value = {field: row.get(name) for field, name in columns.items()}
        audio = value["audio"]
        if isinstance(audio, str):
            audio = {"path": audio}
        stem = Path(str(audio.get("path") or "")).stem if isinstance(audio, dict) else ""
        id = str(value["id"]) if value.get("id") not in (None, "") else stem or f"{self.split or 'row'}-{number:08d}"
        try:
            if not isinstance(value["text"], str):
                raise CorpusError("no transcript", expected=f"a text in column {columns['text']}")
            path = self._audio(id, audio)
            seconds = self.places.length(path)[0]
            start, length = value.get("start") or 0.0, value.get("duration")
            if not is_seconds(start) or not (length is None or is_seconds(length)):
                raise CorpusError(f"start {str(start)[:40]!r}, duration {str(length)[:40]!r}", expected="seconds")
            # The duration column of a whole file is often rounded; the audio knows better.
            end = start + length if start and length is not None else seconds
            session, order = _text(value.get("session")), str(value.get("order") or by_time(start))
            if self.pattern is not None:
                session, order = self.pattern.read(id, session, order)
            duration_s = inside(start, end, seconds, path, self.result)
        except CorpusError as e:
            self.result.refused(where, e, id)
            return
        self.result.make(
            where,
            order,
            id=id,
            text=value["text"],
            audio=relative_audio(path, self.manifest),
            start_s=float(start),
            duration_s=duration_s,
            session=session,
            speaker=_text(value.get("speaker")),
            split=_text(value.get("split")) or self.split,
            meta=meta_of(row, set(columns.values()), self.result, "column "),
        )

    def _audio(self, id: str, audio: Any) -> Path:
        if not isinstance(audio, dict) or not (audio.get("bytes") or audio.get("path")):
            kind = "decoded samples" if isinstance(audio, dict) and "array" in audio else "no audio"
            raise AudioError(kind, expected="bytes or a path, as the feature Audio has them")
        data = audio.get("bytes")
        if not isinstance(data, bytes):
            return self.places.find(str(audio["path"]))
        suffix = Path(str(audio.get("path") or "")).suffix.lower()
        if suffix not in SUFFIXES:
            suffix = next((s for magic, s in MAGIC.items() if data.startswith(magic)), ".audio")
        target = self.unpacked.path(id, data, suffix)
        self.unpacked.write(target, lambda temporary: temporary.write_bytes(data))
        return confined(target, self.root)


def _is_audio(kind: Any) -> bool:
    import pyarrow.types

    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {f.name for f in kind}


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, int)) and value != "" else None

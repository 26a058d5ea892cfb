"""Hugging Face datasets on disk: folders of `save_to_disk`, and parquet files.

Guarantees: a row is one utterance or one finding. Embedded audio is written byte for byte, once, to a name made from
its bytes. No code of the dataset runs.
Try: `stillhouse corpus import huggingface my_dataset corpus.jsonl --text-column sentence`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AudioError, ConfigError, CorpusError
from ..files.paths import below, confined
from .audio_files import AudioFiles
from .common import Imported, as_text, by_time, is_seconds
from .table import FIELDS, USUAL, known_fields

MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"FORM": ".aiff"}
SUFFIXES = {*MAGIC.values(), ".opus", ".aif", ".au", ".sph", ".w64", ".m4a", ".mp4", ".webm"}
SAVE_AGAIN = "save the dataset again"
PARQUET = re.compile(r"(?P<split>[A-Za-z][\w.]*)-\d+-of-\d+")


def import_huggingface(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    columns: Mapping[str, str] | None = None,
    **settings: Any,
) -> Imported:
    """Read datasets: (split or None, a folder that `save_to_disk` wrote, a parquet file or a folder of those).

    Ids are those of the audio files if there is no id column. Without names of files, they are split and row.
    `columns` is {field of `table.FIELDS`: name of a column}. Others are found by their usual names, the audio by type.
    Raises ConfigError if pyarrow is not installed or a column is unknown, and CorpusError if a dataset is unreadable.
    """
    try:
        import pyarrow
    except ImportError as e:
        what, remedy = "Hugging Face datasets need pyarrow", "pip install 'stillhouse[huggingface]'"
        raise ConfigError(what, remedy=remedy) from e
    given = known_fields(columns)
    result = Imported(manifest, **settings)
    for split, source in sources:
        rows: dict[str | None, int] = {}
        for path, name in _files(source, split):
            reader = _DatasetReader(path, name, given, result, result.files(source, path.absolute().parent))
            row = rows.get(name, 0)
            try:
                for batch in _batches(path):
                    batch.validate(full=True)
                    reader.batch(batch, row)
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as e:
                why = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
                raise CorpusError(f"not readable as Arrow: {why}", where=path, remedy=SAVE_AGAIN) from e
            rows[name] = row
    if result.unpacked.written:
        result.note(f"{result.unpacked.written} audio files were written to {result.unpacked.folder}")
    return result.in_session_order()


def _files(source: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """Return the files of a dataset in order, each with its split."""
    if source.is_file() and source.suffix == ".parquet":
        return [(source, split or _parquet_split(source))]
    if (source / "dataset_dict.json").is_file():
        names = _json(source / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(n, str) and n and "/" not in n for n in names):
            raise CorpusError("no list of splits", where=source / "dataset_dict.json")
        return [pair for name in names for pair in _files(source / name, split or name)]
    if (source / "state.json").is_file():
        listed = _json(source / "state.json").get("_data_files")
        files = [f.get("filename") for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
        if not all(isinstance(f, str) and f and "/" not in f and f != ".." for f in files):
            raise CorpusError("the names of data files are damaged", where=source / "state.json")
        return [(source / str(f), split) for f in files]
    parquet = below(source, ".parquet")
    if not parquet:
        expected = "a folder that save_to_disk wrote (state.json or dataset_dict.json), or parquet files"
        raise CorpusError("no dataset in it", where=source, expected=expected)
    return [(path, split or _parquet_split(path)) for path in parquet]


def _parquet_split(path: Path) -> str | None:
    match = PARQUET.fullmatch(path.stem)
    return match["split"] if match else None


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CorpusError(f"not JSON: {e}", where=path, remedy=SAVE_AGAIN) from e
    if not isinstance(fields, dict):
        raise CorpusError("JSON, but no object", where=path, remedy=SAVE_AGAIN)
    return fields


def _batches(path: Path) -> Iterator[Any]:
    """Yield the record batches of an Arrow stream or a parquet file."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=256)
    else:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from stream


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that the schema's metadata names, which may be none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


class _DatasetReader:
    """The rows of one file."""

    def __init__(
        self, path: Path, split: str | None, given: Mapping[str, str], result: Imported, files: AudioFiles
    ) -> None:
        self.path, self.split, self.given, self.result, self.files = path, split, given, result, files

    def batch(self, batch: Any, first_row: int) -> None:
        """Add the rows of a record batch."""
        features = _features(batch.schema)
        columns = self._columns(list(batch.schema.names), batch.schema, features)
        labels = {
            name: f["names"]
            for name, f in features.items()
            if isinstance(f, dict) and f.get("_type") == "ClassLabel" and isinstance(f.get("names"), list)
        }
        for k in range(batch.num_rows):
            # Rows are converted one at a time, because a batch with embedded audio may hold a gigabyte.
            row = {name: batch.column(name)[k].as_py() for name in batch.schema.names}
            for name, names in labels.items():
                value = row.get(name)
                if isinstance(value, int) and 0 <= value < len(names):
                    row[name] = names[value]
            self._row(row, columns, first_row + k)

    def _columns(self, names: list[str], schema: Any, features: dict[str, Any]) -> dict[str, str]:
        if len(set(names)) != len(names):
            raise CorpusError("two columns have the same name", where=self.path, expected=", ".join(names))
        columns = dict(self.given)
        for field, name in columns.items():
            if name not in names:
                what = f"no column {name!r} for --{field}-column"
                raise ConfigError(what, where=self.path, expected=", ".join(names))
        if "audio" not in columns:
            typed = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Audio" and n in names]
            typed += [n for n in names if _is_audio(schema.field(n).type)]
            if not typed:
                remedy = "cast_column('audio', Audio()) before saving, or give --audio-column"
                raise CorpusError("no column of audio", where=self.path, expected=", ".join(names), remedy=remedy)
            columns["audio"] = typed[0]
        for field in FIELDS:
            used = set(columns.values())
            usual = (n for name in USUAL[field] for n in names if n.casefold() == name and n not in used)
            if field not in columns and (own := next(usual, None)) is not None:
                columns[field] = own
        if "text" not in columns:
            what = "no column holds the transcript"
            raise CorpusError(what, where=self.path, expected=f"one of {', '.join(names)}", remedy="--text-column NAME")
        return columns

    def _row(self, row: dict[str, Any], columns: dict[str, str], number: int) -> None:
        where = f"{self.path}:{number + 1}"
        value = {field: row.get(name) for field, name in columns.items()}
        audio = value["audio"]
        if isinstance(audio, str):
            audio = {"path": audio}
        stem = Path(str(audio.get("path") or "")).stem if isinstance(audio, dict) else ""
        id = str(value["id"]) if value.get("id") not in (None, "") else stem or f"{self.split or 'row'}-{number:08d}"
        with self.result.line(where, id):
            if not isinstance(value["text"], str):
                raise CorpusError("no transcript", expected=f"a text in column {columns['text']}")
            path = self._audio(id, audio)
            seconds = self.files.length(path)[0]
            start, length = value.get("start") or 0.0, value.get("duration")
            if not is_seconds(start) or not (length is None or is_seconds(length)):
                raise CorpusError(f"start {str(start)[:40]!r}, duration {str(length)[:40]!r}", expected="seconds")
            # The duration column of a whole file is often rounded, so the length of the audio counts.
            end = start + length if start and length is not None else seconds
            session, order = as_text(value.get("session")), str(value.get("order") or by_time(start))
            session, order = self.result.session(id, session, order)
            self.result.add(
                where,
                order,
                id=id,
                text=value["text"],
                audio=path,
                start_s=float(start),
                duration_s=self.result.duration(start, end, seconds, path),
                session=session,
                speaker=as_text(value.get("speaker")),
                split=as_text(value.get("split")) or self.split,
                meta=self.result.meta(row, set(columns.values()), "column "),
            )

    def _audio(self, id: str, audio: Any) -> Path:
        if not isinstance(audio, dict) or not (audio.get("bytes") or audio.get("path")):
            kind = "decoded samples" if isinstance(audio, dict) and "array" in audio else "no audio"
            raise AudioError(kind, expected="bytes or a path, as the feature Audio has them")
        data = audio.get("bytes")
        if not isinstance(data, bytes):
            return self.files.find(str(audio["path"]))
        suffix = Path(str(audio.get("path") or "")).suffix.lower()
        if suffix not in SUFFIXES:
            suffix = next((s for magic, s in MAGIC.items() if data.startswith(magic)), ".audio")
        target = self.result.unpacked.write(id, data, suffix, lambda draft: draft.write_bytes(data))
        return confined(target, self.result.root)


def _is_audio(kind: Any) -> bool:
    import pyarrow.types

    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {f.name for f in kind}

"""Hugging Face datasets on disk: folders of `save_to_disk`, parquet files, and audio files with metadata.

Guarantees: a row is one utterance or one finding. Embedded audio is written byte for byte, once, to a name made from
its bytes. No code of the dataset runs.
Try: `stillhouse corpus import huggingface my_dataset corpus.jsonl --text-column sentence`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..audio.channels import ChannelNames
from ..errors import AudioError, ConfigError, CorpusError
from ..files.paths import below, confined
from .audio_files import AudioFiles
from .columns.names import AudioNames, stem
from .columns.times import TIMES, fold, seconds
from .common import OVERSHOOT_S, Imported, as_text, by_time
from .table import FIELDS, NO_COLUMN, USUAL, add_tables, known_fields

MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"FORM": ".aiff"}
SUFFIXES = {*MAGIC.values(), ".opus", ".aif", ".au", ".sph", ".w64", ".m4a", ".mp4", ".webm"}
SAVE_AGAIN = "save the dataset again"
METADATA = ("metadata.jsonl", "metadata.csv")
PARQUET = re.compile(r"(?P<split>[A-Za-z][\w.]*)-\d+-of-\d+")


def import_huggingface(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    columns: Mapping[str, str] | None = None,
    **settings: Any,
) -> Imported:
    """Read datasets: (split or None, a folder that `save_to_disk` wrote, a parquet file or a folder of those).

    A folder of audio files with metadata.jsonl or metadata.csv, in it or below it, is read as a table. The split is
    then the name of the folder below.

    Ids are those of the audio files if there is no id column. Without names of files, they are split and row.
    `columns` is {field of `table.FIELDS`: name of a column}. Others are found by their usual names, the audio by type.
    Raises ConfigError if pyarrow is not installed or a column is unknown, and CorpusError if a dataset is unreadable.
    """
    given = known_fields(columns)
    result, names = Imported(manifest, **settings), AudioNames()
    tables = [(split, source, _metadata(source)) for split, source in sources]
    below_source = [(s or _folder_split(path, source), path) for s, source, paths in tables for path in paths]
    add_tables(result, below_source, given)
    datasets = [(split, source) for split, source, paths in tables if not paths]
    if not datasets:
        return result.in_session_order()
    try:
        import pyarrow
    except ImportError as e:
        what, remedy = "Hugging Face datasets need pyarrow", "pip install 'stillhouse[huggingface]'"
        raise ConfigError(what, remedy=remedy) from e
    readers: list[_DatasetReader] = []
    for split, source in datasets:
        for path, name in _files(source, split):
            with _readable(path, pyarrow.ArrowException):
                files = result.files(source, path.absolute().parent)
                place = (source if source.is_dir() else source.parent).absolute() / (name or "")
                readers.append(_DatasetReader(path, name, place, given, names, result, files))
                readers[-1].look()
    channels = ChannelNames(label for reader in readers for label in reader.labels)
    rows: dict[str | None, int] = {}
    for reader in readers:
        with _readable(reader.path, pyarrow.ArrowException):
            for batch in _batches(reader.path):
                batch.validate(full=True)
                reader.batch(batch, rows.get(reader.split, 0), channels)
                rows[reader.split] = rows.get(reader.split, 0) + batch.num_rows
    if result.unpacked.written:
        result.note(f"{result.unpacked.written} audio files were written to {result.unpacked.folder}")
    return result.in_session_order()


def _metadata(source: Path) -> list[Path]:
    """Return the tables of a folder of audio files: metadata.jsonl or metadata.csv in it or below it."""
    if source.is_file():
        return [source] if source.name in METADATA else []
    return sorted(path for name in METADATA for path in below(source, name) if path.name == name)


def _folder_split(table: Path, source: Path) -> str | None:
    """Return the name of the folder of a table, if that is below the source."""
    return table.parent.name if source.is_dir() and table.parent != source else None


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
        expected = "a folder that save_to_disk wrote (state.json or dataset_dict.json), parquet files or metadata.jsonl"
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


@contextmanager
def _readable(path: Path, arrow_error: type[Exception]) -> Iterator[None]:
    """Turn errors about a data file into one that names it."""
    try:
        yield
    except (arrow_error, OSError, ValueError, UnicodeDecodeError) as e:
        why = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise CorpusError(f"not readable as Arrow: {why}", where=path, remedy=SAVE_AGAIN) from e


def _batches(path: Path, columns: Collection[str] | None = None) -> Iterator[Any]:
    """Yield the record batches of an Arrow stream or a parquet file. `columns` may name fields of structs as a.b."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=256, columns=columns and list(columns))
    else:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            # A selection copies nothing, and what is not selected is not read from the disk.
            selected = None if columns is None else list(dict.fromkeys(name.split(".")[0] for name in columns))
            yield from (batch if selected is None else batch.select(selected) for batch in stream)


def _schema(path: Path) -> Any:
    """Return the schema of an Arrow stream or a parquet file."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        return pyarrow.parquet.read_schema(path)
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
        return stream.schema


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that the schema's metadata names, which may be none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


class _DatasetReader:
    """The rows of one file. `place` stands for the folder of the audio that is embedded."""

    def __init__(
        self,
        path: Path,
        split: str | None,
        place: Path,
        given: Mapping[str, str],
        names: AudioNames,
        result: Imported,
        files: AudioFiles,
    ) -> None:
        self.path, self.split, self.place, self.given = path, split, place, given
        self.names, self.result, self.files = names, result, files
        self.schema = _schema(path)
        self.features = _features(self.schema)
        self.columns = self._columns(list(self.schema.names), self.schema, self.features)
        self.labels: set[str] = set()

    def look(self) -> None:
        """Look at the names of the audio and of the channels of all rows, before any is imported."""
        import pyarrow.types

        audio = self.columns["audio"]
        struct = pyarrow.types.is_struct(self.schema.field(audio).type)
        others = [self.columns[field] for field in ("id", "start", "channel") if field in self.columns]
        for batch in _batches(self.path, [f"{audio}.path" if struct else audio, *others]):
            batch.validate(full=True)
            paths = (batch.column(audio).field("path") if struct else batch.column(audio)).to_pylist()
            rows = {field: batch.column(n).to_pylist() for field, n in self.columns.items() if n in others}
            self.labels |= {"" if label is None else str(label) for label in rows.get("channel", ())}
            for k, path in enumerate(paths):
                if isinstance(path, str) and stem(path) and ("id" not in rows or rows["id"][k] in (None, "")):
                    self.names.see(self.place, path, self._start(rows["start"][k]) if "start" in rows else None)
        if "channel" not in self.given and not ChannelNames(self.labels).known:
            # Such a column is about something else, for example a broadcaster.
            self.columns.pop("channel", None)
            self.labels = set()
        unused = [name for name in self.schema.names if name not in self.columns.values()]
        known = {field: None for field, name in self.given.items() if name == NO_COLUMN} | self.columns
        self.result.unread_times(str(self.path), unused, known, lambda name: _is_number(self.schema.field(name).type))
        inside = {f"{n}.{f.name}": f.type for n in unused for f in _fields_of(self.schema.field(n).type)}
        remedy = "call `dataset.flatten()` before saving, and name the column"
        self.result.unread_times(str(self.path), list(inside), known, lambda name: _is_number(inside[name]), remedy)

    def _start(self, value: Any) -> float | None:
        with suppress(ValueError, CorpusError):
            return seconds(value, self.columns.get("start", ""))
        return None

    def batch(self, batch: Any, first_row: int, channels: ChannelNames) -> None:
        """Add the rows of a record batch."""
        labels = {
            name: f["names"]
            for name, f in self.features.items()
            if isinstance(f, dict) and f.get("_type") == "ClassLabel" and isinstance(f.get("names"), list)
        }
        for k in range(batch.num_rows):
            # Rows are converted one at a time, because a batch with embedded audio may hold a gigabyte.
            row = {name: batch.column(name)[k].as_py() for name in batch.schema.names}
            for name, names in labels.items():
                value = row.get(name)
                if isinstance(value, int) and 0 <= value < len(names):
                    row[name] = names[value]
            self._row(row, first_row + k, channels)

    def _columns(self, names: list[str], schema: Any, features: dict[str, Any]) -> dict[str, str]:
        if len(set(names)) != len(names):
            raise CorpusError("two columns have the same name", where=self.path, expected=", ".join(names))
        columns = {field: name for field, name in self.given.items() if name != NO_COLUMN}
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
            folded = fold if field in TIMES else str.casefold
            usual = (n for name in USUAL[field] for n in names if folded(n) == name and n not in used)
            if field not in columns and field not in self.given and (own := next(usual, None)) is not None:
                columns[field] = own
        if "text" not in columns:
            what = "no column holds the transcript"
            raise CorpusError(what, where=self.path, expected=f"one of {', '.join(names)}", remedy="--text-column NAME")
        return columns

    def _row(self, row: dict[str, Any], number: int, channels: ChannelNames) -> None:
        where = f"{self.path}:{number + 1}"
        value = {field: row.get(name) for field, name in self.columns.items()}
        audio = value["audio"]
        if isinstance(audio, str):
            audio = {"path": audio}
        channel = None if value.get("channel") is None else str(value["channel"])
        id = self._id(value, audio, channel) or f"{self.split or 'row'}-{number:08d}"
        with self.result.line(where, id):
            if not isinstance(value["text"], str):
                raise CorpusError("no transcript", expected=f"a text in column {self.columns['text']}")
            start, end, duration = (seconds(value.get(field), self.columns.get(field, field)) for field in TIMES)
            path = self._audio(id, audio)
            length = self.files.length(path)
            if start is None and end is None and duration is not None:
                # The duration of a whole file is often rounded, so the length of the audio counts.
                if abs(duration - length.seconds) > OVERSHOOT_S:
                    what = f"the duration is {duration:g} s without a start, but the audio has {length.seconds:.3f} s"
                    remedy = "name the starts with --start-column, or take whole files with --duration-column -"
                    raise CorpusError(what, remedy=remedy)
                duration = None
            which = channels.channel(channel, length.channels, path) if "channel" in self.columns else None
            placed = self.result.placed(path, length, start, end, duration, which)
            session, order = as_text(value.get("session")), value.get("order")
            order = by_time(placed["start_s"]) if order in (None, "") else str(order)
            session, order = self.result.session(id, session, order)
            self.result.add(
                where,
                order,
                id=id,
                text=value["text"],
                session=session,
                speaker=as_text(value.get("speaker")),
                split=as_text(value.get("split")) or self.split,
                meta=self.result.meta(row, set(self.columns.values()), "column "),
                **placed,
            )

    def _id(self, value: dict[str, Any], audio: Any, channel: str | None) -> str | None:
        """Return the row's own id, or one from the name of its audio. None: it has neither."""
        if value.get("id") not in (None, ""):
            return str(value["id"])
        path = audio.get("path") if isinstance(audio, dict) else None
        if not isinstance(path, str) or not stem(path):
            return None
        data, content = audio.get("bytes"), None
        if isinstance(data, bytes) and self.names.shared(self.place, path):
            content = blake2b(data, digest_size=4).hexdigest()
        return self.names.id(self.place, path, self._start(value.get("start")), channel, content)

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


def _fields_of(kind: Any) -> list[Any]:
    """Return the fields of a struct, and none of anything else."""
    import pyarrow.types

    return list(kind) if pyarrow.types.is_struct(kind) else []


def _is_number(kind: Any) -> bool:
    import pyarrow.types

    return pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)

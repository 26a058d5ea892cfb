"""CSV and TSV tables, by a mapping of columns.

Guarantees: a row is one utterance or one finding. Columns that no field uses are kept in `meta`.
Try: `stillhouse corpus import csv prompts.csv corpus.jsonl --text-column prompt --audio-root audio`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..audio.channels import ChannelNames
from ..errors import ConfigError, CorpusError
from ..files.lines import read_text
from ..files.paths import confined
from .audio_files import AudioFiles
from .columns.names import AudioNames
from .columns.times import TIMES, fold, seconds, segment
from .common import Imported

# The usual names of a field's column. The first that a header has counts.
USUAL: dict[str, tuple[str, ...]] = {
    "id": ("id", "utt", "utt_id", "uttid", "utterance", "utterance_id", "segment_id", "key"),
    "text": ("text", "transcript", "transcription", "sentence", "txt"),
    "audio": ("audio", "path", "wav", "file", "filename", "audio_path", "audio_filepath", "file_name"),
    "session": ("session", "session_id", "chapter", "chapter_id", "conversation", "conversation_id", "recording"),
    "speaker": ("speaker", "speaker_id", "spk", "client_id"),
    "split": ("split", "subset"),
    **TIMES,
    "channel": ("channel", "channel_id", "chan", "side"),
    "order": ("order", "index"),
}
FIELDS = tuple(USUAL)
NO_COLUMN = "-"  # in the place of a column: the field has none


def import_table(
    table: Path,
    manifest: Path,
    columns: Mapping[str, str] | None = None,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    quote: bool | None = None,
    split: str | None = None,
    **settings: Any,
) -> Imported:
    """Read a table. Raises CorpusError if the file is not a table, and ConfigError if a column is unknown.

    `columns` is {field of FIELDS: name of a column, or its number from 1}. Several joined by "," are joined by "-".
    NO_COLUMN says that a field has no column. Other fields are found by USUAL names. By default the delimiter is a tab
    for .tsv and .tab, else the one that splits the first line. The first row is a header unless all columns are given
    by number, and double quotes quote unless the delimiter is a tab. Without `audio_root`, paths start in the table's
    folder.
    """
    given = known_fields(columns)
    text = read_text(table)
    delimiter = delimiter or _delimiter(table, text)
    rows = list(_rows(table, text, delimiter, delimiter != "\t" if quote is None else quote))
    if header is None:
        chosen = [value for value in given.values() if value != NO_COLUMN]
        header = not chosen or not all(part.isdigit() for value in chosen for part in value.split(","))
    if not rows or (header and len(rows) == 1):
        raise CorpusError("the table has no rows", where=table)
    names = rows[0][1] if header else [f"column_{k + 1}" for k in range(max(len(cells) for _, cells in rows))]
    names = [name.strip() for name in names]
    if len(set(names)) != len(names):
        raise CorpusError("two columns have the same name", where=f"{table}:1", expected=", ".join(names))
    places = _places(table, names, given, guess=header)
    listed = f"one of {', '.join(names)}"
    if "text" not in places:
        raise ConfigError("no column holds the transcript", where=table, expected=listed, remedy="--text-column NAME")
    if "id" not in places and "audio" not in places:
        raise ConfigError("no column names the utterances", where=table, expected=listed, remedy="--id-column NAME")
    result = Imported(manifest, **settings)
    folder = result.audio_root or table.parent
    body = rows[1:] if header else rows
    columns_read: dict[str, str | None] = {field: None for field, column in given.items() if column == NO_COLUMN}
    columns_read |= {field: names[ks[0]] for field, ks in places.items()}
    result.unread_times(
        f"{table}:1", names if header else [], columns_read, lambda n: _is_numeric(body, names.index(n))
    )
    if "channel" in places and "channel" not in given:
        labels = [_value(cells, places)["channel"] for _, cells in body if len(cells) == len(names)]
        if not ChannelNames(labels).known:  # Such a column is about something else, for example a broadcaster.
            del places["channel"]
    used = {k for columns in places.values() for k in columns}
    audio = _TableAudio(folder, columns_read, [_value(cells, places) for _, cells in body if len(cells) == len(names)])
    for number, cells in body:
        where = f"{table}:{number}"
        if len(cells) != len(names):
            result.finding("line", where, f"{len(cells)} columns, expected {len(names)} ({', '.join(names)})")
            continue
        value = _value(cells, places)
        meta = {names[k]: cells[k] for k in range(len(names)) if k not in used and cells[k] != ""}
        with result.line(where, value.get("id")):
            result.add(where, split=value.get("split") or split, meta=meta, **audio.fields(value, result))
    return result.in_session_order()


def known_fields(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return a mapping of fields to columns. Raises ConfigError for an unknown field."""
    if unknown := set(columns or {}) - set(FIELDS):
        raise ConfigError(f"unknown field {', '.join(sorted(unknown))}", expected=", ".join(FIELDS))
    return dict(columns or {})


def _value(cells: list[str], places: dict[str, list[int]]) -> dict[str, str]:
    """Return {field: its text} of a row."""
    return {field: "-".join(cells[k].strip() for k in ks) for field, ks in places.items()}


def _is_numeric(rows: list[tuple[int, list[str]]], column: int) -> bool:
    """Return whether a column holds numbers alone, and at least one."""
    cells = [cells[column].strip() for _, cells in rows if column < len(cells)]
    return any(cells) and all(re.fullmatch(r"-?\d+(?:[.,]\d*)?", cell) for cell in cells if cell)


class _TableAudio:
    """What depends on the audio: ids, times and channels. `columns` is {field: name of its column}."""

    def __init__(self, folder: Path, columns: Mapping[str, str | None], rows: list[dict[str, str]]) -> None:
        self.folder, self.columns = folder, columns
        self.files = AudioFiles([folder], None)
        self.names, self.channels = AudioNames(), ChannelNames({value.get("channel", "") for value in rows})
        for value in rows:
            if value.get("audio") and not value.get("id"):
                start_s = None
                with suppress(ValueError, CorpusError):
                    start_s = self._time(value, "start")
                self.names.see(folder, value["audio"], start_s)

    def _time(self, value: dict[str, str], field: str) -> float | None:
        return seconds(value.get(field), self.columns.get(field) or field)

    def fields(self, value: dict[str, str], result: Imported) -> dict[str, Any]:
        """Return the arguments of `Imported.add` for a row, without split and meta."""
        start_s, end_s, duration_s = (self._time(value, field) for field in TIMES)
        path, channel = value.get("audio"), value.get("channel") or None
        id = value.get("id") or (self.names.id(self.folder, path, start_s, channel) if path else "")
        session, order = result.session(id, value.get("session") or None, value.get("order", ""))
        if path:
            audio = confined(self.folder / path, result.root)
            length = self.files.length(audio)
            which = self.channels.channel(channel, length.channels, audio)
            placed = result.placed(audio, length, start_s, end_s, duration_s, which)
        else:
            begin, span = segment(start_s, end_s, duration_s)
            placed = {"start_s": begin, "duration_s": span}
        speaker = value.get("speaker") or None
        return placed | {"id": id, "text": value["text"], "session": session, "order": order, "speaker": speaker}


def _delimiter(table: Path, text: str) -> str:
    if table.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    first = text.split("\n", 1)[0]
    if table.suffix.lower() == ".csv":
        # In many languages, spreadsheets write .csv with semicolons.
        return ";" if first.count(";") > first.count(",") else ","
    best = max("\t,;|", key=first.count)
    if best not in first:
        raise CorpusError("no delimiter in the first line", where=f"{table}:1", remedy="name it with --delimiter")
    return best


def _rows(table: Path, text: str, delimiter: str, quote: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number where the row begins, cells) of every row that is not blank."""
    if len(delimiter) != 1:
        raise ConfigError(f"delimiter {delimiter!r}", expected="one character")
    csv.field_size_limit(1 << 27)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
        strict=True,
    )
    line = 1
    try:
        for cells in reader:
            if any(c.strip() for c in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as e:
        raise CorpusError(f"not a table: {e}", where=f"{table}:{reader.line_num}") from e


def _places(table: Path, names: list[str], given: dict[str, str], guess: bool) -> dict[str, list[int]]:
    """Return the numbers of the columns of each field."""
    places: dict[str, list[int]] = {}
    for field, value in given.items():
        if value == NO_COLUMN:
            continue
        places[field] = []
        for part in [value] if value in names else value.split(","):
            part = part.strip()
            if part in names:
                places[field].append(names.index(part))
            elif re.fullmatch(r"[1-9]\d*", part) and int(part) <= len(names):
                places[field].append(int(part) - 1)
            else:
                what = f"no column {part!r} for --{field}-column"
                raise ConfigError(what, where=table, expected=f"one of {', '.join(names)}")
    if guess:
        folded = [name.casefold() for name in names]
        used = {k for columns in places.values() for k in columns}
        for field in FIELDS:
            own = [fold(name) for name in names] if field in TIMES else folded
            usual = (own.index(n) for n in USUAL[field] if n in own)
            if (
                field not in given
                and field not in places
                and (k := next((k for k in usual if k not in used), None)) is not None
            ):
                places[field] = [k]
    return places

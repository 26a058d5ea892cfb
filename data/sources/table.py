"""CSV and TSV tables, by a mapping of columns.

Guarantees: a row is one utterance or one finding. Columns that no field uses are kept in `meta`.
Try: `stillhouse corpus import csv prompts.csv corpus.jsonl --text-column prompt --audio-root audio`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audio.channels import ChannelNames
from ..errors import ConfigError, CorpusError
from ..files.lines import read_text
from .audio_files import AudioFiles
from .columns.names import AudioNames
from .columns.times import TIMES, fold, seconds, segment
from .common import Imported

# The usual names of a field's column. The first that a header has counts.
USUAL: dict[str, tuple[str, ...]] = {
    "id": ("id", "utt", "utt_id", "uttid", "utterance", "utterance_id", "segment_id", "key"),
    "text": ("text", "transcript", "transcription", "sentence", "txt", "wrd", "tgt_text"),
    "audio": (
        *("audio", "path", "wav", "file", "filename", "audio_path", "audio_filepath", "file_name", "file_path"),
        *("filepath", "audio_file", "audio_filename", "wav_path", "wav_filename", "wav_file"),
    ),
    "session": ("session", "session_id", "chapter", "chapter_id", "conversation", "conversation_id", "recording"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "client_id"),
    "split": ("split", "subset"),
    **TIMES,
    "channel": ("channel", "channel_id", "chan", "side"),
    "order": ("order", "index"),
}
FIELDS = tuple(USUAL)
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a cell as spreadsheets and pandas quote it
NO_COLUMN = "-"  # in the place of a column: the field has none
LONGEST_ROW = 1_000  # lines. A quote that stays open for longer is a stray one.
STRAY = 'double the quotes inside of a cell ("") or read them as letters with --no-quote'


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
    by number. Double quotes quote unless the delimiter is a tab, but also in a TSV that doubles quotes inside of cells.
    Without `audio_root`, paths start in the table's folder.
    """
    result = Imported(manifest, **settings)
    form = TableForm(delimiter, header, quote)
    add_tables(result, [(split, table)], known_fields(columns), form)
    return result.in_session_order()


@dataclass(frozen=True)
class TableForm:
    """How a table is written. None: as it looks, see `import_table`."""

    delimiter: str | None = None
    header: bool | None = None
    quote: bool | None = None


def add_tables(
    result: Imported, tables: Sequence[tuple[str | None, Path]], given: dict[str, str], form: TableForm | None = None
) -> None:
    """Add the rows of tables, given as (split or None, file), to an import. See `import_table`.

    A .jsonl or .json file has an object for each row.
    """
    names = AudioNames()
    opened = [(split, _Table(result, table, given, form or TableForm(), names)) for split, table in tables]
    for split, table in opened:
        table.add(split)


class _Table:
    """The rows of one table, and what its columns are."""

    def __init__(
        self, result: Imported, table: Path, given: dict[str, str], form: TableForm, audio_names: AudioNames
    ) -> None:
        self.result, self.table = result, table
        header = form.header
        if table.suffix.lower() in (".jsonl", ".json"):
            self.decimal_comma, rows, header = False, list(_object_rows(result, table)), True
        else:
            line, text, delimiter = _first_line(table, read_text(table), form.delimiter)
            self.decimal_comma = delimiter != ","
            quote = delimiter != "\t" if form.quote is None else form.quote
            if form.quote is None and delimiter == "\t" and _doubles_quotes(text):
                quote = True
                result.note(f"{table}: quotes are read as those of cells, because they are doubled inside (--no-quote)")
            rows = list(_rows(result, table, line, text, delimiter, quote))
        if header is None:
            chosen = [value for value in given.values() if value != NO_COLUMN]
            header = not chosen or not all(part.isdigit() for value in chosen for part in value.split(","))
        if not rows or (header and len(rows) == 1):
            if strays := [f for f in result.findings if f.remedy == STRAY and f.file == str(table)]:
                raise CorpusError(f"not a table: {strays[0].what}", where=strays[0].where, remedy=STRAY)
            raise CorpusError("the table has no rows", where=table)
        # Spreadsheets write empty columns behind the last one that was ever in use.
        first = rows[:1] if header else rows
        width = max((k + 1 for _, cells in first for k, cell in enumerate(cells) if cell.strip()), default=0)
        self.rows = [(n, cells if any(c.strip() for c in cells[width:]) else cells[:width]) for n, cells in rows]
        names = self.rows[0][1] if header else [f"column_{k + 1}" for k in range(width)]
        self.names = names = [name.strip() or f"column_{k + 1}" for k, name in enumerate(names)]
        if len(set(names)) != len(names):
            raise CorpusError("two columns have the same name", where=f"{table}:1", expected=", ".join(names))
        self.places = places = _places(table, names, given, guess=header)
        listed = f"one of {', '.join(names)}"
        if "text" not in places:
            what = "no column holds the transcript"
            remedy = "--text-column NAME, or its number if no row names the columns"
            remedy = remedy if len(names) > 1 else "name the delimiter, for example --delimiter '|'"
            raise ConfigError(what, where=table, expected=listed, remedy=remedy)
        if "id" not in places and "audio" not in places:
            what = "no column names the utterances"
            raise ConfigError(what, where=table, expected=listed, remedy="--id-column NAME or --audio-column NAME")
        self.rows = body = self.rows[1:] if header else self.rows
        columns_read: dict[str, str | None] = {field: None for field, column in given.items() if column == NO_COLUMN}
        columns_read |= {field: names[ks[0]] for field, ks in places.items()}
        result.unread_times(
            f"{table}:1", names if header else [], columns_read, lambda n: _is_numeric(body, names.index(n))
        )
        if "channel" in places and "channel" not in given:
            labels = [self._value(cells)["channel"] for _, cells in body if len(cells) == len(names)]
            if not ChannelNames(labels).known:  # Such a column is about something else, for example a broadcaster.
                del places["channel"]
        values = [self._value(cells) for _, cells in body if len(cells) == len(names)]
        folder = result.audio_root or table.parent
        self.audio = _TableAudio(folder, AudioFiles([folder], result.root), columns_read, values, audio_names)

    def add(self, split: str | None) -> None:
        """Add the rows to the import."""
        names, used = self.names, {k for columns in self.places.values() for k in columns}
        silent: list[str] = []  # places of rows without audio, beside others that have some
        for number, cells in self.rows:
            where = f"{self.table}:{number}"
            if len(cells) != len(names):
                what = f"{len(cells)} columns, expected {len(names)} ({', '.join(names)})"
                self.result.finding("line", where, what)
                continue
            value = self._value(cells)
            if "audio" in self.places and not value.get("audio"):
                silent.append(where)
            meta = {names[k]: cells[k] for k in range(len(names)) if k not in used and cells[k] != ""}
            with self.result.line(where, value.get("id")):
                fields = self.audio.fields(value, self.result)
                self.result.add(where, split=value.get("split") or split, meta=meta, **fields)
        if silent:
            self.result.note(f"{len(silent)} rows name no audio and are text alone, for example {silent[0]}")

    def _value(self, cells: list[str]) -> dict[str, str]:
        """Return {field: its text} of a row. Where the delimiter is no comma, 1,5 is a time with a decimal comma."""
        value = {field: "-".join(cells[k].strip() for k in ks) for field, ks in self.places.items()}
        if self.decimal_comma:
            value |= {f: re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", value[f]) for f in TIMES if f in value}
        return value


def _doubles_quotes(text: str) -> bool:
    """Return whether each cell of a TSV that begins with a quote is a quoted one, and some have quotes inside."""
    cells = [cell for line in text.splitlines() for cell in line.split("\t") if cell.startswith('"')]
    return any('""' in cell[1:-1] for cell in cells) and all(QUOTED.fullmatch(cell) for cell in cells)


def known_fields(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return a mapping of fields to columns. Raises ConfigError for an unknown field."""
    if unknown := set(columns or {}) - set(FIELDS):
        raise ConfigError(f"unknown field {', '.join(sorted(unknown))}", expected=", ".join(FIELDS))
    return dict(columns or {})


def _is_numeric(rows: list[tuple[int, list[str]]], column: int) -> bool:
    """Return whether a column holds numbers alone, and at least one."""
    cells = [cells[column].strip() for _, cells in rows if column < len(cells)]
    return any(cells) and all(re.fullmatch(r"-?\d+(?:[.,]\d*)?", cell) for cell in cells if cell)


class _TableAudio:
    """What depends on the audio: ids, times and channels. `columns` is {field: name of its column}."""

    def __init__(
        self,
        folder: Path,
        files: AudioFiles,
        columns: Mapping[str, str | None],
        rows: list[dict[str, str]],
        names: AudioNames,
    ) -> None:
        self.folder, self.columns = folder, columns
        self.files = files
        self.names, self.channels = names, ChannelNames({value.get("channel", "") for value in rows})
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
            audio = self.files.find(path)
            length = self.files.length(audio)
            which = self.channels.channel(channel, length.channels, audio)
            placed = result.placed(audio, length, start_s, end_s, duration_s, which)
        else:
            begin, span = segment(start_s, end_s, duration_s)
            placed = {"start_s": begin, "duration_s": span}
        speaker = value.get("speaker") or None
        return placed | {"id": id, "text": value["text"], "session": session, "order": order, "speaker": speaker}


def _first_line(table: Path, text: str, delimiter: str | None) -> tuple[int, str, str]:
    """Return the line number where the table begins, the text from there on, and the delimiter.

    Excel reads a first line `sep=;` as the delimiter.
    """
    first, _, rest = text.partition("\n")
    if match := re.fullmatch(r'"?sep=(.)"?[,;\t]*', first, re.IGNORECASE):
        return 2, rest, delimiter or match[1]
    return 1, text, delimiter or _delimiter(table, first)


def _delimiter(table: Path, first: str) -> str:
    if table.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    if table.suffix.lower() == ".csv":
        # In many languages, spreadsheets write .csv with semicolons.
        return max(",;\t", key=first.count)
    best = max("\t,;|", key=first.count)
    if best not in first:
        raise CorpusError("no delimiter in the first line", where=f"{table}:1", remedy="name it with --delimiter")
    return best


def _rows(
    result: Imported, table: Path, line: int, text: str, delimiter: str, quote: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number where the row begins, cells) of every row that is not blank.

    A quote that opens a cell and ends nowhere, or inside of another row, is a finding at its own line. The rows below
    it are read without it.
    """
    if len(delimiter) != 1:
        raise ConfigError(f"delimiter {delimiter!r}", expected="one character")
    csv.field_size_limit(1 << 27)
    lines = text.splitlines(keepends=True) if "\r" not in text else re.findall(r"[^\n]*\n|[^\n]+", text)
    style: dict[str, Any] = {"delimiter": delimiter, "quoting": csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE}
    at, width = 0, 0
    while at < len(lines):
        most = LONGEST_ROW if quote and '"' in lines[at] else 1
        reader = csv.reader(lines[at : at + most], strict=True, **style)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            what = f"not a row of a table: {e}"
            if not quote or '"' not in lines[at]:
                raise CorpusError(what, where=f"{table}:{line + at}") from e
            result.finding("line", f"{table}:{line + at}", f"a quote that no quote closes: {e}", None, STRAY)
            at += 1
            continue
        swallowed = lines[at + 1 : at + reader.line_num]
        if swallowed and width > 1 and all(part.count(delimiter) == width - 1 for part in swallowed):
            what = f"a quote opens here and closes on line {line + at + len(swallowed)}, over whole rows"
            result.finding("line", f"{table}:{line + at}", what, None, STRAY)
            what = f"the quote of line {line + at} closes here: {swallowed[-1].strip()[:60]}"
            lines[at + len(swallowed)] = "\n"  # It has a stray quote, too.
            result.finding("line", f"{table}:{line + at + len(swallowed)}", what, None, STRAY)
            at += 1
            continue
        if any(c.strip() for c in cells):
            width = width or len(cells)
            yield line + at, cells
        at += reader.line_num


def _object_rows(result: Imported, source: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the names of all keys, and then (line number, their values) of every object of JSON lines."""
    entries = [(int(where.rsplit(":", 1)[1]), entry) for where, entry in result.objects(source)]
    names = list(dict.fromkeys(name for _, entry in entries for name in entry))
    yield 1, names
    for number, entry in entries:
        values = (entry.get(name) for name in names)
        cells = ["" if v is None else v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        yield number, cells


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

"""CSV and TSV tables into a manifest, by a mapping of columns.

Invariant: a row becomes one utterance or one finding, never nothing; columns that no field takes are kept in
`meta`. Exercised by `stillhouse corpus import csv TABLE CORPUS`.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..audio.read import audio_length
from ..errors import AudioError, ConfigError, CorpusError
from ..files.lines import read_text
from ..files.paths import confined, relative_audio
from .common import Imported, SessionPattern, in_session_order

# Names under which a header usually has a field; the first that is there counts.
USUAL: dict[str, tuple[str, ...]] = {
    "id": ("id", "utt", "utt_id", "uttid", "utterance", "utterance_id", "segment_id", "key"),
    "text": ("text", "transcript", "transcription", "sentence", "txt"),
    "audio": ("audio", "path", "wav", "file", "filename", "audio_path", "audio_filepath", "file_name"),
    "session": ("session", "session_id", "chapter", "chapter_id", "conversation", "conversation_id", "recording"),
    "speaker": ("speaker", "speaker_id", "spk", "client_id"),
    "split": ("split", "subset"),
    "start": ("start_s", "start", "offset", "begin"),
    "duration": ("duration_s", "duration", "seconds", "dur"),
    "order": ("order", "index"),
}
FIELDS = tuple(USUAL)


def import_table(
    table: Path,
    manifest: Path,
    columns: Mapping[str, str] | None = None,
    *,
    delimiter: str | None = None,
    header: bool | None = None,
    quote: bool | None = None,
    audio_root: Path | None = None,
    session_pattern: str | None = None,
    split: str | None = None,
    root: Path | None = None,
) -> Imported:
    """Read a table.

    columns: field of FIELDS -> name of a column, or its number from 1; several joined by "," are joined by "-".
    Fields that are not mapped are looked for under USUAL names. header None: there is one, unless all columns are
    given by number. delimiter None: by the suffix (.tsv, .tab: tab), else whichever splits the first line. quote
    None: double quotes quote where the delimiter is not a tab. audio_root: the folder that audio paths are relative
    to (the table's own by default). root: the folder that no path may leave. Raises CorpusError for a
    table that is not one, ConfigError for unknown columns.
    """
    given = dict(columns or {})
    if unknown := set(given) - set(FIELDS):
        raise ConfigError(f"unknown field {', '.join(sorted(unknown))}", expected=", ".join(FIELDS))
    text = read_text(table)
    delimiter = delimiter or _sniff(table, text)
    rows = list(_rows(table, text, delimiter, delimiter != "\t" if quote is None else quote))
    if header is None:
        header = not given or not all(part.isdigit() for value in given.values() for part in value.split(","))
    if not rows or (header and len(rows) == 1):
        raise CorpusError("the table has no rows", where=table)
    names = rows[0][1] if header else [f"column_{k + 1}" for k in range(max(len(cells) for _, cells in rows))]
    names = [name.strip() for name in names]
    if len(set(names)) != len(names):
        raise CorpusError("two columns have the same name", where=f"{table}:1", expected=", ".join(names))
    places = _places(table, names, given, guess=header)
    if "text" not in places:
        raise ConfigError(
            "no column holds the transcript",
            where=table,
            expected=f"one of {', '.join(names)}",
            remedy="--text-column NAME",
        )
    if "id" not in places and "audio" not in places:
        raise ConfigError(
            "no column names the utterances",
            where=table,
            expected=f"one of {', '.join(names)}",
            remedy="--id-column NAME",
        )
    taken = {k for ks in places.values() for k in ks}
    pattern = SessionPattern(session_pattern) if session_pattern else None
    folder = audio_root or table.parent
    result = Imported()
    for number, cells in rows[1:] if header else rows:
        where = f"{table}:{number}"
        if len(cells) != len(names):
            result.finding("line", where, f"{len(cells)} columns, expected {len(names)} ({', '.join(names)})")
            continue
        value = {f: "-".join(cells[k].strip() for k in ks) for f, ks in places.items()}
        meta = {names[k]: cells[k] for k in range(len(names)) if k not in taken and cells[k] != ""}
        try:
            fields, order = _fields(value, meta, folder, manifest, pattern, split, root)
        except (CorpusError, ValueError) as e:
            result.refused(where, e if isinstance(e, CorpusError) else CorpusError(str(e)), value.get("id"))
        else:
            result.make(where, order, **fields)
    result.utterances = in_session_order(result)
    return result


def _fields(
    value: dict[str, str],
    meta: dict[str, str],
    folder: Path,
    manifest: Path,
    pattern: SessionPattern | None,
    split: str | None,
    root: Path | None,
) -> tuple[dict[str, Any], str]:
    """The fields of an utterance, and its order in its session."""
    audio = confined(folder / value["audio"], root) if value.get("audio") else None
    id = value.get("id") or (audio.stem if audio else "")
    session, order = value.get("session") or None, value.get("order", "")
    if pattern is not None:
        session, order = pattern.read(id, session, order)
    start_s = float(value["start"]) if value.get("start") else 0.0
    duration_s = float(value["duration"]) if value.get("duration") else None
    if audio is not None and duration_s is None:
        duration_s = round(audio_length(audio) - start_s, 6)
    elif audio is not None and not os.path.isfile(audio):
        raise AudioError("no such audio file", where=audio)
    fields = {
        "id": id,
        "text": value["text"],
        "audio": relative_audio(audio, manifest) if audio is not None else None,
        "start_s": start_s,
        "duration_s": duration_s,
        "session": session,
        "speaker": value.get("speaker") or None,
        "split": value.get("split") or split,
        "meta": meta,
    }
    return fields, order


def _sniff(table: Path, text: str) -> str:
    if table.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    first = text.split("\n", 1)[0]
    if table.suffix.lower() == ".csv":
        # Spreadsheets of half the world write .csv with semicolons.
        return ";" if first.count(";") > first.count(",") else ","
    found = {d: first.count(d) for d in "\t,;|"}
    best = max(found, key=lambda d: found[d])
    if not found[best]:
        raise CorpusError("no delimiter in the first line", where=f"{table}:1", remedy="name it with --delimiter")
    return best


def _rows(table: Path, text: str, delimiter: str, quote: bool) -> Iterator[tuple[int, list[str]]]:
    """(line number where the row begins, cells) of every row that is not blank."""
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
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise CorpusError(f"not a table: {e}", where=f"{table}:{reader.line_num}") from e
        if cells and any(c.strip() for c in cells):
            yield line, cells
        line = reader.line_num + 1


def _places(table: Path, names: list[str], given: dict[str, str], guess: bool) -> dict[str, list[int]]:
    """Which columns make up each field."""
    places: dict[str, list[int]] = {}
    for field, value in given.items():
        places[field] = []
        for part in [value] if value in names else value.split(","):
            part = part.strip()
            if part in names:
                places[field].append(names.index(part))
            elif re.fullmatch(r"[1-9]\d*", part) and int(part) <= len(names):
                places[field].append(int(part) - 1)
            else:
                raise ConfigError(
                    f"no column {part!r} for --{field}-column",
                    where=table,
                    expected=f"one of {', '.join(names)}",
                )
    if guess:
        folded = [name.casefold() for name in names]
        taken = {k for ks in places.values() for k in ks}
        for field in FIELDS:
            usual = (folded.index(n) for n in USUAL[field] if n in folded)
            if field not in places and (k := next((k for k in usual if k not in taken), None)) is not None:
                places[field] = [k]
    return places

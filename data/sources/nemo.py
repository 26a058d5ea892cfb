"""NeMo manifests: JSON lines of audio_filepath, duration, text and, for parts of longer files, offset.

Invariant: a line becomes one utterance or one finding. Where a file is used by several lines it is a session, in the
order of the offsets; where none is, sessions are unknown. Exercised by `stillhouse corpus import nemo`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AudioError, CorpusError
from ..files.lines import scan_objects
from ..files.paths import relative_audio
from .audio_files import AudioFiles, above
from .common import Imported, SessionPattern, by_time, in_session_order, inside, is_seconds, meta_of

IDS = ("id", "utt_id", "uttid", "utterance_id", "audio_id")
TAKEN = {*IDS, "audio_filepath", "offset", "duration", "text", "speaker", "session", "split"}


def import_nemo(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    *,
    root: Path | None = None,
    audio_root: Path | None = None,
    session_pattern: str | None = None,
    text_key: str = "text",
) -> Imported:
    """Read manifests: (split or None, file), plain or gzip.

    Relative paths begin in the manifest's folder, or in audio_root. An id is the line's own, else the name of its
    file, with the offset in milliseconds where files are shared. text_key: the key of the transcript.
    """
    pattern = SessionPattern(session_pattern) if session_pattern else None
    result = Imported()
    for split, source in sources:
        names = _Names(source)
        places = AudioFiles([audio_root] if audio_root else [source.absolute().parent, *above(source.parent)], root)
        for number, entry in scan_objects(source):
            where = f"{source}:{number}"
            if isinstance(entry, CorpusError):
                result.error("encoding" if "UTF-8" in entry.what else "line", where, entry)
                continue
            try:
                fields, order = _fields(entry, names, places, manifest, pattern, text_key, result)
            except CorpusError as e:
                result.refused(where, e, names.id(entry))
            else:
                own = entry.get("split")
                result.make(where, order, split=split or (own if isinstance(own, str) else None), **fields)
    result.utterances = in_session_order(result)
    return result


class _Names:
    """Ids and sessions that the lines of one manifest get; one look at all of them decides."""

    def __init__(self, source: Path) -> None:
        self._uses: dict[str, int] = {}
        self._stems: dict[str, str | None] = {}
        for _, entry in scan_objects(source):
            path = entry.get("audio_filepath") if isinstance(entry, dict) else None
            if isinstance(path, str):
                self._uses[path] = self._uses.get(path, 0) + 1
                if self._stems.setdefault(_stem(path), path) != path:
                    self._stems[_stem(path)] = None
        self.shared = any(n > 1 for n in self._uses.values())

    def name(self, path: str) -> str:
        """A name of the file: its stem, or all of its path where two files have that."""
        stem = _stem(path)
        return stem if self._stems.get(stem) is not None else os.path.splitext(os.path.normpath(path))[0].strip("./")

    def id(self, entry: dict[str, Any]) -> str | None:
        for key in IDS:
            if isinstance(entry.get(key), (str, int)):
                return str(entry[key])
        path = entry.get("audio_filepath")
        if not isinstance(path, str) or not _stem(path):
            return None
        offset = entry.get("offset")
        if self._uses.get(path, 0) < 2 or not is_seconds(offset):
            return self.name(path)
        return f"{self.name(path)}-{round(offset * 1000):08d}"


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _fields(
    entry: dict[str, Any],
    names: _Names,
    places: AudioFiles,
    manifest: Path,
    pattern: SessionPattern | None,
    text_key: str,
    result: Imported,
) -> tuple[dict[str, Any], str]:
    audio, text, id = entry.get("audio_filepath"), entry.get(text_key), names.id(entry)
    if not isinstance(audio, str) or id is None:
        raise CorpusError("no audio_filepath", expected="a text", remedy="mend or delete the line")
    if not isinstance(text, str):
        raise CorpusError(f"no {text_key}", expected="the transcript as a text", remedy="mend it, or say --text-key")
    offset, length = entry.get("offset"), entry.get("duration")
    for name, value in (("offset", offset), ("duration", length)):
        if value is not None and not is_seconds(value):
            raise CorpusError(f"{name} is {str(value)[:40]!r}", expected="seconds")
    if "shard_id" in entry:
        raise AudioError("a line of a tarred data set", where=audio, remedy="unpack the tar files and take their list")
    path = places.find(audio)
    seconds = places.length(path)[0]
    begin = float(offset or 0.0)
    end = seconds if length is None else begin + float(length)
    session = names.name(audio) if names.shared else None
    order = by_time(begin)
    if isinstance(entry.get("session"), (str, int)):
        session, order = str(entry["session"]), ""
    if pattern is not None:
        session, order = pattern.read(id, session, order if session else "")
    speaker = entry.get("speaker")
    fields = {
        "id": id,
        "text": text,
        "audio": relative_audio(path, manifest),
        "start_s": begin,
        "duration_s": inside(begin, end, seconds, path, result),
        "session": session,
        "speaker": str(speaker) if isinstance(speaker, (str, int)) and speaker != "" else None,
        "meta": meta_of(entry, TAKEN | {text_key}, result),
    }
    return fields, order

"""NeMo manifests: JSON lines of audio_filepath, duration, text and, for parts of longer files, offset.

Guarantees: a line is one utterance or one finding. If several lines use one file, files are sessions, in the order
of the offsets. Otherwise sessions are unknown.
Try: `stillhouse corpus import nemo train_manifest.json corpus.jsonl`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import AudioError, CorpusError
from ..files.lines import scan_objects
from .audio_files import AudioFiles
from .common import Imported, as_text, by_time, is_seconds

IDS = ("id", "utt_id", "uttid", "utterance_id", "audio_id")
USED = {*IDS, "audio_filepath", "offset", "duration", "text", "speaker", "session", "split"}


def import_nemo(
    sources: Sequence[tuple[str | None, Path]], manifest: Path, *, text_key: str = "text", **settings: Any
) -> Imported:
    """Read manifests, plain or gzip, given as (split or None, file). `settings` are those of `Imported`.

    An id is the line's own, else the name of its file, with the offset in milliseconds if lines share files. Without
    `audio_root`, relative paths start in the manifest's folder.
    """
    result = Imported(manifest, **settings)
    for split, source in sources:
        names = LineIds(scan_objects(source))
        files = result.files(source.parent, source.absolute().parent)
        for where, entry in result.objects(source):
            with result.line(where, names.id(entry)):
                own = entry.get("split")
                fields = _fields(entry, names, files, text_key, result)
                result.add(where, split=split or (own if isinstance(own, str) else None), **fields)
    return result.in_session_order()


class LineIds:
    """The ids and sessions of the lines of one manifest. A first pass over all lines decides them."""

    def __init__(self, entries: Iterable[tuple[int, dict[str, Any] | CorpusError]]) -> None:
        paths = (e.get("audio_filepath") for _, e in entries if isinstance(e, dict))
        self._uses = Counter(path for path in paths if isinstance(path, str))
        self._stems = Counter(map(_stem, self._uses))
        self.shared = any(n > 1 for n in self._uses.values())

    def name(self, path: str) -> str:
        """Return the stem of a file, or all of its path if two files have that stem."""
        stem = _stem(path)
        return stem if self._stems[stem] == 1 else os.path.splitext(os.path.normpath(path))[0].strip("./")

    def id(self, entry: dict[str, Any]) -> str | None:
        """Return the id of a line, or None if it has neither id nor audio."""
        for key in IDS:
            if isinstance(entry.get(key), (str, int)):
                return str(entry[key])
        path, offset = entry.get("audio_filepath"), entry.get("offset")
        if not isinstance(path, str) or not _stem(path):
            return None
        if self._uses[path] < 2 or not is_seconds(offset):
            return self.name(path)
        return f"{self.name(path)}-{round(offset * 1000):08d}"


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _fields(
    entry: dict[str, Any], names: LineIds, files: AudioFiles, text_key: str, result: Imported
) -> dict[str, Any]:
    """Return the arguments of `Imported.add` for a line."""
    audio, text, id = entry.get("audio_filepath"), entry.get(text_key), names.id(entry)
    if not isinstance(audio, str) or id is None:
        raise CorpusError("no audio_filepath", expected="a text")
    if not isinstance(text, str):
        what, remedy = f"no {text_key}", "correct the line, or name the key with --text-key"
        raise CorpusError(what, expected="the transcript as a text", remedy=remedy)
    offset, length = entry.get("offset"), entry.get("duration")
    for name, value in (("offset", offset), ("duration", length)):
        if value is not None and not is_seconds(value):
            raise CorpusError(f"{name} is {str(value)[:40]!r}", expected="seconds")
    if "shard_id" in entry:
        remedy = "unpack the tar files and import their list"
        raise AudioError("a line of a tarred data set", where=audio, remedy=remedy)
    path = files.find(audio)
    seconds = files.length(path)[0]
    begin = float(offset or 0.0)
    end = seconds if length is None else begin + float(length)
    session, order = names.name(audio) if names.shared else None, by_time(begin)
    if isinstance(entry.get("session"), (str, int)):
        session, order = str(entry["session"]), ""
    session, order = result.session(id, session, order if session else "")
    return {
        "id": id,
        "order": order,
        "text": text,
        "audio": path,
        "start_s": begin,
        "duration_s": result.duration(begin, end, seconds, path),
        "session": session,
        "speaker": as_text(entry.get("speaker")),
        "meta": result.meta(entry, USED | {text_key}),
    }

"""NeMo manifests: JSON lines of audio_filepath, duration, text and, for parts of longer files, offset.

Guarantees: a line is one utterance or one finding. If several lines use one file, files are sessions, in the order
of the offsets. Otherwise sessions are unknown.
Try: `stillhouse corpus import nemo train_manifest.json corpus.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..audio.channels import ChannelNames
from ..errors import AudioError, CorpusError
from ..files.lines import scan_objects
from .audio_files import AudioFiles
from .columns.names import AudioNames, stem
from .columns.times import TIMES, seconds
from .common import Imported, as_text, by_time, is_seconds

IDS = ("id", "utt_id", "uttid", "utterance_id", "audio_id")
NEMO_TIMES = {"start": "offset", "end": "end", "duration": "duration"}
CHANNELS = ("channel_selector", "channel")
USED = {*IDS, *CHANNELS, "audio_filepath", "text", "speaker", "session", "split"}


def import_nemo(
    sources: Sequence[tuple[str | None, Path]], manifest: Path, *, text_key: str = "text", **settings: Any
) -> Imported:
    """Read manifests, plain or gzip, given as (split or None, file). `settings` are those of `Imported`.

    An id is the line's own, else the name of its file, or its path if two files of the import have that name. The
    offset in milliseconds is added if lines share files. Without `audio_root`, relative paths start in the manifest's
    folder.
    """
    result = Imported(manifest, **settings)
    ids = LineIds()
    for _, source in sources:
        ids.see(source, scan_objects(source))
    for split, source in sources:
        files = result.files(source.parent, source.absolute().parent)
        warned: set[tuple[str, ...]] = set()
        for where, entry in result.objects(source):
            with result.line(where, ids.id(entry, source)):
                own = entry.get("split")
                fields = _fields(where, entry, source, ids, files, text_key, warned, result)
                result.add(where, split=split or (own if isinstance(own, str) else None), **fields)
    return result.in_session_order()


class LineIds:
    """The ids, sessions and channels of the lines of manifests that are read together. `see` all of them first."""

    def __init__(self) -> None:
        self._names = AudioNames()
        self._sharing: set[Path] = set()
        self.channels: dict[Path, ChannelNames] = {}

    def see(self, source: Path, entries: Iterable[tuple[int, dict[str, Any] | CorpusError]]) -> None:
        """Look at all lines of a manifest before any is imported."""
        channels: set[str] = set()
        for _, entry in entries:
            if not isinstance(entry, dict):
                continue
            channels |= {str(entry[key]) for key in CHANNELS[1:] if entry.get(key) is not None}
            path = entry.get("audio_filepath")
            if isinstance(path, str) and stem(path):
                self._names.see(source.absolute().parent, path, _start(entry))
                if self._names.shared(source.absolute().parent, path):
                    self._sharing.add(source)
        self.channels[source] = ChannelNames(channels)

    def session(self, path: str, source: Path) -> str | None:
        """Return the session of a file: its name, if lines of the manifest share files."""
        return self._names.name(source.absolute().parent, path) if source in self._sharing else None

    def id(self, entry: dict[str, Any], source: Path) -> str | None:
        """Return the id of a line of a manifest. None: it has neither id nor audio."""
        for key in IDS:
            if isinstance(entry.get(key), (str, int)):
                return str(entry[key])
        path = entry.get("audio_filepath")
        if not isinstance(path, str) or not stem(path):
            return None
        channel = next((str(entry[key]) for key in CHANNELS if entry.get(key) is not None), None)
        return self._names.id(source.absolute().parent, path, _start(entry), channel)


def _time(entry: dict[str, Any], field: str) -> tuple[str | None, Any]:
    """Return (key, value) of a time of a line, by its usual names."""
    keys = (NEMO_TIMES[field], *TIMES[field])
    return next(((key, entry[key]) for key in keys if entry.get(key) is not None), (None, None))


def _start(entry: dict[str, Any]) -> float | None:
    """Return the start of a line in seconds, and None if it has none that can be read."""
    key, value = _time(entry, "start")
    return seconds(value, key) if key is not None and is_seconds(value) else None


def _fields(
    where: str,
    entry: dict[str, Any],
    source: Path,
    ids: LineIds,
    files: AudioFiles,
    text_key: str,
    warned: set[tuple[str, ...]],
    result: Imported,
) -> dict[str, Any]:
    """Return the arguments of `Imported.add` for a line."""
    audio, text, id = entry.get("audio_filepath"), entry.get(text_key), ids.id(entry, source)
    if not isinstance(audio, str) or id is None:
        raise CorpusError("no audio_filepath", expected="a text")
    if not isinstance(text, str):
        what, remedy = f"no {text_key}", "correct the line, or name the key with --text-key"
        raise CorpusError(what, expected="the transcript as a text", remedy=remedy)
    times, read = dict[str, float | None](), dict[str, str | None]()
    for field in TIMES:
        key, value = _time(entry, field)
        if value is not None and not is_seconds(value):
            raise CorpusError(f"{key} is {str(value)[:40]!r}", expected="seconds")
        read |= {field: key} if key is not None else {}
        times[field] = None if key is None else seconds(value, key)
    if "shard_id" in entry:
        remedy = "unpack the tar files and import their list"
        raise AudioError("a line of a tarred data set", where=audio, remedy=remedy)
    keys = [key for key in entry if key not in USED and key != text_key and (key, *read) not in warned]
    warned |= {(key, *read) for key in keys}
    result.unread_times(where, keys, read, lambda name: is_seconds(entry[name]), "rename the key to")
    path = files.find(audio)
    length = files.length(path)
    channel = _channel(entry, ids.channels[source], length.channels, path)
    placed = result.placed(path, length, times["start"], times["end"], times["duration"], channel)
    session, order = ids.session(audio, source), by_time(placed["start_s"])
    if isinstance(entry.get("session"), (str, int)):
        session, order = str(entry["session"]), ""
    session, order = result.session(id, session, order if session else "")
    used = {*USED, text_key, *(key for key in read.values() if key)}
    speaker = as_text(entry.get("speaker"))
    meta = result.meta(entry, used)
    return {"id": id, "order": order, "text": text, "session": session, "speaker": speaker, "meta": meta} | placed


def _channel(entry: dict[str, Any], names: ChannelNames, channels: int, path: Path) -> int | None:
    """Return the channel of a line. NeMo's channel_selector counts from 0."""
    selector = entry.get(CHANNELS[0])
    if isinstance(selector, list):
        if sorted(map(str, selector)) != sorted(map(str, range(channels))):
            raise AudioError(f"channels {str(selector)[:60]} together", where=path, expected="one, or all of the file")
        return None
    if selector is not None:
        return ChannelNames((), first=0).channel(str(selector), channels, path)
    name = entry.get(CHANNELS[1])
    return names.channel(None if name is None else str(name), channels, path)

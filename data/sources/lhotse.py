"""Lhotse manifests, read as JSON lines: cuts, or recordings and supervisions.

Guarantees: a supervision is one utterance, at its own segment of its recording, or one finding. A supervision that
several cuts show is imported once. What changes the sound (speed, mixing, noise) is a finding.
Try: `stillhouse corpus import lhotse cuts.jsonl.gz corpus.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AudioError, CorpusError
from ..files.lines import scan_objects
from .audio_files import AudioLength
from .common import Imported, by_time, is_seconds
from .entries.find import WavEntries

HARMLESS = {"Resample"}  # `corpus features` resamples in any case.
USED = {"id", "recording_id", "start", "duration", "channel", "text", "speaker", "custom", "alignment"}
CUTS = ("MonoCut", "MultiCut", "Cut")
SAVE = "save the cuts' audio with Lhotse first (cuts.save_audios)"


class _Recording(NamedTuple):
    """The files of a recording: {channel: (file, channel of the file, or None if it has one)}."""

    id: str
    channels: dict[int, tuple[Path, int | None]]
    length: AudioLength  # of the shortest file


def import_lhotse(sources: Sequence[tuple[str | None, Path]], manifest: Path, **settings: Any) -> Imported:
    """Read a CutSet alone, or a RecordingSet and a SupervisionSet. `sources` are (split or None, file of JSON lines).

    If a recording has several supervisions, recordings are sessions, in the order of time. Else sessions are unknown.
    Without `audio_root`, relative paths start in the file's folder.
    """
    result = Imported(manifest, **settings)
    kinds = [(split, source, _kind(source)) for split, source in sources]
    sessions = _several(source for _, source, kind in kinds if kind != "recordings")
    recordings: dict[str, _Recording | AudioError] = {}
    for split, source, kind in sorted(kinds, key=lambda item: item[2] != "recordings"):
        # Cuts bring their own recordings, whose ids other files may have for other audio.
        reader = _LhotseReader(source, split, sessions, {} if kind == "cuts" else recordings, result)
        for where, entry in result.objects(source):
            if kind == "recordings":
                reader.recording(entry, where)
            elif kind == "supervisions":
                reader.supervision(entry, where, 0.0, None)
            else:
                reader.cut(entry, where)
    unused = [e for e in recordings.values() if isinstance(e, AudioError)]
    if unused and not result.findings:
        result.note(f"{len(unused)} recordings cannot be read, but no supervision uses them")
    return result.in_session_order()


def _kind(source: Path) -> str:
    """Return "cuts", "recordings" or "supervisions", by the first line that can be read."""
    for number, entry in scan_objects(source):
        if isinstance(entry, CorpusError):
            continue
        if entry.get("type") in (*CUTS, "MixedCut", "PaddingCut") or "supervisions" in entry:
            return "cuts"
        if "sources" in entry:
            return "recordings"
        if "recording_id" in entry:
            return "supervisions"
        what, where = "neither a cut nor a recording nor a supervision", f"{source}:{number}"
        raise CorpusError(what, where=where, expected="JSON lines of Lhotse, as .to_file('….jsonl.gz') writes them")
    raise CorpusError("the file holds no line that Lhotse writes", where=source)


def _several(sources: Iterator[Path]) -> bool:
    """Return whether any recording has more than one supervision."""
    first: dict[str, str] = {}
    for source in sources:
        for _, entry in scan_objects(source):
            if isinstance(entry, CorpusError):
                continue
            listed = entry.get("supervisions")
            for item in listed if isinstance(listed, list) else [entry]:
                if isinstance(item, dict):
                    recording, id = str(item.get("recording_id")), str(item.get("id"))
                    if first.setdefault(recording, id) != id:
                        return True
    return False


class _LhotseReader:
    """The lines of one file. `recordings` are those that are known by their ids."""

    def __init__(
        self,
        source: Path,
        split: str | None,
        sessions: bool,
        recordings: dict[str, _Recording | AudioError],
        result: Imported,
    ) -> None:
        self.split, self.sessions, self.recordings, self.result = split, sessions, recordings, result
        self.entries = WavEntries(result, result.files(source.parent, source.absolute().parent))
        self.source = source
        self.sources: dict[str, Any] = {}
        self.segments: dict[str, tuple[float, float]] = {}

    def recording(self, entry: dict[str, Any], where: str) -> None:
        """Read a recording. An error counts when a supervision uses it."""
        id = entry.get("id")
        if not isinstance(id, str):
            self.result.finding("line", where, "a recording without an id")
            return
        before = self.recordings.get(id)
        try:
            self.recordings[id] = found = self._read(id, entry)
            if isinstance(before, _Recording) and before.channels != found.channels:
                remedy = "import each set with a command of its own"
                raise AudioError(f"two recordings with other audio have the id {id}", where=where, remedy=remedy)
        except AudioError as e:
            self.recordings[id] = AudioError(e.what, where=e.where or where, expected=e.expected, remedy=e.remedy)

    def _read(self, id: str, entry: dict[str, Any]) -> _Recording:
        transforms = entry.get("transforms") or []
        for transform in transforms if isinstance(transforms, list) else [transforms]:
            name = transform.get("name") if isinstance(transform, dict) else transform
            if name not in HARMLESS:
                what = f"the recording is transformed by {str(name)[:40]}"
                raise AudioError(what, expected="audio as it is in files", remedy=SAVE)
        channels: dict[int, tuple[Path, int | None]] = {}
        shortest: AudioLength | None = None
        listed = entry.get("sources")
        for source in listed if isinstance(listed, list) else []:
            if not isinstance(source, dict) or not isinstance(source.get("source"), str):
                raise AudioError("a source that names no file")
            kind, text = source.get("type"), source["source"]
            if kind == "file":
                path, only = self.entries.files.find(text), None
            elif kind == "command":
                path, only = self.entries.pipe(id, text)
            else:
                raise AudioError(f"a source of type {str(kind)[:40]}", expected="file, or command", remedy=SAVE)
            length = self.entries.files.length(path)
            count = length.channels
            shortest = length if shortest is None or length.seconds < shortest.seconds else shortest
            numbers = source.get("channels")
            numbers = numbers if isinstance(numbers, list) and numbers else list(range(count))
            for k, channel in enumerate(numbers):
                if not isinstance(channel, int) or k >= count:
                    raise AudioError(f"channels {str(numbers)[:60]}, but the file has {count}", where=path)
                channels[channel] = path, (k if count > 1 else None) if only is None else only
        if shortest is None:
            raise AudioError("a recording without sources", expected="sources of type file")
        return _Recording(id, channels, shortest)

    def cut(self, cut: dict[str, Any], where: str) -> None:
        """Read the recording and the supervisions of a cut."""
        kind, id = cut.get("type", "Cut"), cut.get("id")
        name = id if isinstance(id, str) else None
        if kind not in CUTS:
            what = "mixes several cuts" if kind == "MixedCut" else "is no segment of a recording"
            self.result.finding("line", where, f"a {str(kind)[:40]} {what}", name, "save its audio with Lhotse first")
            return
        recording, start, listed = cut.get("recording"), cut.get("start", 0), cut.get("supervisions")
        if not isinstance(recording, dict) or not isinstance(recording.get("id"), str):
            self.result.finding("audio", where, "a cut without a recording (of features alone?)", name)
            return
        if not is_seconds(start):
            self.result.finding("line", where, f"start is {str(start)[:40]!r}, expected seconds", name)
            return
        if not isinstance(listed, list) or not listed:
            self.result.finding("empty-text", where, "a cut without supervisions", name, "transcribe it or delete it")
            return
        if recording["id"] not in self.recordings or self.sources[recording["id"]] != recording.get("sources"):
            self.sources[recording["id"]] = recording.get("sources")
            self.recording(recording, where)
        for item in listed:
            if isinstance(item, dict):
                self.supervision({**item, "recording_id": recording["id"]}, where, float(start), cut.get("channel"))
            else:
                self.result.finding("line", where, "a supervision that is no object", name)

    def supervision(self, item: dict[str, Any], where: str, offset_s: float, channel: Any) -> None:
        """Add a supervision. `offset_s` is where its cut begins in the recording, `channel` the one of the cut."""
        id = item.get("id") if isinstance(item.get("id"), str) else None
        with self.result.line(where, id):
            self._add(id, item, where, offset_s, channel)

    def _add(self, id: str | None, item: dict[str, Any], where: str, offset_s: float, channel: Any) -> None:
        begin, length = item.get("start"), item.get("duration")
        if id is None or not isinstance(item.get("text"), str):
            raise CorpusError("a supervision without a text" if id else "a supervision without an id")
        if not is_seconds(begin) or not is_seconds(length):
            raise CorpusError(f"start {str(begin)[:40]!r}, duration {str(length)[:40]!r}", expected="seconds")
        recording = self.recordings.get(str(item.get("recording_id")))
        if recording is None:
            raise CorpusError(f"recording {item.get('recording_id')} is not known", remedy="import its file too")
        if isinstance(recording, AudioError):
            raise recording
        place = round(offset_s + float(begin), 6), length
        if self.segments.get(id) == place:
            self.result.note("supervisions that several cuts show are imported once")
            return
        path, own = _channel(recording, channel if item.get("channel") is None else item["channel"])
        # A cut's edges are rounded to samples, and with them a start of 0.
        start_s = 0.0 if -1e-3 < place[0] < 0 else place[0]
        placed = self.result.placed(path, recording.length, start_s, duration=float(length), channel=own)
        session, order = None, ""
        if self.sessions:
            session, order = self.result.recording(recording.id, path, self.source, self.split), by_time(start_s)
        session, order = self.result.session(id, session, order)
        self.segments[id] = place
        custom, speaker = item.get("custom"), item.get("speaker")
        meta = self.result.meta(item, USED)
        self.result.add(
            where,
            order,
            id=id,
            text=item["text"],
            session=session,
            speaker=speaker if isinstance(speaker, str) and speaker else None,
            split=self.split,
            meta=meta | self.result.meta(custom if isinstance(custom, dict) else {}, (), "custom "),
            **placed,
        )


def _channel(recording: _Recording, asked: Any) -> tuple[Path, int | None]:
    """Return the file that holds the channels, and which one of its channels (None: the mean of all)."""
    numbers = asked if isinstance(asked, list) else [0 if asked is None else asked]
    if len(numbers) == 1:
        if not isinstance(numbers[0], int) or numbers[0] not in recording.channels:
            raise CorpusError(f"no channel {str(numbers[0])[:20]}", expected=f"one of {sorted(recording.channels)}")
        return recording.channels[numbers[0]]
    files = {path for path, _ in recording.channels.values()}
    if len(files) == 1 and set(map(str, numbers)) == set(map(str, recording.channels)):
        return files.pop(), None
    raise CorpusError(f"channels {str(numbers)[:60]} together", expected="one channel, or all channels of one file")

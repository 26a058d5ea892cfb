"""Lhotse's manifests, read as the JSON lines that they are: cuts, or recordings and supervisions.

Invariant: a supervision becomes one utterance, at its own stretch of its recording, or one finding; one that several
cuts show comes in once. What changes the sound (speed, mixing, noise) is refused by name, never left out silently.
Exercised by `stillhouse corpus import lhotse cuts.jsonl.gz corpus.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AudioError, CorpusError
from ..files.lines import scan_objects
from ..files.paths import relative_audio
from .audio_files import AudioFiles, Unpacked, above
from .common import Imported, SessionPattern, by_time, in_session_order, inside, is_seconds, meta_of
from .kaldi_entries import Entries

HARMLESS = {"Resample"}  # `corpus features` resamples whatever comes
TAKEN = {"id", "recording_id", "start", "duration", "channel", "text", "speaker", "custom", "alignment"}
CUTS = ("MonoCut", "MultiCut", "Cut")


@dataclass(frozen=True, slots=True)
class _Recording:
    """Files of a recording by its channels: channel -> (file, channel of the file, or None where it has one)."""

    id: str
    channels: dict[int, tuple[Path, int | None]]
    seconds: float


def import_lhotse(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    *,
    root: Path | None = None,
    audio_root: Path | None = None,
    allow_pipes: bool = False,
    session_pattern: str | None = None,
) -> Imported:
    """Read (split or None, file): a CutSet alone, or a RecordingSet and a SupervisionSet; JSONL, gzip or not.

    A recording with several supervisions makes recordings sessions, in the order of time; where none has, sessions are
    unknown. allow_pipes: run the commands of sources of type `command` that do more than decode a file.
    """
    pattern = SessionPattern(session_pattern) if session_pattern else None
    result = Imported()
    unpacked = Unpacked(manifest)
    kinds = [(split, source, _kind(source)) for split, source in sources]
    sessions = _several(source for _, source, kind in kinds if kind != "recordings")
    known: dict[str, _Recording | AudioError] = {}
    for split, source, kind in sorted(kinds, key=lambda item: item[2] != "recordings"):
        places = AudioFiles([audio_root] if audio_root else [source.absolute().parent, *above(source.parent)], root)
        reader = _LhotseReader(
            Entries(result, places, unpacked, root, allow_pipes), known, sessions, manifest, pattern, split, result
        )
        for number, entry in scan_objects(source):
            where = f"{source}:{number}"
            if isinstance(entry, CorpusError):
                result.error("encoding" if "UTF-8" in entry.what else "line", where, entry)
            elif kind == "recordings":
                reader.recording(entry, where)
            elif kind == "supervisions":
                reader.supervision(entry, where, 0.0, None)
            else:
                reader.cut(entry, where)
    unused = [e for e in known.values() if isinstance(e, AudioError)]
    if unused and not result.findings:
        result.note(f"{len(unused)} recordings that cannot be read are used by no supervision")
    result.utterances = in_session_order(result)
    return result


def _kind(source: Path) -> str:
    for number, entry in scan_objects(source):
        if isinstance(entry, CorpusError):
            continue
        if entry.get("type") in (*CUTS, "MixedCut", "PaddingCut") or "supervisions" in entry:
            return "cuts"
        if "sources" in entry:
            return "recordings"
        if "recording_id" in entry:
            return "supervisions"
        raise CorpusError(
            "neither a cut nor a recording nor a supervision",
            where=f"{source}:{number}",
            expected="JSON lines of Lhotse, as .to_file('….jsonl.gz') writes them",
        )
    raise CorpusError("nothing in it that Lhotse would have written", where=source)


def _several(sources: Iterator[Path]) -> bool:
    """Whether any recording has more than one supervision."""
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
    def __init__(
        self,
        entries: Entries,
        known: dict[str, _Recording | AudioError],
        sessions: bool,
        manifest: Path,
        pattern: SessionPattern | None,
        split: str | None,
        result: Imported,
    ) -> None:
        self.entries, self.known, self.sessions, self.manifest = entries, known, sessions, manifest
        self.pattern, self.split, self.result = pattern, split, result
        self.stretches: dict[str, tuple[float, float]] = {}

    def recording(self, entry: dict[str, Any], where: str) -> None:
        id = entry.get("id")
        if not isinstance(id, str):
            self.result.finding("line", where, "a recording without an id")
            return
        try:
            self.known[id] = self._read(id, entry)
        except AudioError as e:
            self.known[id] = AudioError(e.what, where=e.where or where, expected=e.expected, remedy=e.remedy)

    def _read(self, id: str, entry: dict[str, Any]) -> _Recording:
        transforms = entry.get("transforms") or []
        for transform in transforms if isinstance(transforms, list) else [transforms]:
            name = transform.get("name") if isinstance(transform, dict) else transform
            if name not in HARMLESS:
                raise AudioError(
                    f"the recording is transformed by {str(name)[:40]}",
                    expected="audio as it lies in files",
                    remedy="save the cuts' audio with Lhotse first (cuts.save_audios)",
                )
        channels: dict[int, tuple[Path, int | None]] = {}
        seconds = float("inf")
        listed = entry.get("sources")
        for source in listed if isinstance(listed, list) else []:
            if not isinstance(source, dict) or not isinstance(source.get("source"), str):
                raise AudioError("a source that names no file")
            kind, text = source.get("type"), source["source"]
            if kind == "file":
                path, only = self.entries.places.find(text), None
            elif kind == "command":
                path, only = self.entries.pipe(id, text)
            else:
                raise AudioError(
                    f"a source of type {str(kind)[:40]}",
                    expected="file, or command",
                    remedy="save the cuts' audio with Lhotse first (cuts.save_audios)",
                )
            length, count = self.entries.places.length(path)
            seconds = min(seconds, length)
            numbers = source.get("channels")
            numbers = numbers if isinstance(numbers, list) and numbers else list(range(count))
            for k, channel in enumerate(numbers):
                if not isinstance(channel, int) or k >= count:
                    raise AudioError(f"channels {str(numbers)[:60]}, but the file has {count}", where=path)
                channels[channel] = path, (k if count > 1 else None) if only is None else only
        if not channels:
            raise AudioError("a recording without sources", expected="sources of type file")
        return _Recording(id, channels, seconds)

    def cut(self, cut: dict[str, Any], where: str) -> None:
        kind, id = cut.get("type", "Cut"), cut.get("id")
        name = id if isinstance(id, str) else None
        if kind not in CUTS:
            what = "mixes several cuts" if kind == "MixedCut" else "is no stretch of a recording"
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
        if recording["id"] not in self.known:
            self.recording(recording, where)
        for item in listed:
            if isinstance(item, dict):
                self.supervision({**item, "recording_id": recording["id"]}, where, float(start), cut.get("channel"))
            else:
                self.result.finding("line", where, "a supervision that is no object", name)

    def supervision(self, item: dict[str, Any], where: str, offset_s: float, channel: Any) -> None:
        """One supervision; offset_s: where in its recording its cut begins."""
        id = item.get("id") if isinstance(item.get("id"), str) else None
        begin, length = item.get("start"), item.get("duration")
        try:
            if id is None or not isinstance(item.get("text"), str):
                raise CorpusError("a supervision without a text" if id else "a supervision without an id")
            if not is_seconds(begin) or not is_seconds(length):
                raise CorpusError(f"start {str(begin)[:40]!r}, duration {str(length)[:40]!r}", expected="seconds")
            recording = self.known.get(str(item.get("recording_id")))
            if recording is None:
                raise CorpusError(f"recording {item.get('recording_id')} is not known", remedy="import its file too")
            if isinstance(recording, AudioError):
                raise recording
            start_s = round(offset_s + float(begin), 6)
            if self.stretches.get(id) == (start_s, length):
                self.result.note("supervisions that several cuts show are imported once")
                return
            path, own = _channel(recording, item.get("channel", channel))
            # A cut's edges are rounded to samples, and with them a start of 0.
            start_s = 0.0 if -1e-3 < start_s < 0 else start_s
            duration_s = inside(start_s, start_s + float(length), recording.seconds, path, self.result)
            session, order = (recording.id, by_time(start_s)) if self.sessions else (None, "")
            if self.pattern is not None:
                session, order = self.pattern.read(id, session, order)
        except CorpusError as e:
            self.result.refused(where, e, id)
            return
        self.stretches[id] = (start_s, length)  # type: ignore[assignment]
        custom = item.get("custom")
        speaker = item.get("speaker")
        self.result.make(
            where,
            order,
            id=id,
            text=item["text"],
            audio=relative_audio(path, self.manifest),
            start_s=start_s,
            duration_s=duration_s,
            channel=own,
            session=session,
            speaker=speaker if isinstance(speaker, str) and speaker else None,
            split=self.split,
            meta=meta_of(item, TAKEN, self.result)
            | meta_of(custom if isinstance(custom, dict) else {}, (), self.result, "custom "),
        )


def _channel(recording: _Recording, asked: Any) -> tuple[Path, int | None]:
    """The file that holds the channels, and which one of its channels (None: the mean of all)."""
    numbers = asked if isinstance(asked, list) else [0 if asked is None else asked]
    if len(numbers) == 1:
        if not isinstance(numbers[0], int) or numbers[0] not in recording.channels:
            raise CorpusError(f"no channel {str(numbers[0])[:20]}", expected=f"one of {sorted(recording.channels)}")
        return recording.channels[numbers[0]]
    files = {path for path, _ in recording.channels.values()}
    if len(files) == 1 and set(map(str, numbers)) == set(map(str, recording.channels)):
        return files.pop(), None
    raise CorpusError(f"channels {str(numbers)[:60]} together", expected="one channel, or all channels of one file")

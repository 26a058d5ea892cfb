"""What all importers share: the result with its findings, sessions from ids, and the order inside a session.

Guarantees: an id is imported once. Its second use is a finding that names both places.
Try: `stillhouse corpus import --help`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from ..audio.whole import REMEDY, SLACK_S
from ..corpus.check import Finding
from ..errors import AudioError, ConfigError, CorpusError, UsageError
from ..files.lines import scan_objects
from ..files.paths import relative_audio
from ..manifest import Utterance, describe_validation
from .audio_files import AudioFiles, AudioLength, UnpackedAudio
from .columns.times import TIMES, SegmentError, segment, unread

OVERSHOOT_S = 0.5  # A segment may end so much later than its recording. It is cut off there, as Kaldi does.


@dataclass
class Imported:
    """The settings and the result of an import. Findings are what could not be imported.

    Audio paths will be relative to the folder of `manifest`, and none may leave `root`. In lists, relative paths start
    in `audio_root`. None: the importer looks for it. `allow_pipes` runs the shell commands that stand in the place of
    audio files. `session_pattern` is a regular expression on ids, with groups `session` and perhaps `order`.
    """

    manifest: Path
    root: Path | None = None
    audio_root: Path | None = None
    allow_pipes: bool = False
    session_pattern: str | None = None
    utterances: list[Utterance] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unpacked = UnpackedAudio(self.manifest)
        self._orders: dict[str, str] = {}
        self.places: dict[str, str] = {}  # where each id was read
        self._mixed: list[str] = []
        self._whole: Counter[tuple[str, int | None]] = Counter()  # files without times, by channel
        self._recordings: dict[str, tuple[Path, set[Path]]] = {}
        try:
            self._pattern = re.compile(self.session_pattern) if self.session_pattern else None
        except re.error as e:
            what = f"the pattern is not a regular expression: {e}"
            raise ConfigError(what, where=self.session_pattern) from e
        if self._pattern is not None and "session" not in self._pattern.groupindex:
            expected = r"something like (?P<session>\d+-\d+)-(?P<order>\d+)"
            raise ConfigError("the pattern has no group `session`", where=self.session_pattern, expected=expected)

    def add(self, where: str, order: str = "", *, audio: Path | None = None, **fields: Any) -> None:
        """Add an utterance of these fields, or the finding that says why they are not one."""
        for name in ("session", "speaker", "split"):
            if isinstance(value := fields.get(name), str):
                fields[name] = sys.intern(value)  # One string serves all utterances that share it.
        if audio is not None:
            fields["audio"] = relative_audio(audio, self.manifest)
        try:
            utterance = Utterance(**fields)
        except ValidationError as e:
            id = fields.get("id")
            self.finding("line", where, describe_validation(e), id if isinstance(id, str) else None)
            return
        if utterance.id in self.places:
            what = f"the id was used before, at {self.places[utterance.id]}"
            self.finding("duplicate-id", where, what, utterance.id, "give it another id")
            return
        self.places[utterance.id] = where
        if order:
            self._orders[utterance.id] = order
        self.utterances.append(utterance)

    def finding(
        self, kind: str, where: object, what: str, id: str | None = None, remedy: str = "correct or delete the line"
    ) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, str(where), id or None, what, remedy))

    def error(self, where: str, error: CorpusError, id: str | None = None) -> None:
        """Add the error of one line as a finding."""
        kind = "encoding" if "UTF-" in error.what else "line"
        kind = "audio" if isinstance(error, AudioError) else "segment" if isinstance(error, SegmentError) else kind
        what = error.what if error.where is None or str(error.where) == where else f"{error.where}: {error.what}"
        what += f" (expected {error.expected})" if error.expected else ""
        self.finding(kind, where, what, id, error.remedy or "correct or delete the line")

    @contextmanager
    def line(self, where: str, id: str | None = None) -> Iterator[None]:
        """Turn an error of the block into a finding about one line."""
        try:
            yield
        except CorpusError as e:
            self.error(where, e, id)
        except (ValueError, OverflowError) as e:
            self.error(where, CorpusError(str(e)), id)

    def objects(self, source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (path:line, JSON object) of a file's lines. Lines that hold no object are findings."""
        for number, entry in scan_objects(source):
            if isinstance(entry, CorpusError):
                self.error(f"{source}:{number}", entry)
            else:
                yield f"{source}:{number}", entry

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def files(self, folder: Path, *first: Path) -> AudioFiles:
        """Return a finder of audio files. Relative paths start in `audio_root`, else in `first` or near `folder`."""
        folder = folder.absolute()
        near = [*first, Path.cwd(), folder, *list(folder.parents)[:4]]  # where relative paths of recipes may start
        return AudioFiles([self.audio_root] if self.audio_root else near, self.root)

    def session(self, id: str, session: str | None = None, order: str = "") -> tuple[str | None, str]:
        """Return (session, order) by the session pattern, which must match all of the id. Without one, return both."""
        if self._pattern is None:
            return session, order
        match = self._pattern.fullmatch(id)
        if match is None:
            what = f"the session pattern {self._pattern.pattern} does not match the whole id"
            raise CorpusError(what, remedy="change the pattern, or correct or delete the line")
        groups = match.groupdict()
        return groups["session"] or session, groups.get("order") or order

    def recording(self, name: str, audio: Path, source: Path, split: str | None) -> str:
        """Return the session of a recording: its name, or SPLIT/name if another source has other audio of that name."""
        owner, files = self._recordings.setdefault(name, (source, set()))
        if owner == source:
            files.add(audio)
        return name if audio in files else f"{split or source.stem}/{name}"

    def placed(
        self,
        audio: Path,
        length: AudioLength,
        start: float | None = None,
        end: float | None = None,
        duration: float | None = None,
        channel: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of `add` for a segment of a file: audio, start_s, duration_s and channel.

        Times are in seconds. The segment begins at 0 and reaches to the end of the file, where no time says otherwise.
        Raises SegmentError if it leaves the file, and AudioError if it ends where the file is cut off.
        """
        begin, span = segment(start, end, duration)
        duration_s = self.duration(begin, length.seconds if span is None else begin + span, length, audio)
        if start is None and end is None and duration is None:
            self._whole[str(audio), channel] += 1
        if channel is None and length.channels > 1:
            self._mixed.append(str(audio))
        return {"audio": audio, "start_s": begin, "duration_s": duration_s, "channel": channel}

    def unread_times(
        self,
        where: str,
        names: Collection[str],
        columns: Mapping[str, str | None],
        is_number: Callable[[str], bool],
        rename: str | None = None,
    ) -> None:
        """Name the columns, or keys, that look like times and are not read.

        One that the segment may need is a finding. `columns` is {field: column that is read, None: chosen by the user
        to be none}. `rename` begins the remedy where no option chooses a column.
        """
        known = {field for field, name in columns.items() if name is not None}
        left = [name for name in names if name not in columns.values()]
        off = {field for field, name in columns.items() if name is None}
        for name, kind in unread(left, known, off, is_number).items():
            length = known & {"end", "duration"}
            needed = {"start": "start" not in known, "end": not length, "duration": "start" in known and not length}
            if needed.get(kind):
                what = f"column {name!r} looks like a time, but it is not read"
                remedy = f"read it with --{kind}-column {name}, or keep it in meta with --{kind}-column -"
                remedy = f"{rename} {TIMES[kind][0].removesuffix('_s')}" if rename else remedy
                self.finding("column", where, what, None, remedy)
            else:
                self.note(f"{where}: column {name!r} looks like a time, but it only goes to meta")

    def duration(self, begin: float, end: float, length: AudioLength, path: Path) -> float:
        """Return the seconds of a segment of a recording.

        Raises SegmentError if it leaves the recording, and AudioError if it ends where the file is cut off.
        """
        seconds = length.seconds
        if length.flaw is not None and end > seconds - SLACK_S:
            raise AudioError(length.flaw, where=path, remedy=REMEDY)
        if not 0 <= begin < end or begin >= seconds or end > seconds + OVERSHOOT_S:
            raise SegmentError(f"the segment {begin:g}–{end:g} s is not inside {path}, which has {seconds:.3f} s")
        if end > seconds + SLACK_S:
            self.note(f"segments that end up to {OVERSHOOT_S} s after their recording end with it")
        return round(min(end, seconds) - begin, 6)

    def meta(self, fields: Mapping[str, Any], used: Container[str], prefix: str = "") -> dict[str, str]:
        """Return as texts what no field of an utterance uses. Lists and objects are left out, with a note."""
        meta = {}
        for name, value in fields.items():
            if name in used or value is None:
                continue
            if isinstance(value, (str, int, float)):
                meta[name] = value if isinstance(value, str) else json.dumps(value)
            else:
                self.note(f"{prefix}{name} is left out: it is neither text nor number")
        return meta

    def in_session_order(self) -> Imported:
        """Sort: a session stands where its first utterance was, each in its order. Return the result itself."""
        if repeated := [audio for (audio, _), uses in self._whole.items() if uses > 1]:
            self.note(
                f"several lines name the whole of one file, for example of {repeated[0]} ({len(repeated)} such files). "
                "If they are parts of it, name the columns or keys of their times"
            )
        if self._mixed:
            files = f"{len(set(self._mixed))} files with several channels, for example {self._mixed[0]}"
            self.note(
                f"no channel is named for {files}: each utterance is the mean of all channels. "
                "If the channels are speakers, give every line its `channel`"
            )
        first: dict[str, int] = {}
        for k, u in enumerate(self.utterances):
            if u.session is not None:
                first.setdefault(u.session, k)

        def key(item: tuple[int, Utterance]) -> tuple:
            k, u = item
            return (k if u.session is None else first[u.session], natural(self._orders.get(u.id, "")), k)

        self.utterances = [u for _, u in sorted(enumerate(self.utterances), key=key)]
        return self


def named_sources(sources: Sequence[str]) -> list[tuple[str | None, Path]]:
    """Return `[SPLIT=]PATH…` as (split or None, path). Raises UsageError for a path or split name that is missing."""
    pairs: list[tuple[str | None, Path]] = []
    for text in sources:
        split, _, rest = text.partition("=")
        named = bool(rest) and not Path(text).exists()
        path = Path(rest if named else text)
        if not path.exists():
            raise UsageError("no such file or folder", where=path, expected="[SPLIT=]PATH")
        if named and not split:
            raise ConfigError("a split without a name", where=text, expected="SPLIT=PATH")
        pairs.append((split if named else None, path))
    return pairs


def natural(text: str) -> tuple:
    """Return a sort key that puts a2 before a10."""
    parts = re.split(r"(\d{1,4000})", text)  # Python reads no longer integers.
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p)


def by_time(start_s: float) -> str:
    """Return a start in seconds as an order inside a session."""
    return str(round(start_s * 1e6))


def is_seconds(value: Any) -> TypeGuard[float]:
    """Return whether a value out of JSON can be a time."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def as_text(value: Any) -> str | None:
    """Return a text or a whole number as a text, and None for anything else or an empty text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Columns of whole numbers with gaps are often stored as floats.
    return str(value) if isinstance(value, (str, int)) and value != "" else None

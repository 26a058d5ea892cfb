"""What is wrong with a corpus: every line of the manifest, every file that it names.

Invariant: checking goes on after a finding; each names file, line, utterance and what to do. Exercised by
`stillhouse corpus check CORPUS`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile

from ..audio.read import SLACK_S, no_such_channel, open_audio, read_segment
from ..errors import AudioError, CorpusError
from ..files.paths import confined
from ..manifest import BadLine, Utterance, scan_manifest

# Tab and line ends count too: in a transcript they are left-overs of a table.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]|[\ud800-\udfff]")
LOST = "\ufffd"
_PLACE = re.compile(r"(?P<file>.*):(?P<line>\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """kind: a word to filter by. where: a path, or path:line. id: the utterance, where it is known."""

    kind: str
    where: str
    id: str | None
    what: str
    remedy: str

    def __str__(self) -> str:
        id = f" {self.id}:" if self.id else ""
        return f"{self.where}:{id} {self.what}; {self.remedy}"

    @property
    def file(self) -> str:
        match = _PLACE.fullmatch(self.where)
        return match["file"] if match else self.where

    @property
    def line(self) -> int | None:
        match = _PLACE.fullmatch(self.where)
        return int(match["line"]) if match else None

    def facts(self) -> dict[str, str | int | None]:
        return {**asdict(self), "file": self.file, "line": self.line}


@dataclass(frozen=True)
class Checked:
    findings: list[Finding]
    utterances: int
    files: int


def check_corpus(
    path: Path,
    *,
    rate_hz: int | None = None,
    full: bool = False,
    audio: bool = True,
    root: Path | None = None,
    tick: Callable[[int], None] | None = None,
) -> Checked:
    """Check a manifest and the audio that it names.

    rate_hz: the rate that all audio should have; None: the one that most has. full: decode every segment (otherwise
    headers, and the last tenth of a second of each segment, which finds files that are cut off). root: the folder
    that no audio path may leave. tick(lines so far).
    """
    findings: list[Finding] = []
    valid: list[tuple[str, Utterance]] = []
    path = path / "corpus.jsonl" if path.is_dir() else path
    for number, found in scan_manifest(path):
        if isinstance(found, CorpusError):
            findings.append(_bad_line(found))
        else:
            valid.append((f"{path}:{number}", found))
    if not valid and not findings:
        findings.append(
            Finding("empty", str(path), None, "the manifest is empty", "make it with `stillhouse corpus import`")
        )
    findings += _repeats(valid)
    rates: dict[str, tuple[int, str, str]] = {}
    for k, (where, u) in enumerate(valid):
        findings += (Finding(kind, where, u.id, what, remedy) for kind, what, remedy in _text(u))
        if audio and u.audio is not None:
            try:
                findings += _audio(confined(path.parent / u.audio, root), where, u, full, rates)
            except AudioError as e:
                findings.append(Finding("root", where, u.id, f"{e.where}: {e.what}", e.remedy or "mend the path"))
        if tick is not None:
            tick(k + 1)
    findings += _rates(rates, rate_hz)
    line = re.compile(r":(\d+)$")
    findings.sort(key=lambda f: int(m[1]) if (m := line.search(f.where)) else 0)
    return Checked(findings, len(valid), len(rates))


def check_features(path: Path) -> Checked:
    """Read every row of a feature file and hold it against the checksum that was written with it."""
    from ..features.file import FeatureFile

    with FeatureFile(path) as file:
        findings = [
            Finding(
                "damaged",
                str(path),
                id,
                f"the row at speed {speed:g} holds other numbers than were written",
                "delete the file and make it again with `stillhouse corpus features CORPUS FEATURES`",
            )
            for id, speed in file.damaged_rows()
        ]
        return Checked(findings, len(file.ids), 1)


def _bad_line(error: CorpusError) -> Finding:
    """What is wrong with a line that is no utterance, with the id that it would have had."""
    id = error.id if isinstance(error, BadLine) else None
    kind = "encoding" if "UTF-8" in error.what else "line"
    if id is not None and not id.strip():
        kind, id = "empty-id", None
    return Finding(kind, str(error.where), id, error.what, error.remedy or "mend or delete the line")


def _repeats(valid: list[tuple[str, Utterance]]) -> Iterator[Finding]:
    ids: dict[str, str] = {}
    stretches: dict[tuple, str] = {}
    for where, u in valid:
        first = ids.setdefault(u.id, where)
        if first is not where:
            yield Finding(
                "duplicate-id", where, u.id, f"the id was used before, at {first}", "give it another id or delete it"
            )
        if u.audio is None:
            continue
        same = stretches.setdefault((u.audio, u.start_s, u.duration_s, u.channel), where)
        if same is not where and first is where:
            yield Finding(
                "duplicate-audio", where, u.id, f"the same stretch of audio as at {same}", "delete one of the two"
            )


def _text(u: Utterance) -> Iterator[tuple[str, str, str]]:
    if not u.text.strip():
        yield "empty-text", "the transcript is empty", "transcribe it or delete the line"
    for name, value in (("text", u.text), ("id", u.id)):
        if match := CONTROL.search(value):
            code = f"U+{ord(match[0]):04X}"
            yield "control", f"{name} holds the control character {code} at {match.start()}", "delete it"
    if LOST in u.text:
        at = u.text.index(LOST)
        yield "encoding", f"text holds U+FFFD at {at}: a character was lost earlier", "restore it from the source"


def _audio(
    path: Path, where: str, u: Utterance, full: bool, rates: dict[str, tuple[int, str, str]]
) -> Iterator[Finding]:
    try:
        with open_audio(path) as file:
            own_hz, total = file.samplerate, file.frames
            rates.setdefault(str(path), (own_hz, where, u.id))
            if total == 0:
                yield Finding("audio", where, u.id, f"{path} holds no audio", "fetch it again or delete the line")
                return
            if u.channel is not None and u.channel >= file.channels:
                raise no_such_channel(u.channel, file.channels, path)
            begin = round(u.start_s * own_hz)
            end = total if u.duration_s is None else begin + round(u.duration_s * own_hz)
            if begin >= total or end > total + SLACK_S * own_hz:
                yield Finding(
                    "segment",
                    where,
                    u.id,
                    f"the segment {begin / own_hz:.3f}–{end / own_hz:.3f} s leaves {path}, {total / own_hz:.3f} s long",
                    "mend start_s and duration_s",
                )
                return
            tail = min(total, end) - int(0.1 * own_hz)
            if not full:
                count = min(total, end) - max(tail, begin)
                file.seek(max(tail, begin))
                if len(file.read(count, dtype="float32")) != count:
                    raise AudioError("the audio ends early", where=path)
        if full:
            read_segment(path, u.start_s, u.duration_s, u.channel)
    except AudioError as e:
        kind = "missing" if not os.path.exists(path) else "audio"
        yield Finding(kind, where, u.id, f"{path}: {e.what}", e.remedy or "fetch it again or delete the line")
    except (soundfile.SoundFileError, RuntimeError) as e:
        why = getattr(e, "error_string", e)
        yield Finding("audio", where, u.id, f"{path}: the audio is damaged: {why}", "fetch it again or delete the line")


def _rates(rates: dict[str, tuple[int, str, str]], expected: int | None) -> Iterator[Finding]:
    counts = Counter(hz for hz, _, _ in rates.values())
    if expected is None and counts:
        expected = counts.most_common(1)[0][0]
    for file, (hz, where, id) in rates.items():
        if expected is not None and hz != expected:
            yield Finding(
                "rate",
                where,
                id,
                f"{file} has {hz} Hz, {_others(counts, expected)} {expected}",
                "features resample it; make sure that it belongs, or say --rate",
            )


def _others(counts: Counter[int], expected: int) -> str:
    return f"{counts[expected]} others have" if expected in counts else "expected"

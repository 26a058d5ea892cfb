"""Findings about a manifest, about the audio files that it names, and about a feature file.

Guarantees: a finding does not end the check. Each names file, line, utterance and what to do.
Try: `stillhouse corpus check corpus.jsonl --json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import AudioError, CorpusError
from ..files.paths import confined
from ..manifest import BadLine, Corpus, Utterance, scan_manifest
from .overlap import overlap_findings
from .sound import SoundCheck
from .text import text_findings

# A tab or a line end in a transcript is left over from a table.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]|[\ud800-\udfff]")
LOST = "\ufffd"
KINDS = (
    *("missing", "audio", "silence", "antiphase", "segment", "rate", "duplicate-id", "duplicate-audio", "empty-id"),
    *(
        "empty-text",
        "control",
        "encoding",
        "mark",
        "invisible",
        "unicode",
        "script",
        "overlap",
        "line",
        "root",
        "damaged",
        "features",
        "empty",
    ),
)
_PLACE = re.compile(r"(?P<file>.*):(?P<line>\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a corpus, at a path or path:line. `kind` is a word to filter by, see docs/guide/corpus.md."""

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
        """The path of `where`."""
        match = _PLACE.fullmatch(self.where)
        return match["file"] if match else self.where

    @property
    def line(self) -> int | None:
        """The line number of `where`, or None."""
        match = _PLACE.fullmatch(self.where)
        return int(match["line"]) if match else None

    def facts(self) -> dict[str, str | int | None]:
        """Return the finding as `--json` prints it."""
        return {**asdict(self), "file": self.file, "line": self.line}


@dataclass(frozen=True)
class Checked:
    """Findings, and how many utterances and files were checked. Notes are no errors. `rates` is {Hz: files}."""

    findings: list[Finding]
    utterances: int
    files: int
    notes: list[str] = field(default_factory=list)
    rates: dict[int, int] = field(default_factory=dict)


def check_corpus(
    path: Path,
    *,
    rate_hz: int | None = None,
    full: bool = False,
    audio: bool = True,
    root: Path | None = None,
    features: Path | None = None,
) -> Checked:
    """Check corpus.jsonl, or that of a folder, and the `audio` that it names, which should not leave `root`.

    The expected rate is `rate_hz`, or the rate of most files. With `full`, every segment is decoded, and silence and
    channels that cancel each other out are found. Otherwise headers are read, and the last tenth of a second of each
    segment, which finds files that are cut off. The rows of the file `features` are compared with audio and times.
    """
    findings: list[Finding] = []
    valid: list[tuple[str, Utterance]] = []
    path = path / "corpus.jsonl" if path.is_dir() else path
    for number, line in scan_manifest(path):
        if isinstance(line, CorpusError):
            findings.append(_bad_line(line))
        else:
            valid.append((f"{path}:{number}", line))
    if not valid and not findings:
        remedy = "make it with `stillhouse corpus import`"
        findings.append(Finding("empty", str(path), None, "the manifest is empty", remedy))
    findings += _repeats(valid)
    texts = text_findings((where, u.id, u.text) for where, u in valid)
    for kind, where, id, what, remedy in (*texts, *overlap_findings(valid)):
        findings.append(Finding(kind, where, id, what, remedy))
    sound = SoundCheck(full)
    for where, u in valid:
        problems = [*_text(u)]
        if audio and u.audio is not None:
            try:
                problems += sound.utterance(confined(path.parent / u.audio, root), where, u)
            except AudioError as e:  # `sound` yields its own errors.
                problems.append(("root", f"{e.where}: {e.what}", e.remedy or "correct the path"))
        findings += (Finding(kind, where, u.id, what, remedy) for kind, what, remedy in problems)
    findings += (Finding("rate", where, id, what, remedy) for where, id, what, remedy in sound.other_rates(rate_hz))
    if features is not None:
        findings += _changed_rows(path, valid, features, full)
    findings.sort(key=lambda f: f.line or 0)
    return Checked(findings, len(valid), len(sound.files), sound.notes(), dict(sound.rates))


def _changed_rows(path: Path, valid: list[tuple[str, Utterance]], features: Path, full: bool) -> Iterator[Finding]:
    """Yield a finding for each utterance whose rows were computed from other audio or times, or that has none."""
    from ..features.file import FeatureFile
    from ..features.provenance import compare, sources_of

    spoken = [(where, u) for where, u in valid if u.audio is not None]
    utterances = [u for _, u in spoken]
    with FeatureFile(features) as file:
        rows = sources_of(file, utterances)
    changed = compare(Corpus(path, utterances), rows, utterances, full=full).changed
    again = f"`stillhouse corpus features {path} {features}"
    for where, u in spoken:
        if u.id not in rows:
            yield Finding("features", where, u.id, f"{features} has no row of it", f"compute it with {again}`")
        elif u.id in changed:
            why = next(iter(changed[u.id].values()))
            what = f"the sound has changed since {features} was made: {why}"
            yield Finding("features", where, u.id, what, f"compute it again with {again} --redo-changed`")


def check_features(path: Path) -> Checked:
    """Compare every row of a feature file with the checksum that was written with it."""
    from ..features.file import FeatureFile

    remedy = "delete the file and make it again with `stillhouse corpus features CORPUS FEATURES`"
    with FeatureFile(path) as file:
        findings = [
            Finding("damaged", str(path), id, f"the row at {variant} does not match its checksum", remedy)
            for id, variant in file.damaged_rows()
        ]
        return Checked(findings, len(file.ids), 1)


def _bad_line(error: CorpusError) -> Finding:
    """The finding of a line that is no utterance, with its id if that can be read."""
    id = error.id if isinstance(error, BadLine) else None
    kind = "encoding" if "UTF-8" in error.what else "line"
    if id is not None and not id.strip():
        kind, id = "empty-id", None
    return Finding(kind, str(error.where), id, error.what, error.remedy or "correct or delete the line")


def _repeats(valid: list[tuple[str, Utterance]]) -> Iterator[Finding]:
    ids: dict[str, str] = {}
    segments: dict[tuple, str] = {}
    for where, u in valid:
        first = ids.setdefault(u.id, where)
        if first is not where:
            what, remedy = f"the id was used before, at {first}", "give it another id or delete it"
            yield Finding("duplicate-id", where, u.id, what, remedy)
        if u.audio is None:
            continue
        same = segments.setdefault((u.audio, u.start_s, u.duration_s, u.channel), where)
        if same is not where and first is where:
            yield Finding("duplicate-audio", where, u.id, f"the same audio segment as at {same}", "delete one of them")


def _text(u: Utterance) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, what, remedy) for the text and the id."""
    if not u.text.strip():
        yield "empty-text", "the transcript is empty", "transcribe it or delete the line"
    for name, value in (("text", u.text), ("id", u.id)):
        if match := CONTROL.search(value):
            code = f"U+{ord(match[0]):04X}"
            yield "control", f"{name} holds the control character {code} at {match.start()}", "delete it"
    if LOST in u.text:
        at = u.text.index(LOST)
        yield "encoding", f"text holds U+FFFD at {at}: a character was lost earlier", "restore it from the source"

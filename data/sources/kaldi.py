"""Kaldi data directories into a manifest, with and without `segments`; ESPnet's dumps are such directories too.

    wav.scp      RECORDING AUDIO, where AUDIO is a path, a pipe (`flac -c -d -s FILE |`) or FILE.ark:OFFSET
    segments     UTTERANCE RECORDING START END [CHANNEL]; without it every recording is an utterance
    text         UTTERANCE WORDS…            utt2spk, spk2utt   speakers            utt2dur   seconds
    reco2file_and_channel   RECORDING FILE CHANNEL: recordings of one FILE are one session
    utt2lang, spk2gender, …                  any other utt2X and spk2X is kept in `meta`

Invariant: every utterance of `segments` (or wav.scp) is imported or is a finding, and so is every line of `text` that
none of them claims. No command of wav.scp runs unless allowed. Exercised by `stillhouse corpus import kaldi`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AudioError, CorpusError
from ..files.lines import scan_lines
from ..files.paths import below, relative_audio
from .audio_files import AudioFiles, Unpacked, above
from .common import Imported, SessionPattern, by_time, in_session_order, inside
from .kaldi_entries import Entries

DURATIONS = ("utt2dur", "utt2num_frames", "utt2num_samples", "utt2category")
TEXT, SCP, SEGMENTS = "text", "wav.scp", "segments"


@dataclass
class _Folder:
    """The small tables of one data directory."""

    path: Path
    split: str | None
    text_name: str
    text: dict[str, str]
    speaker: dict[str, str]
    meta: dict[str, dict[str, str]]
    by_speaker: dict[str, dict[str, str]]
    seconds: dict[str, str]
    file_of: dict[str, str]
    claimed: set[str] = field(default_factory=set)
    no_speaker: list[str] = field(default_factory=list)
    other_length: list[str] = field(default_factory=list)


def import_kaldi(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    *,
    root: Path | None = None,
    audio_root: Path | None = None,
    allow_pipes: bool = False,
    session_pattern: str | None = None,
    text_name: str = TEXT,
    pieces: bool = False,
) -> Imported:
    """Read data directories: (split or None, folder), a folder with wav.scp or one of such folders.

    audio_root: the folder that relative paths begin in; None looks in the working folder, the data directory and the
    four above it. allow_pipes: run the pipes of wav.scp that do more than decode a file. text_name: the file of the
    transcripts. pieces: they are pieces of words, joined with ▁ and <space> as spaces. Raises CorpusError where there
    is no data directory or a table cannot be read at all.
    """
    pattern = SessionPattern(session_pattern) if session_pattern else None
    unpacked = Unpacked(manifest)
    result = Imported()
    folders = [found for source in sources for found in _folders(*source, text_name, result)]
    for split, folder in folders:
        places = AudioFiles([audio_root] if audio_root else above(folder), root)
        finder = Entries(result, places, unpacked, root, allow_pipes)
        tables = _read_folder(folder, split, result, text_name, pieces)
        if (folder / SEGMENTS).is_file():
            _with_segments(tables, finder, manifest, pattern, result)
        else:
            _without_segments(tables, finder, manifest, pattern, result)
        _say(tables, result)
        for number, utterance, _ in _pairs(folder / text_name, None) if tables.claimed != tables.text.keys() else ():
            if utterance in tables.text and utterance not in tables.claimed:
                there = SEGMENTS if (folder / SEGMENTS).is_file() else SCP
                result.finding(
                    "missing", f"{folder / text_name}:{number}", f"a transcript, but no line in {there}", utterance
                )
    result.utterances = in_session_order(result)
    return result


def _folders(split: str | None, source: Path, text_name: str, result: Imported) -> Iterator[tuple[str | None, Path]]:
    if (source / SCP).is_file():
        yield split or source.absolute().name, source
        return
    inside: list[Path] = []
    found = [scp.parent for scp in below(source, SCP) if scp.name == SCP]
    for folder in sorted(found, key=lambda path: len(path.parts)):
        # Kaldi leaves parts of a data directory inside it, as split4/1, for its jobs.
        if any(folder.is_relative_to(whole) for whole in inside):
            continue
        if (folder / text_name).is_file():
            inside.append(folder)
        else:
            result.note(f"{folder} is left out: no {text_name} in it")
    if not inside:
        raise CorpusError(
            f"no {SCP} beside a {text_name}, in it or below it", where=source, expected="a data directory"
        )
    for folder in inside:
        yield split or folder.relative_to(source).as_posix().replace("/", "-"), folder


def _pairs(path: Path, result: Imported | None) -> Iterator[tuple[int, str, str]]:
    """(line, key, rest) of a table; lines that cannot be read are findings."""
    for number, line in scan_lines(path):
        if isinstance(line, CorpusError):
            if result is not None:
                kind = "encoding" if "UTF-8" in line.what else "line"
                result.error(kind, f"{path}:{number}", line)
            continue
        # Kaldi splits at ASCII white space alone: a no-break space belongs to the text.
        key, _, rest = line.strip(" \t\f\v").replace("\t", " ").partition(" ")
        yield number, key, rest.strip(" ")


def _table(path: Path, result: Imported) -> dict[str, str]:
    """key -> rest of a table that need not be there; the first of two lines with one key counts."""
    table: dict[str, str] = {}
    for number, key, rest in _pairs(path, result) if path.is_file() else ():
        if key in table:
            result.finding("duplicate-id", f"{path}:{number}", "the key was used before in this file", key)
        else:
            table[key] = rest
    return table


def _read_folder(folder: Path, split: str | None, result: Imported, text_name: str, pieces: bool) -> _Folder:
    if not (folder / text_name).is_file():
        raise CorpusError(f"no {text_name} in it", where=folder, expected="transcripts: UTTERANCE WORDS…")
    text = _table(folder / text_name, result)
    if pieces:
        text = {utterance: joined(value) for utterance, value in text.items()}
    speaker = _table(folder / "utt2spk", result)
    if not speaker:
        listed = _table(folder / "spk2utt", result)
        speaker = {utterance: name for name, utterances in listed.items() for utterance in utterances.split()}
    if speaker and all(utterance == name for utterance, name in speaker.items()):
        speaker = {}  # how Kaldi says that the speakers are unknown
        result.note(f"{folder}: speakers unknown: utt2spk names every utterance after itself")
    kept = [p for p in sorted(folder.glob("*2*")) if p.is_file() and p.suffix == ""]
    meta = {p.name[4:]: _table(p, result) for p in kept if p.name.startswith("utt2") and p.name not in DURATIONS}
    meta.pop("spk", None)
    by_speaker = {p.name[4:]: _table(p, result) for p in kept if p.name.startswith("spk2") and p.name != "spk2utt"}
    channels = _table(folder / "reco2file_and_channel", result)
    return _Folder(
        path=folder,
        split=split,
        text_name=text_name,
        text=text,
        speaker=speaker,
        meta=meta,
        by_speaker=by_speaker,
        seconds=_table(folder / "utt2dur", result),
        file_of={recording: rest.split(" ")[0] for recording, rest in channels.items() if rest},
    )


def joined(pieces: str) -> str:
    """The text of pieces, as sentencepiece (▁) or characters (<space>) have them."""
    parts = pieces.split(" ")
    if any("\u2581" in p for p in parts):
        return " ".join("".join(parts).replace("\u2581", " ").split())
    return "".join(" " if p in ("<space>", "<sp>") else p for p in parts).strip()


def _without_segments(
    tables: _Folder, finder: Entries, manifest: Path, pattern: SessionPattern | None, result: Imported
) -> None:
    scp = tables.path / SCP
    for number, recording, entry in _pairs(scp, result):
        where = f"{scp}:{number}"
        if recording not in tables.text:
            result.finding(
                "missing", where, f"no transcript in {tables.text_name}", recording, "restore it or delete the line"
            )
            continue
        tables.claimed.add(recording)
        try:
            path, channel = finder.find(recording, entry)
            seconds = finder.places.length(path)[0]
            session, order = pattern.read(recording) if pattern else (tables.file_of.get(recording), "")
        except CorpusError as e:
            result.refused(where, e, recording)
            continue
        _add(tables, result, where, recording, path, 0.0, seconds, channel, session, order, manifest)


def _with_segments(
    tables: _Folder, finder: Entries, manifest: Path, pattern: SessionPattern | None, result: Imported
) -> None:
    scp, segments = tables.path / SCP, tables.path / SEGMENTS
    recordings = _table(scp, result)
    found: dict[str, tuple[Path, int | None, float] | AudioError] = {}
    for number, utterance, rest in _pairs(segments, result):
        where = f"{segments}:{number}"
        if utterance not in tables.text:
            result.finding(
                "missing", where, f"no transcript in {tables.text_name}", utterance, "restore it or delete the line"
            )
            continue
        tables.claimed.add(utterance)
        fields = rest.split()
        try:
            if len(fields) not in (3, 4):
                raise CorpusError(f"{len(fields) + 1} fields", expected="UTTERANCE RECORDING START END [CHANNEL]")
            recording = fields[0]
            begin, end = float(fields[1]), float(fields[2])
            if recording not in recordings:
                raise CorpusError(f"recording {recording} is not in {scp}", remedy="restore its line")
            if recording not in found:
                found[recording] = _recording(recording, recordings[recording], finder)
            audio = found[recording]
            if isinstance(audio, AudioError):
                raise audio
            path, channel, seconds = audio
            channel = int(fields[3]) if len(fields) == 4 else channel
            duration_s = inside(begin, seconds if end == -1 else end, seconds, path, result)
            session, order = tables.file_of.get(recording, recording), by_time(begin)
            if pattern is not None:
                session, order = pattern.read(utterance, session, order)  # type: ignore[assignment]
        except CorpusError as e:
            result.refused(where, e, utterance)
        except (ValueError, OverflowError) as e:
            result.error("line", where, CorpusError(str(e)), utterance)
        else:
            _add(tables, result, where, utterance, path, begin, duration_s, channel, session, order, manifest)


def _recording(recording: str, entry: str, finder: Entries) -> tuple[Path, int | None, float] | AudioError:
    try:
        path, channel = finder.find(recording, entry)
        return path, channel, finder.places.length(path)[0]
    except AudioError as e:
        return e


def _add(
    tables: _Folder,
    result: Imported,
    where: str,
    utterance: str,
    path: Path,
    start_s: float,
    duration_s: float,
    channel: int | None,
    session: str | None,
    order: str,
    manifest: Path,
) -> None:
    speaker = tables.speaker.get(utterance)
    if (stated := tables.seconds.get(utterance)) is not None and _differs(stated, duration_s):
        tables.other_length.append(utterance)
    if tables.speaker and speaker is None:
        tables.no_speaker.append(utterance)
    meta = {name: table[utterance] for name, table in tables.meta.items() if utterance in table}
    meta |= {name: table[speaker] for name, table in tables.by_speaker.items() if speaker in table}  # type: ignore[index]
    result.make(
        where,
        order,
        id=utterance,
        text=tables.text[utterance],
        audio=relative_audio(path, manifest),
        start_s=start_s,
        duration_s=round(duration_s, 6),
        channel=channel,
        session=session,
        speaker=speaker,
        split=tables.split,
        meta=meta,
    )


def _say(tables: _Folder, result: Imported) -> None:
    if tables.no_speaker:
        some = f"{len(tables.no_speaker)} utterances, {tables.no_speaker[0]} for one"
        result.note(f"{tables.path / 'utt2spk'}: no speaker of {some}")
    if tables.other_length:
        some = f"{len(tables.other_length)} utterances, {tables.other_length[0]} for one"
        result.note(f"{tables.path / 'utt2dur'}: not the lengths of {some}; those of the audio are kept")


def _differs(stated: str, duration_s: float) -> bool:
    try:
        return abs(float(stated) - duration_s) > 0.1
    except ValueError:
        return True

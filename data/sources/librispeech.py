"""A LibriSpeech tree into a manifest: SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its FLAC files.

Invariant: chapters are sessions, their utterances in the numeric order of the last part of the id; whatever a
transcript or a folder lacks is a finding. Exercised by `stillhouse corpus import librispeech FOLDER CORPUS`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..audio.read import audio_length
from ..errors import AudioError, CorpusError
from ..files.lines import read_lines
from ..files.paths import below, confined, relative_audio
from ..manifest import Utterance
from .common import Imported

ID = re.compile(r"(?P<speaker>\d+)-(?P<chapter>\d+)-(?P<number>\d+)")
SPLIT = re.compile(r"(train|dev|test)(-.+)?")
SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")  # copies of the corpus in other formats keep the layout


def import_librispeech(folder: Path, manifest: Path, *, root: Path | None = None) -> Imported:
    """Read a tree, or any one split, speaker or chapter of it.

    The split is the name of the folder above the speaker's; above `folder` itself it counts only where it looks like
    one (train-…, dev-…, test-…). root: the folder that no path may leave. Raises CorpusError where
    there is no *.trans.txt at all.
    """
    transcripts = below(folder, ".trans.txt")
    if not transcripts:
        raise CorpusError("no *.trans.txt below it", where=folder, expected="SPLIT/SPEAKER/CHAPTER/*.trans.txt")
    found: list[tuple[tuple, Utterance, str]] = []
    result = Imported()
    for transcript in transcripts:
        found += _chapter(transcript, folder, manifest, result, root)
    for _, utterance, where in sorted(found, key=lambda item: item[0]):
        result.add(utterance, "", where)
    return result


def _split(chapter: Path, folder: Path) -> str | None:
    place = chapter.absolute().parent.parent
    inside = place == folder.absolute() or folder.absolute() in place.parents
    is_root = place == folder.absolute() and not SPLIT.fullmatch(place.name)
    return place.name if (inside and not is_root) or SPLIT.fullmatch(place.name) else None


def _chapter(
    transcript: Path, folder: Path, manifest: Path, result: Imported, root: Path | None
) -> list[tuple[tuple, Utterance, str]]:
    """The utterances of one transcript file with their sort keys; findings go to `result`."""
    chapter = transcript.parent
    split = _split(chapter, folder)
    try:
        lines = read_lines(transcript)
    except CorpusError as e:
        result.error("encoding", str(e.where), e)
        return []
    found = []
    audio = {p.stem: p for p in sorted(chapter.iterdir()) if p.suffix.lower() in SUFFIXES}
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{transcript}:{number}"
        id, _, text = line.strip().partition(" ")
        match = ID.fullmatch(id)
        if match is None:
            result.finding("line", where, f"the line begins with {id[:40]!r}, expected SPEAKER-CHAPTER-NUMBER")
            continue
        path = audio.pop(id, None)
        if path is None:
            result.finding("missing", where, f"no audio {id}.flac beside it", id, "fetch it again or delete the line")
            continue
        try:
            duration_s = round(audio_length(confined(path, root)), 6)
        except AudioError as e:
            result.error("audio", where, e, id)
            continue
        if duration_s == 0:
            result.finding("audio", where, f"{path.name} holds no audio", id, "fetch it again or delete the line")
            continue
        speaker, number_in = match["speaker"], int(match["number"])
        utterance = Utterance(
            id=id,
            text=text.strip(),
            audio=relative_audio(path, manifest),
            duration_s=duration_s,
            session=f"{speaker}-{match['chapter']}",
            speaker=speaker,
            split=split,
        )
        found.append(((split or "", int(speaker), int(match["chapter"]), number_in), utterance, where))
    for id, path in audio.items():
        result.finding("missing", path, "audio without a transcript", id, "restore the line of its transcript")
    return found

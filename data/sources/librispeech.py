"""A LibriSpeech tree: SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its FLAC files.

Guarantees: chapters are sessions, with their utterances in the numeric order of the last part of the id. Whatever is
missing from a transcript or a folder is a finding.
Try: `stillhouse corpus import librispeech LibriSpeech corpus.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import AudioError, CorpusError
from ..files.lines import read_lines
from ..files.paths import below, confined
from .audio_files import AudioFiles
from .common import Imported

ID = re.compile(r"(?P<speaker>\d+)-(?P<chapter>\d+)-(?P<number>\d+)")
SPLIT = re.compile(r"(train|dev|test)(-.+)?")
SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")  # Copies of the corpus in other formats keep the layout.
RESTORE = "restore the file or delete the line"


def import_librispeech(
    folder: Path, manifest: Path, *, root: Path | None = None, text_only: bool = False, split: str | None = None
) -> Imported:
    """Read a tree, or one split, speaker or chapter of it. No audio path may leave `root`.

    Without a `split`, it is the name of the folder above the speaker's. Above `folder` itself that counts only if it
    looks like a split (train-…, dev-…, test-…). `text_only` looks at no audio. Raises CorpusError if there is no
    *.trans.txt.
    """
    transcripts = below(folder, ".trans.txt")
    if not transcripts:
        raise CorpusError("no *.trans.txt below it", where=folder, expected="SPLIT/SPEAKER/CHAPTER/*.trans.txt")
    result = Imported(manifest, root)
    lines = [line for t in transcripts for line in _chapter(t, split or _split(t.parent, folder), result, text_only)]
    for _, where, fields in sorted(lines, key=lambda line: line[0]):
        result.add(where, **fields)
    return result


def _split(chapter: Path, folder: Path) -> str | None:
    place = chapter.absolute().parent.parent
    return place.name if folder.absolute() in place.parents or SPLIT.fullmatch(place.name) else None


def _chapter(
    transcript: Path, split: str | None, result: Imported, text_only: bool
) -> Iterator[tuple[tuple, str, dict[str, Any]]]:
    """Yield (sort key, place, fields) for each line of a transcript file."""
    chapter, files = transcript.parent, AudioFiles([transcript.parent], result.root)
    try:
        lines = read_lines(transcript)
    except CorpusError as e:
        result.error(str(e.where), e)
        return
    audio = {p.stem: p for p in sorted(chapter.iterdir()) if p.suffix.lower() in SUFFIXES and not text_only}
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
        if path is None and not text_only:
            result.finding("missing", where, f"no audio {id}.flac beside it", id, RESTORE)
            continue
        with result.line(where, id):
            placed = {} if path is None else _placed(path, files, result)
            speaker, session = match["speaker"], f"{match['speaker']}-{match['chapter']}"
            fields = {"id": id, "text": text.strip(), "speaker": speaker} | placed
            key = (split or "", int(speaker), int(match["chapter"]), int(match["number"]))
            yield key, where, fields | {"session": session, "split": split}
    for id, path in audio.items():
        result.finding("missing", path, "audio without a transcript", id, "restore the line of its transcript")


def _placed(path: Path, files: AudioFiles, result: Imported) -> dict[str, Any]:
    length = files.length(confined(path, result.root))
    if length.seconds == 0:
        raise AudioError(f"{path.name} holds no audio", remedy=RESTORE)
    return result.placed(path, length)

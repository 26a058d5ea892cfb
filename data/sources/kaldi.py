"""Kaldi data directories, with and without `segments`. ESPnet's dumps are such directories too.

    wav.scp      RECORDING AUDIO, where AUDIO is a path, a pipe (`flac -c -d -s FILE |`) or FILE.ark:OFFSET
    segments     UTTERANCE RECORDING START END [CHANNEL]; without it every recording is an utterance
    text         UTTERANCE WORDS…            utt2spk, spk2utt   speakers            utt2dur   seconds
    reco2file_and_channel   RECORDING FILE CHANNEL: recordings of one FILE are one session. CHANNEL is the side of
                 the call: A, B or a number, for a file with several channels
    utt2lang, spk2gender, …                  any other utt2X and spk2X is kept in `meta`

Guarantees: every utterance of `segments` (or wav.scp) is imported or a finding, and so is every other line of `text`.
Try: `stillhouse corpus import kaldi data/train corpus.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..audio.channels import ChannelNames
from ..audio.read import no_such_channel
from ..errors import AudioError, CorpusError
from ..files.lines import scan_lines
from ..files.paths import below
from .audio_files import AudioLength
from .common import Imported, by_time
from .entries.find import WavEntries

DURATIONS = ("utt2dur", "utt2num_frames", "utt2num_samples", "utt2category")
TEXT, SCP, SEGMENTS = "text", "wav.scp", "segments"


def import_kaldi(
    sources: Sequence[tuple[str | None, Path]],
    manifest: Path,
    *,
    text_name: str = TEXT,
    pieces: bool = False,
    **settings: Any,
) -> Imported:
    """Read data directories, given as (split or None, a folder with wav.scp or one of such folders).

    `pieces` says that the transcripts in the file `text_name` are pieces of words. They are joined, with ▁ and <space>
    as spaces. Without `audio_root`, relative paths start in the working folder, the data directory or the four folders
    above it. Raises CorpusError if there is no data directory, or if a table cannot be read at all.
    """
    result = Imported(manifest, **settings)
    folders = [pair for source in sources for pair in _folders(*source, text_name, result)]
    for split, folder in folders:
        _DataDirectory(folder, split, text_name, pieces, result).read()
    return result.in_session_order()


def _folders(split: str | None, source: Path, text_name: str, result: Imported) -> Iterator[tuple[str | None, Path]]:
    if (source / SCP).is_file():
        yield split or source.absolute().name, source
        return
    inside: list[Path] = []
    candidates = [scp.parent for scp in below(source, SCP) if scp.name == SCP]
    for folder in sorted(candidates, key=lambda path: len(path.parts)):
        # For its jobs, Kaldi leaves parts of a data directory inside it, as split4/1.
        if any(folder.is_relative_to(whole) for whole in inside):
            continue
        if (folder / text_name).is_file():
            inside.append(folder)
        else:
            result.note(f"{folder} is left out: no {text_name} in it")
    if not inside:
        what = f"no {SCP} beside a {text_name}, in it or below it"
        raise CorpusError(what, where=source, expected="a data directory")
    for folder in inside:
        yield split or folder.relative_to(source).as_posix().replace("/", "-"), folder


def joined(pieces: str) -> str:
    """Return the text of pieces, as sentencepiece (▁) or characters (<space>) have them."""
    parts = pieces.split(" ")
    if any("\u2581" in p for p in parts):
        return " ".join("".join(parts).replace("\u2581", " ").split())
    return "".join(" " if p in ("<space>", "<sp>") else p for p in parts).strip()


class _DataDirectory:
    """One data directory: its small tables, and the utterances that it gives to `result`."""

    def __init__(self, path: Path, split: str | None, text_name: str, pieces: bool, result: Imported) -> None:
        if not (path / text_name).is_file():
            raise CorpusError(f"no {text_name} in it", where=path, expected="transcripts: UTTERANCE WORDS…")
        self.path, self.split, self.result = path, split, result
        self.files = result.files(path)
        self.entries = WavEntries(result, self.files)
        self.text_path, self.scp, self.segments = path / text_name, path / SCP, path / SEGMENTS
        self.text = self._table(text_name)
        if pieces:
            self.text = {utterance: joined(value) for utterance, value in self.text.items()}
        self.speaker = self._table("utt2spk")
        if not self.speaker:
            listed = self._table("spk2utt")
            self.speaker = {utterance: name for name, utterances in listed.items() for utterance in utterances.split()}
        if self.speaker and all(utterance == name for utterance, name in self.speaker.items()):
            self.speaker = {}  # This is how Kaldi says that the speakers are unknown.
            result.note(f"{path}: the speakers are unknown, because utt2spk names every utterance after itself")
        kept = [p.name for p in sorted(path.glob("*2*")) if p.is_file() and p.suffix == ""]
        utt = [name for name in kept if name.startswith("utt2") and name not in (*DURATIONS, "utt2spk")]
        self.meta = {name[4:]: self._table(name) for name in utt}
        self.by_speaker = {n[4:]: self._table(n) for n in kept if n.startswith("spk2") and n != "spk2utt"}
        listed_sides = self._table("reco2file_and_channel")
        self.seconds = self._table("utt2dur")
        sides = {recording: rest.split() for recording, rest in listed_sides.items() if rest}
        self.file_of = {recording: words[0] for recording, words in sides.items()}
        self.side = {recording: words[1] for recording, words in sides.items() if len(words) > 1}
        self.channels = ChannelNames(self.side.values(), ones=1)
        self.segment_channels: ChannelNames | None = None
        self.recordings: dict[str, str] = {}
        self.audio: dict[str, tuple[Path, int | None, AudioLength] | AudioError] = {}
        self.claimed: set[str] = set()
        self.no_speaker: list[str] = []
        self.other_length: list[str] = []

    def _lines(self, path: Path, findings: bool = True) -> Iterator[tuple[int, str, str]]:
        """Yield (line, key, rest) of a table. Lines that cannot be read are findings."""
        for number, line in scan_lines(path):
            if isinstance(line, CorpusError):
                if findings:
                    self.result.error(f"{path}:{number}", line)
                continue
            # Kaldi splits at ASCII white space alone: a no-break space belongs to the text.
            key, _, rest = line.strip(" \t\f\v").replace("\t", " ").partition(" ")
            yield number, key, rest.strip(" ")

    def _table(self, name: str) -> dict[str, str]:
        """Return {key: rest} of a table, which may be missing. The first of two lines with one key counts."""
        path, table = self.path / name, dict[str, str]()
        for number, key, rest in self._lines(path) if path.is_file() else ():
            if key in table:
                self.result.finding("duplicate-id", f"{path}:{number}", "the key was used before in this file", key)
            else:
                table[key] = rest
        return table

    def read(self) -> None:
        """Add all utterances, findings and notes."""
        listed = self.segments if self.segments.is_file() else self.scp
        fields = self._recording if listed is self.scp else self._segment
        if listed is self.segments:
            self.recordings = self._table(SCP)
        for number, utterance, rest in self._lines(listed):
            where = f"{listed}:{number}"
            if utterance in self.text:
                self.claimed.add(utterance)
                with self.result.line(where, utterance):
                    self._add(where, utterance, **fields(utterance, rest))
            else:
                what = f"no transcript in {self.text_path.name}"
                self.result.finding("missing", where, what, utterance, "restore it or delete the line")
        for name, ids, what in (
            ("utt2spk", self.no_speaker, "it names no speaker of"),
            ("utt2dur", self.other_length, "the lengths of the audio are kept, which differ for"),
        ):
            if ids:
                self.result.note(f"{self.path / name}: {what} {len(ids)} utterances, for example {ids[0]}")
        if self.claimed == self.text.keys():
            return
        for number, utterance, _ in self._lines(self.text_path, findings=False):
            if utterance in self.text and utterance not in self.claimed:
                what = f"a transcript, but no line in {listed.name}"
                self.result.finding("missing", f"{self.text_path}:{number}", what, utterance)

    def _audio(self, recording: str, entry: str) -> tuple[Path, int | None, AudioLength]:
        """Return (file, channel, length) of an entry of wav.scp. The side of a stereo call is its channel."""
        path, channel = self.entries.find(recording, entry)
        length = self.files.length(path)
        side = self.channels.channel(self.side.get(recording), length.channels, path)
        if None not in (side, channel) and side != channel:
            what = f"the pipe takes channel {channel}, but reco2file_and_channel has side {self.side[recording]}"
            raise AudioError(what, where=path, expected="one channel", remedy="correct one of both lists")
        return path, side if channel is None else channel, length

    def _recording(self, recording: str, entry: str) -> dict[str, Any]:
        path, channel, length = self._audio(recording, entry)
        call = self.file_of.get(recording)
        session = call and self.result.recording(call, path, self.path, self.split)
        session, order = self.result.session(recording, session)
        return self.result.placed(path, length, channel=channel) | {"session": session, "order": order}

    def _segment(self, utterance: str, rest: str) -> dict[str, Any]:
        fields = rest.split()
        if len(fields) not in (3, 4):
            raise CorpusError(f"{len(fields) + 1} fields", expected="UTTERANCE RECORDING START END [CHANNEL]")
        recording, begin, end = fields[0], float(fields[1]), float(fields[2])
        if recording not in self.recordings:
            raise CorpusError(f"recording {recording} is not in {self.scp}", remedy="restore its line")
        if recording not in self.audio:
            try:
                self.audio[recording] = self._audio(recording, self.recordings[recording])
            except AudioError as e:
                self.audio[recording] = e
        audio = self.audio[recording]
        if isinstance(audio, AudioError):
            raise audio
        path, channel, length = audio
        if len(fields) == 4:
            channel = self._segment_channel(fields[3], length, path)
        placed = self.result.placed(path, length, begin, None if end == -1 else end, channel=channel)
        call = self.result.recording(self.file_of.get(recording, recording), path, self.path, self.split)
        session, order = self.result.session(utterance, call, by_time(begin))
        return placed | {"session": session, "order": order}

    def _segment_channel(self, name: str, length: AudioLength, path: Path) -> int | None:
        """Return the channel of a segment. Kaldi counts from 0, but a list that has a 2 and no 0 counts from 1."""
        if not ChannelNames([name]).known:
            raise CorpusError(f"the channel is {name[:40]!r}", expected="a number from 0")
        if self.segment_channels is None:
            names = (rest.split()[3:4] for _, _, rest in self._lines(self.segments, findings=False))
            self.segment_channels = ChannelNames({name for found in names for name in found}, ones=0)
        channel = self.segment_channels.channel(name, max(2, length.channels), path)
        if channel is not None and channel >= length.channels:
            raise no_such_channel(channel, length.channels, path)
        return channel

    def _add(self, where: str, utterance: str, duration_s: float, **fields: Any) -> None:
        speaker, stated = self.speaker.get(utterance), self.seconds.get(utterance)
        if stated is not None and _differs(stated, duration_s):
            self.other_length.append(utterance)
        if self.speaker and speaker is None:
            self.no_speaker.append(utterance)
        meta = {name: table[utterance] for name, table in self.meta.items() if utterance in table}
        meta |= {name: table[speaker] for name, table in self.by_speaker.items() if speaker and speaker in table}
        fields |= {"duration_s": round(duration_s, 6), "speaker": speaker, "split": self.split, "meta": meta}
        self.result.add(where, id=utterance, text=self.text[utterance], **fields)


def _differs(stated: str, duration_s: float) -> bool:
    try:
        return abs(float(stated) - duration_s) > 0.1
    except ValueError:
        return True

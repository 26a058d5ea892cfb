"""Shell pipes in the place of audio files, as Kaldi's wav.scp has them: `flac -c -d -s FILE |`, `sox … |`.

Invariant: no command runs unless the user has allowed it. A pipe that does nothing but decode one file is read as that
file instead; one that changes the sound (speed, volume, noise, trimming) never is.
Exercised by `stillhouse corpus import kaldi data/train corpus.jsonl`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import soundfile

from ..audio.read import open_audio
from ..errors import AudioError

SECONDS_A_COMMAND = 600.0
SHELL = re.compile(r"[$`;&<>()*?~{}!#\n|\[\]]")
QUIET = re.compile(r"\s2>\s*/dev/null\b")
FILE_TYPES = {"wav", "flac", "sph", "nist", "mp3", "ogg", "opus", "vorbis", "aiff", "aif", "au", "wavpcm"}


@dataclass(frozen=True)
class Decoded:
    """The file that a pipe decodes, the channel that it takes (None: the mean of all), the rate that it asks for."""

    path: str
    channel: int | None = None
    rate_hz: int | None = None


def decoded_file(command: str) -> Decoded | None:
    """What a command without its last "|" reads, where decoding is all that it does; None for any other."""
    command = QUIET.sub("", command.strip())
    if SHELL.search(command):
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    reader = _READERS.get(os.path.basename(words[0])) if words else None
    try:
        return reader(words[1:]) if reader else None
    except (IndexError, ValueError):  # an option without its value, or with another than a number
        return None


def _flac(words: list[str]) -> Decoded | None:
    flags = [w for w in words if w.startswith("-")]
    files = [w for w in words if not w.startswith("-")]
    long = {"--decode", "--stdout", "--silent", "--totally-silent"}
    if any(f not in long and not re.fullmatch("-[cdsF]+", f) for f in flags) or len(files) != 1:
        return None
    letters = "".join(f[1:] for f in flags if f not in long)
    decodes = "d" in letters or "--decode" in flags
    return Decoded(files[0]) if decodes and ("c" in letters or "--stdout" in flags) else None


def _sox(words: list[str]) -> Decoded | None:
    """sox [-q] [-t TYPE] FILE [-t wav] [-r R] [-c 1] [-b 16] [-e signed] - [rate R] [remix N] [channels 1]"""
    rest, typed = list(words), ""
    sides: list[str] = []
    rate: int | None = None
    channel: int | None = None
    while rest and len(sides) < 2:
        word = rest.pop(0)
        if word in ("-q", "-V0", "-V1", "-G", "-D", "-R"):
            if word == "-G":
                return None
        elif word in ("-t", "-r", "-c", "-b", "-e", "--type", "--rate", "--channels", "--bits", "--encoding"):
            value = rest.pop(0)
            key = word.lstrip("-")[0]
            if key == "t":
                if not sides and value.lower() not in FILE_TYPES:
                    return None  # raw audio, or a device
                typed = value.lower()
            elif not sides or (key == "c" and value != "1"):
                return None  # before the input they say what raw audio is; more channels than one are no decoding
            elif key == "r":
                rate = _rate(value)
        elif word == "-" or not word.startswith("-"):
            if word == "-" and len(sides) == 1 and typed not in ("wav", "flac", "wavpcm", "sph"):
                return None  # headerless output
            sides.append(word)
        else:
            return None
    while rest:
        effect = rest.pop(0)
        if effect == "rate":
            while rest and rest[0].startswith("-"):
                if rest.pop(0) not in ("-q", "-l", "-m", "-h", "-v", "-s", "-I", "-L"):
                    return None
            rate = _rate(rest.pop(0))
        elif effect == "remix":
            value = rest.pop(0)
            channel = None if value == "-" else int(value) - 1
            if (channel is not None and channel < 0) or (rest and (rest[0].isdigit() or "," in rest[0])):
                return None
        elif effect == "channels":
            if rest.pop(0) != "1":
                return None
        else:
            return None
    if len(sides) != 2 or sides[1] != "-" or sides[0] == "-":
        return None
    return Decoded(sides[0], channel, rate)


def _rate(text: str) -> int:
    return round(float(text[:-1]) * 1000) if text.endswith("k") else int(text)


def _sph2pipe(words: list[str]) -> Decoded | None:
    rest, files, channel = list(words), [], None
    while rest:
        word = rest.pop(0)
        if word == "-f":
            if rest.pop(0) not in ("wav", "rif"):
                return None
        elif word == "-c":
            channel = int(rest.pop(0)) - 1
            if channel not in (0, 1):
                return None
        elif word in ("-p", "-u"):
            pass
        elif word.startswith("-"):
            return None
        else:
            files.append(word)
    return Decoded(files[0], channel) if len(files) == 1 else None


def _ffmpeg(words: list[str]) -> Decoded | None:
    rest, path, rate, out = list(words), None, None, None
    while rest:
        word = rest.pop(0)
        if word in ("-y", "-nostdin", "-hide_banner", "-nostats", "-vn"):
            continue
        if word in ("-loglevel", "-v", "-threads", "-nostats"):
            rest.pop(0)
        elif word == "-i" and path is None:
            path = rest.pop(0)
        elif path is not None and word in ("-f", "-ac", "-ar", "-acodec", "-c:a", "-sample_fmt"):
            value = rest.pop(0)
            allowed = {"-f": {"wav"}, "-ac": {"1"}, "-sample_fmt": {"s16"}}
            if value not in allowed.get(word, {value}) or (word in ("-acodec", "-c:a") and value != "pcm_s16le"):
                return None
            rate = int(value) if word == "-ar" else rate
        elif word in ("-", "pipe:1", "pipe:") and out is None:
            out = word
        else:
            return None
    return Decoded(path, None, rate) if path not in (None, "-") and "://" not in str(path) and out else None  # type: ignore[arg-type]


def _cat(words: list[str]) -> Decoded | None:
    return Decoded(words[0]) if len(words) == 1 and not words[0].startswith("-") else None


def _to_stdout(*flags: str) -> Callable[[list[str]], Decoded | None]:
    """A decoder called as `PROGRAM [flags] FILE -`."""

    def read(words: list[str]) -> Decoded | None:
        files = [w for w in words if w not in flags]
        good = len(files) == 2 and files[1] == "-" and not files[0].startswith("-")
        return Decoded(files[0]) if good else None

    return read


_READERS: dict[str, Callable[[list[str]], Decoded | None]] = {
    "flac": _flac,
    "sox": _sox,
    "sph2pipe": _sph2pipe,
    "ffmpeg": _ffmpeg,
    "cat": _cat,
    "opusdec": _to_stdout("--quiet", "--force-wav"),
    "lame": _to_stdout("--decode", "--quiet", "-S", "--silent"),
    "wav-copy": _to_stdout(),
}


def run_command(command: str, target: Path, timeout_s: float = SECONDS_A_COMMAND) -> None:
    """Run a command by the shell and write the audio of its output to `target`, as WAV. Raises AudioError."""
    raw = target.with_name(target.name + ".piped")
    try:
        with raw.open("wb") as out:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                said = process.communicate(timeout=timeout_s)[1]
            except BaseException as e:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if isinstance(e, subprocess.TimeoutExpired):
                    raise AudioError(f"the command took more than {timeout_s:g} s: {command}") from None
                raise
        if process.returncode:
            last = said.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise AudioError(f"the command failed with code {process.returncode}: {command} {' '.join(last)}".strip())
        # Programs that write to a pipe cannot fill in the length in a WAV header.
        with open_audio(raw) as source:
            if not source.frames:
                raise AudioError(f"the command wrote no audio: {command}")
            subtype = source.subtype if source.subtype in soundfile.available_subtypes("WAV") else "PCM_16"
            with soundfile.SoundFile(target, "w", source.samplerate, source.channels, subtype, format="WAV") as sink:
                # As integers where it is integers: floats would be scaled by 2^15 one way and by 2^15 - 1 the other.
                exact = source.subtype == subtype and subtype.startswith("PCM")
                for block in source.blocks(1 << 20, dtype="int32" if exact else "float64"):
                    sink.write(block)
    except soundfile.SoundFileError as e:
        raise AudioError(f"the command's output is no audio: {command}: {e}") from e
    finally:
        raw.unlink(missing_ok=True)

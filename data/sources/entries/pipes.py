"""Pipes in the place of audio files, as Kaldi's wav.scp has them: `flac -c -d -s FILE |`, `sox … |`.

Guarantees: no command runs unless the user allows it. A pipe that only decodes one file is read as that file.
Try: `stillhouse corpus import kaldi data/train corpus.jsonl`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import soundfile

from ...audio.read import open_audio
from ...errors import AudioError

SECONDS_A_COMMAND = 600.0
SHELL = re.compile(r"[$`;&<>()*?~{}!#\n|\[\]]")
QUIET = re.compile(r"\s2>\s*/dev/null\b")

# Commands that only decode one file, with a space for every end of a word. Options that change the sound are not among
# them, and neither are those that say what raw audio is.
_TYPE = "(?:wav|flac|sph|nist|mp3|ogg|opus|vorbis|aiff?|au|wavpcm)"
_FILE = "(?P<path>(?!-)[^ ]+)"
_RATE = r"\d+(?:\.\d+)?k?"
_COMMANDS = (
    f"flac(?=.* (?:-[dsF]*c|--stdout))(?=.* (?:-[csF]*d|--decode))"
    f"(?: -[cdsF]+| --(?:decode|stdout|silent|totally-silent))+ {_FILE}",
    f"sph2pipe(?: -f (?:wav|rif)| -[pu]| -c (?P<channel>[12]))* {_FILE}",
    rf"sox(?: -[qDR]| -V[01])*(?: (?:-t|--type) {_TYPE})? {_FILE}(?=.* (?:-t|--type) (?:wav|wavpcm|flac|sph) )"
    rf"(?: (?:-t|--type) {_TYPE}| (?:-r|--rate) (?P<rate>{_RATE})| (?:-c|--channels) 1| (?:-b|--bits) \d+"
    rf"| (?:-e|--encoding) [\w-]+)* -"
    rf"(?: rate(?: -[qlmhvsIL])* (?P<resampled>{_RATE})| remix (?:-|(?P<channel>[1-9]\d*))| channels 1)*",
    rf"ffmpeg(?: -(?:y|nostdin|hide_banner|nostats)| -(?:loglevel|v|threads) \w+)* -i {_FILE}"
    rf"(?: -(?:y|nostdin|vn)| -f wav| -ac 1| -ar (?P<rate>\d+)| -(?:acodec|c:a) pcm_s16le| -sample_fmt s16)*"
    rf" (?:-|pipe:1?)",
    f"cat {_FILE}",
)
_DECODERS = [re.compile(command.replace(" ", "\0")) for command in _COMMANDS]


@dataclass(frozen=True)
class Decoded:
    """The file that a pipe decodes, its channel from 0 (None: the mean of all), and the rate in Hz that it asks for."""

    path: str
    channel: int | None = None
    rate_hz: int | None = None


def decoded_file(command: str) -> Decoded | None:
    """Return what a command without its last "|" decodes, or None if it does anything else."""
    command = QUIET.sub("", command.strip())
    if SHELL.search(command):
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    line = "\0".join([os.path.basename(words[0]), *words[1:]]) if words else ""
    match = next((m for decoder in _DECODERS if (m := decoder.fullmatch(line))), None)
    if match is None or "://" in match["path"]:
        return None
    given = match.groupdict()
    channel, rate = given.get("channel"), given.get("resampled") or given.get("rate")
    hertz = round(float(rate.removesuffix("k")) * (1000 if rate.endswith("k") else 1)) if rate else None
    return Decoded(match["path"], int(channel) - 1 if channel else None, hertz)


def run_command(command: str, target: Path, timeout_s: float = SECONDS_A_COMMAND) -> None:
    """Run a command in the shell and write the audio of its output to `target`, as WAV.

    Raises AudioError if the command fails, takes longer than `timeout_s`, or writes no audio.
    """
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
                errors = process.communicate(timeout=timeout_s)[1]
            except BaseException as e:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if isinstance(e, subprocess.TimeoutExpired):
                    raise AudioError(f"the command took more than {timeout_s:g} s: {command}") from None
                raise
        if process.returncode:
            last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise AudioError(f"the command failed with code {process.returncode}: {command} {' '.join(last)}".strip())
        # Programs that write to a pipe cannot write the length into a WAV header, so the file is written again.
        with open_audio(raw) as source:
            if not source.frames:
                raise AudioError(f"the command wrote no audio: {command}")
            subtype = source.subtype if source.subtype in soundfile.available_subtypes("WAV") else "PCM_16"
            with soundfile.SoundFile(target, "w", source.samplerate, source.channels, subtype, format="WAV") as sink:
                # Integers stay integers, because floats would be scaled by 2^15 on the way in and by 2^15 - 1 out.
                exact = source.subtype == subtype and subtype.startswith("PCM")
                for block in source.blocks(1 << 20, dtype="int32" if exact else "float64"):
                    sink.write(block)
    except soundfile.SoundFileError as e:
        raise AudioError(f"the command's output is no audio: {command}: {e}") from e
    finally:
        raw.unlink(missing_ok=True)

"""`stillhouse corpus features`: fbank, or the states of a speech encoder, into an HDF5 file.

Guarantees: the command imports everything heavier than click inside its function.
Try: `stillhouse corpus features --help`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...data.commands.corpus_import import FOLDER, root_option, say
from ...data.commands.paths import EXISTING, PATH

if TYPE_CHECKING:
    from ...data.audio.noise import NoiseRecipe
    from ...data.features.compute import PartDone
    from ...data.features.methods import FeatureMethod
    from ...data.manifest import Corpus


class _Progress:
    """A progress bar on a terminal, and a line every few seconds elsewhere."""

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.missing, self.audio_s, self.shown = name, 0, 0, 0.0, 0.0
        self.bar: Any = None

    def start(self, present: int, missing: int) -> None:
        say(f"{self.name}: {present} rows present, {missing} to compute")
        self.missing, self.begun = missing, time.monotonic()
        if missing and sys.stderr.isatty():
            self.bar = click.progressbar(length=missing, label="features", file=sys.stderr)
            self.bar.render_progress()

    def part(self, part: PartDone) -> None:
        self.rows, self.audio_s, now = self.rows + part.rows, self.audio_s + part.audio_s, time.monotonic()
        if self.bar is not None:
            self.bar.update(part.rows)
        elif now - self.shown > 5:
            self.shown = now
            speed = self.audio_s / (now - self.begun)
            say(f"{self.rows}/{self.missing} rows, {self.audio_s / 3600:.2f} h, {speed:.0f}× real time")

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.render_finish()


@click.command()
@click.argument("manifest", type=EXISTING)
@click.argument("features_file", metavar="FEATURES", type=PATH)
@click.option("--speeds", default="1.0", show_default=True, help="Speed factors with commas between: 0.9,1.0,1.1.")
@click.option("--split", help="Compute only these splits, with commas between.")
@click.option(
    "--rate",
    "rate_hz",
    type=int,
    help="Resample audio to this rate in Hz, also upwards. By default that of the feature file, or else of the audio, "
    "16000 at most. An encoder takes one rate alone.",
)
@click.option("--bins", type=int, help="Number of mel bins. [default: 80]")
@click.option(
    "--encoder",
    metavar="MODEL",
    help="Compute the states of this speech encoder instead of fbank: a folder, or a name on the Hugging Face hub.",
)
@click.option("--layer", type=click.IntRange(min=0), help="With --encoder: the layer, where 0 goes into the first one.")
@click.option(
    "--device", default="auto", show_default=True, help="With --encoder: its device, cpu, cuda, cuda:1 or auto."
)
@click.option("--noise", "noise_root", type=FOLDER, metavar="FOLDER",
              help="Add noise from the audio below this folder to copies of the utterances.")  # fmt: skip
@click.option("--rir", "rir_root", type=FOLDER, metavar="FOLDER",
              help="Let copies sound as in the rooms whose impulse responses lie below this folder.")  # fmt: skip
@click.option("--snr", metavar="LOW-HIGH", help="With --noise: ratio of speech to noise, in dB. [default: 5-20]")
@click.option("--copies", type=click.IntRange(0, 1000), default=None,
              help="Noisy copies of each utterance at each speed, beside the clean one. [default: 1]")  # fmt: skip
@click.option("--workers", type=int, help="Worker processes. By default the cores, if that pays.")
@click.option("--redo-changed", is_flag=True, help="Compute again utterances whose audio changed.")
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def features(manifest: Path, features_file: Path, speeds: str, as_json: bool, **options: Any) -> None:
    """Compute features into an HDF5 file: Kaldi fbank, or the states of a speech encoder.

    The same command again resumes a run that was stopped, and adds new utterances and speeds.

    Example: stillhouse corpus features corpus.jsonl features.h5 --speeds 0.9,1.0,1.1

    Example: stillhouse corpus features corpus.jsonl whisper.h5 --encoder openai/whisper-tiny.en --layer 4

    Example: stillhouse corpus features corpus.jsonl features.h5 --split train --noise musan/noise --rir rirs --copies 2
    """
    from ...data.errors import UsageError
    from ...data.features.compute import compute_features
    from ...data.files.outputs import refuse_input
    from ...data.manifest import read_manifest

    try:
        factors = tuple(float(s) for s in speeds.split(","))
    except ValueError as e:
        raise UsageError(f"the speeds are {speeds!r}", expected="numbers with commas between") from e
    refuse_input(features_file, [manifest])
    chosen = read_manifest(manifest, options.pop("root")).select(options.pop("split"))
    settings = {name: options.pop(name) for name in ("rate_hz", "bins", "encoder", "layer", "device")}
    options["noise"] = _noise(*(options.pop(name) for name in ("noise_root", "rir_root", "snr", "copies")))
    options["upsample"] = settings["rate_hz"] is not None
    method = _method(chosen, features_file, **settings)
    if options["workers"] is None and method.on_gpu:
        options["workers"] = 0  # Several would only share it.
    started = time.monotonic()
    progress = _Progress(str(features_file))
    hooks: dict[str, Any] = {"on_start": progress.start, "on_part": progress.part}
    try:
        report = compute_features(chosen, features_file, factors, method=method, **options, **hooks)
    finally:
        progress.stop()
    took = time.monotonic() - started
    if as_json:
        click.echo(json.dumps({**asdict(report), "seconds": round(took, 3)}))
    else:
        say(
            f"{features_file}: {report.rows_computed} rows of {report.audio_s / 3600:.2f} h of audio in {took:.1f} s "
            f"({report.audio_s / took:.0f}× real time), {report.frames} frames at {report.rate_hz} Hz in the file"
        )
    if report.text_only:
        say(f"{report.text_only} utterances have no audio and are skipped")
    if report.upsampled:
        say(
            f"{report.upsampled} utterances have a lower sample rate than {report.rate_hz} Hz and were upsampled. "
            "Nothing is in their upper band, and a model comes to depend on that"
        )


def _noise(noise: Path | None, rir: Path | None, snr: str | None, copies: int | None) -> NoiseRecipe | None:
    """Return what noisy copies are made with, or None for none."""
    from ...data.audio.noise import find_noise
    from ...data.errors import UsageError

    if noise is None and snr is not None:
        raise UsageError("--snr is of noise", expected="--noise FOLDER with it")
    if noise is None and rir is None:
        if copies:
            raise UsageError("--copies needs something to make copies with", expected="--noise FOLDER or --rir FOLDER")
        return None
    number = r"(-?(?:\d+\.?\d*|\.\d+))"
    match = re.fullmatch(f"{number}(?:-{number})?", snr or "5-20")
    low, high = map(float, (match[1], match[2] or match[1])) if match else (math.nan, math.nan)
    if not low <= high:
        raise UsageError(f"--snr {snr}", expected="decibels from low to high, such as 5-20")
    return find_noise(noise, rir, (low, high), 1 if copies is None else copies)


def _method(
    chosen: Corpus,
    path: Path,
    rate_hz: int | None,
    bins: int | None,
    encoder: str | None,
    layer: int | None,
    device: str,
) -> FeatureMethod:
    """Return what computes the rows. An encoder is loaded here, before anything is written."""
    from ...data.errors import UsageError
    from ...data.features.methods import FbankMethod
    from ...data.features.rates import default_rate
    from ...data.features.settings import FeatureSettings

    if encoder is None:
        if layer is not None:
            raise UsageError("--layer is of an encoder", expected="--encoder MODEL with it")
        rate_hz = default_rate(chosen, path) if rate_hz is None else rate_hz
        return FbankMethod(FeatureSettings(rate_hz=rate_hz, bins=80 if bins is None else bins))
    if layer is None:
        raise UsageError("--encoder needs a layer", expected="--layer K with it, for example in the middle")
    if bins is not None:
        raise UsageError("--bins is for fbank, and the states of an encoder have its width", expected="no --bins")
    from ..speech.rows import encoder_method

    method = encoder_method(encoder, layer, device)
    if rate_hz not in (None, method.settings.rate_hz):
        own = method.settings.rate_hz
        raise UsageError(f"this encoder takes audio of {own} Hz, not of {rate_hz} Hz", expected=f"--rate {own} or none")
    return method

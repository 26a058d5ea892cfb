"""The part of `stillhouse decode` that decodes audio directly: from a pipe as it arrives, or from a file.

Guarantees: every result is written and flushed, whether the audio ends, is interrupted by Ctrl-C or is damaged.
Try: `sox … | stillhouse decode RUN -`.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ...data.files.atomic import named
from ...data.files.streams import exact
from ...data.files.trouble import OUTPUT

TELL_S = 2.0


def say(line: str) -> None:
    click.echo(line, err=True)


def say_left_out(loader: Any, done: str) -> None:
    """Say how many utterances are not `done`, because they are text alone."""
    if count := loader.left_out["without audio"]:
        say(f"{count} utterances have no audio, so they are not {done}.")


def say_unheard(config: Any, step: int) -> None:
    """Say that weights have learnt text alone, as those of a run that pretrains its prediction network."""
    if 0 < step <= config.text.pretrain_steps:
        say(f"The weights of step {step} have learnt text alone, and no speech (text.pretrain_steps).")


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say what the block does, if it takes longer than TELL_S."""
    timer = threading.Timer(TELL_S, say, [f"{what} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write_data(line: str) -> None:
    """Write a line of results to stdout, with escapes for control characters on a terminal only."""
    with named(Path(OUTPUT)):
        click.echo(line, file=exact(sys.stdout))


def speed(audio_s: float, wall_s: float) -> str:
    return (
        f"{audio_s:.0f} s of audio in {wall_s:.1f} s: {audio_s / max(wall_s, 1e-9):.1f} x real time "
        f"(real-time factor {wall_s / max(audio_s, 1e-9):.4f})"
    )


def features_of(run: Path) -> Any:
    """Return what a model was trained on, as `TrainedOn`. Say so if its folder does not record it."""
    from ..run.load import trained_on

    trained = trained_on(run)
    if trained.settings is None and trained.fingerprint is None:
        say(f"{run} records nothing of the features that it was trained on, so their settings are not compared.")
    return trained


def sample_rate(run: Path) -> int:
    """Return the sample rate of the audio that a model was trained on, or 16 kHz if its folder does not record it."""
    rate_hz = features_of(run).rate_hz
    if rate_hz is None:
        say("The audio is taken as 16,000 Hz, because the rate of the model's features is unknown.")
    return rate_hz or 16000


def read_samples(source: Path, rate_hz: int, raw: bool, remedy: bool = True) -> Iterator[Any]:
    """Yield mono samples of standard input as they arrive, or of a file in blocks of a second, resampled.

    `remedy`: whether a model of audio of a lower rate can be trained, which a speech encoder does not take.
    """
    from ...data.audio.blocks import read_blocks
    from ...data.audio.pcm import PcmStream
    from ...data.audio.read import open_audio
    from ...data.audio.whole import flaw_of
    from ...data.errors import UsageError

    if str(source) == "-":
        stream = sys.stdin.buffer
        if stream.isatty():
            raise UsageError(
                "standard input is a terminal", remedy=f"sox FILE -t wav -r {rate_hz} -c 1 - | stillhouse decode RUN -"
            )
        pcm = PcmStream(stream, rate_hz, raw=raw)
        yield from pcm
        if pcm.cut_short:
            say("The audio ended earlier than its header states, or inside a sample.")
        return
    if raw:
        raise UsageError("--raw is for audio from a pipe", expected="- instead of a file")
    if source.suffix in (".jsonl", ".gz", ".json"):
        raise UsageError("FEATURES is missing", where=source, remedy="stillhouse corpus features CORPUS features.h5")
    with open_audio(source) as file:
        own_hz, channels, flaw = file.samplerate, file.channels, flaw_of(source, file)
    if own_hz < rate_hz:
        other = f" A model of such audio needs features with `corpus features --rate {own_hz}`." if remedy else ""
        say(f"{source} has {own_hz} Hz and the model {rate_hz} Hz: nothing is in its upper band. Expect errors.{other}")
    if channels > 1:
        say(f"{source} has {channels} channels, and their mean is decoded.")
    if flaw is not None:
        say(f"{source}: {flaw}")
    for block in read_blocks(source, rate_hz):
        yield from (block[at : at + rate_hz] for at in range(0, len(block), rate_hz))


class Interruptible:
    """Iterates over `blocks` until Ctrl-C, which ends a wait at once and the work on a block when it is done."""

    def __init__(self, blocks: Iterator[Any]) -> None:
        self.blocks, self.waiting, self.interrupted = blocks, False, False

    def _on_interrupt(self, *_: Any) -> None:
        self.interrupted = True
        if self.waiting:
            raise KeyboardInterrupt

    def __iter__(self) -> Iterator[Any]:
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            while not self.interrupted:
                self.waiting = True
                block = next(self.blocks, None)
                self.waiting = False
                if block is None:
                    return
                yield block
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self.waiting = False
            signal.signal(signal.SIGINT, before)


def decode_live(
    decoder: Any, samples: Iterator[Any], kind: str, nbest: int, name: str, segmented: bool, partial: bool
) -> None:
    """Write results as they come. Partial ones go into jsonl, or to a terminal."""
    from ...data.errors import AudioError
    from ..decode.write import check_ids, stream_lines

    check_ids([name], kind)
    began, busy, count = time.perf_counter(), 0.0, 0
    shown = partial and kind != "jsonl" and sys.stderr.isatty()

    def write(results: Iterator[Any]) -> None:
        nonlocal busy
        start = time.perf_counter()
        for result in results:
            if shown:
                click.echo("\r\x1b[K" + ("" if result.final else result.hyp[-100:]), nl=False, err=True)
            if result.final or (partial and kind == "jsonl"):
                for line in stream_lines(result, kind, name, segmented, nbest):
                    write_data(line)
        busy += time.perf_counter() - start

    blocks = Interruptible(samples)
    try:
        for block in blocks:
            count += len(block)
            write(decoder.push(block))
    finally:
        if count:
            write(decoder.finish())
            if decoder.cuts:
                least = f"the model's training had at most {decoder.longest_s:g} s"
                say(f"The audio is cut at {decoder.cuts} quiet places: {least}.")
            total_s = time.perf_counter() - began
            say(f"{speed(count / decoder.rate_hz, busy)}; {total_s:.1f} s with the wait for audio")
    if blocks.interrupted:
        raise KeyboardInterrupt
    if not count:
        raise AudioError("the audio is empty", where=name)

"""What `stillhouse decode` does with audio that it hears directly: reading it, telling results as they come.

Invariant: every result that was reached is written and flushed, whatever ends the audio: its end, Ctrl-C, damage.
Exercised by `sox … | stillhouse decode RUN -`.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


def say(line: str) -> None:
    click.echo(line, err=True)


def speed(audio_s: float, wall_s: float) -> str:
    return (
        f"{audio_s:.0f} s of audio in {wall_s:.1f} s: {audio_s / max(wall_s, 1e-9):.1f} x real time "
        f"(real-time factor {wall_s / max(audio_s, 1e-9):.4f})"
    )


def rate_of(run: Path, model: Any) -> int:
    """The rate of the audio that the run learnt from, told by the fingerprint of its features; 16 kHz if by nothing."""
    from ...data.features.compute import FeatureSettings
    from ..run.identity import read

    told = ((read(run) or {}).get("data") or {}).get("features")
    for rate in (16000, 8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000):
        if FeatureSettings(rate_hz=rate, bins=len(model.encoder.feature_mean)).fingerprint == told:
            return rate
    return 16000


def samples_of(source: Path, rate_hz: int, raw: bool) -> Iterator[Any]:
    """Mono samples of standard input, as they come, or of a file, resampled."""
    from ...data.audio.pcm import PcmStream
    from ...data.audio.read import read_audio
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
            say("the audio ended before its header said it would, or inside a sample")
        return
    if raw:
        raise UsageError("--raw is of audio from a pipe", expected="-")
    if source.suffix in (".jsonl", ".gz", ".json"):
        raise UsageError("FEATURES is missing", where=source, remedy="stillhouse corpus features CORPUS features.h5")
    samples = read_audio(source, rate_hz=rate_hz)
    yield from (samples[at : at + rate_hz] for at in range(0, len(samples), rate_hz))


class Interruptible:
    """`blocks`, ended by Ctrl-C: while one is waited for, or after what is being done with the last one."""

    def __init__(self, blocks: Iterator[Any]) -> None:
        self.blocks, self.waiting, self.interrupted = blocks, False, False

    def _note(self, *_: Any) -> None:
        self.interrupted = True
        if self.waiting:
            raise KeyboardInterrupt

    def __iter__(self) -> Iterator[Any]:
        before = signal.signal(signal.SIGINT, self._note)
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


def tell(
    decoder: Any, samples: Iterator[Any], kind: str, nbest: int, name: str, segmented: bool, partial: bool
) -> None:
    """Results as they come; what there is, if interrupted. Partial ones are for jsonl, and for eyes at a terminal."""
    from ...data.errors import AudioError
    from ..decode.write import check_ids, live_lines

    check_ids([name], kind)
    began, busy, count = time.perf_counter(), 0.0, 0
    shown = partial and kind != "jsonl" and sys.stderr.isatty()

    def write(results: Iterator[Any]) -> None:
        for heard in results:
            if shown:
                click.echo("\r\x1b[K" + ("" if heard.final else heard.hyp[-100:]), nl=False, err=True)
            if heard.final or (partial and kind == "jsonl"):
                for line in live_lines(heard, kind, name, segmented, nbest):
                    click.echo(line)

    blocks = Interruptible(samples)
    try:
        for block in blocks:
            start = time.perf_counter()
            count += len(block)
            write(decoder.push(block))
            busy += time.perf_counter() - start
    finally:
        if count:
            start = time.perf_counter()
            write(decoder.finish())
            busy += time.perf_counter() - start
            told = speed(count / decoder.fbank.rate_hz, busy)
            say(f"{told}; {time.perf_counter() - began:.1f} s with the time that the audio took to come")
    if blocks.interrupted:
        raise KeyboardInterrupt
    if not count:
        raise AudioError("no audio came", where=name)

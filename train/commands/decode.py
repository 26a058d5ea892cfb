"""Commands on a trained run: decode, align. Run `stillhouse decode --help`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from .live import rate_of, samples_of, say, speed, tell

PATH = click.Path(path_type=Path)


def finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number to reckon with", context, option)
    return value


def of_a_trained_run(command: Callable) -> Callable:
    """The options that choose among a run's weights and a corpus's utterances."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto."),
        click.option("--checkpoint", default="best", show_default=True, help="best, last, a step, raw or average:N."),
        click.option("--split", help="Only this split; several with commas."),
    ):
        command = option(command)
    return command


def searching(command: Callable) -> Callable:
    """How hypotheses are searched for."""
    for option in (
        click.option("--ilm-weight", type=float, callback=finite, default=0.0,
                     help="Of the internal language model, taken off."),
        click.option("--blank-penalty", type=float, callback=finite, default=0.0,
                     help="Taken off the blank's logit: more words."),
        click.option("--max-symbols", type=click.IntRange(min=1), default=8, show_default=True, help="Units a frame."),
        click.option("--lm-unknown", type=click.FloatRange(min=0), callback=finite, default=10.0, show_default=True,
                     help="What an unknown word costs beside <unk>, in nats, before --lm-weight."),
        click.option("--lm-unit", type=click.Choice(["word", "unit"]), default="word", show_default=True,
                     help="What the n-grams are of: words, or the recogniser's units."),
        click.option("--lm-weight", type=float, callback=finite, default=0.3, show_default=True,
                     help="Of the n-gram model."),
        click.option("--lm", type=PATH, help="An n-gram model, ARPA or ARPA.gz, for shallow fusion."),
        click.option("--nbest", type=click.IntRange(min=1), default=1, show_default=True, help="Hypotheses to write."),
        click.option("--beam", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Hypotheses to keep; 1 without --lm is greedy."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("run", type=PATH)
@click.argument("corpus", metavar="CORPUS|-|AUDIO", type=PATH)
@click.argument("features", type=PATH, required=False)
@of_a_trained_run
@searching
@click.option("--format", "kind", type=click.Choice(["jsonl", "trn", "ctm", "text"]), default="jsonl",
              show_default=True, help="jsonl has all; trn and ctm are NIST's; text is Kaldi's.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch. [default: all cores]")
@click.option("--raw", is_flag=True, help="Of -: 16-bit mono PCM without a header, at the model's rate.")
@click.option("--id", "name", help="Of - or AUDIO: its id. [default: stdin, or the file's name]")
@click.option("--chunk", type=click.IntRange(min=1), metavar="FRAMES",
              help="Of - or AUDIO: frames of 10 ms to hear at a time. [default: the model's]")  # fmt: skip
@click.option("--segment", type=click.FloatRange(min=0.1), callback=finite, metavar="SECONDS",
              help="Of - or AUDIO: a result is final after so long at most.")  # fmt: skip
@click.option("--endpoint", type=click.FloatRange(min=0.1), callback=finite, metavar="SECONDS",
              help="Of - or AUDIO: a result is final after so long without a word.")  # fmt: skip
@click.option("--no-partial", is_flag=True, help="Of - or AUDIO: final results alone.")
def decode(
    run: Path,
    corpus: Path,
    features: Path | None,
    split: str | None,
    checkpoint: str,
    device: str,
    kind: str,
    threads: int | None,
    raw: bool,
    name: str | None,
    chunk: int | None,
    segment: float | None,
    endpoint: float | None,
    no_partial: bool,
    **how: Any,
) -> None:
    """Write a hypothesis for each utterance of CORPUS to stdout, as JSON lines {"id", "hyp", "ref", "score", "words"}.

    Word times are those at which the model emitted the word's units, in steps of an encoder frame (10 ms times the
    model's subsampling). --lm is added with --lm-weight to the score of each unit; --beam above 1 makes it worth it.

    Without FEATURES, - is audio from a pipe (WAV, or --raw) and AUDIO a file. A model that was trained with chunks
    tells {"id", "hyp", "final", "start_s", "end_s", …} as it hears; another one at the end, or after each --segment.

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --split test > hyp.jsonl

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --beam 8 --lm words.arpa.gz --format ctm

    Example: stillhouse decode runs/kathleen - --format text < talk.wav
    """
    import torch

    from ...data.errors import UsageError
    from ..model.build import resolve_device
    from ..run.load import load_run

    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    model, units, _, step = load_run(run, checkpoint)
    model = model.to(where)
    search, nbest = _search(model, units, kind=kind, **how)
    live = {"--raw": raw, "--id": name, "--chunk": chunk, "--segment": segment, "--endpoint": endpoint}
    live["--no-partial"] = no_partial
    if features is not None:
        if wrong := [option for option, value in live.items() if value]:
            raise UsageError(f"{wrong[0]} is of audio that is heard directly", expected="- or AUDIO, and no FEATURES")
        _corpus(model, units, step, corpus, features, split, search, nbest, kind)
        return
    if split is not None:
        raise UsageError("--split is of a corpus", expected="CORPUS and FEATURES")
    from ..decode.stream import StreamDecoder, chunk_of

    rate_hz = rate_of(run, model)
    chunk = chunk_of(model, chunk)
    decoder = StreamDecoder(
        model, units, search=search, rate_hz=rate_hz, chunk=chunk, segment_s=segment, endpoint_s=endpoint, nbest=nbest
    )
    if not chunk:
        if endpoint is not None:
            raise UsageError("--endpoint is of a model that streams", expected="--segment SECONDS")
        when = f"of {segment:g} s at most" if segment else "when the audio ends"
        say(f"this model hears whole utterances: it was not trained to stream; results come {when}")
    name = name or ("stdin" if str(corpus) == "-" else corpus.stem)
    tell(decoder, samples_of(corpus, rate_hz, raw), kind, nbest, name, bool(segment or endpoint), not no_partial)


def _corpus(
    model: Any,
    units: Any,
    step: int,
    corpus: Path,
    features: Path,
    split: str | None,
    search: Callable,
    nbest: int,
    kind: str,
) -> None:
    import time

    from ...data.manifest import read_manifest
    from ..decode.decode import decoding_loader, transcribe
    from ..decode.write import as_lines, check_ids

    loader = decoding_loader(read_manifest(corpus).select(split), features, units, untranscribed=True)
    check_ids((u.id for u in loader.utterances), kind)
    device = model.encoder.feature_mean.device
    began = time.perf_counter()
    for found in transcribe(model, loader, device=device, search=search, nbest=nbest):
        for line in as_lines(found, kind, nbest):
            click.echo(line)
    seconds, audio = time.perf_counter() - began, loader.frames.sum() / 100
    say(f"step {step}: {len(loader.utterances)} utterances, {speed(audio, seconds)}")


def _search(
    model: Any,
    units: Any,
    *,
    kind: str,
    beam: int,
    nbest: int,
    lm: Path | None,
    lm_weight: float,
    lm_unit: str,
    lm_unknown: float,
    max_symbols: int,
    blank_penalty: float,
    ilm_weight: float,
) -> tuple[Callable, int]:
    """What makes a search of a batch; how many hypotheses of it are told."""
    from ...data.errors import UsageError
    from ..decode.beam import Beam, Fusion
    from ..decode.fusion import UnitFusion, WordFusion
    from ..decode.greedy import greedy_search
    from ..decode.ngram import read_arpa

    if nbest > beam:
        raise UsageError(f"--nbest {nbest} of a beam of {beam}", expected=f"--beam {nbest} or more")
    if nbest > 1 and kind != "jsonl":
        raise UsageError(f"--nbest {nbest} with --format {kind}", expected="--format jsonl, which holds several")
    if beam == 1 and lm is None and not ilm_weight and not blank_penalty:
        return partial(greedy_search, max_symbols=max_symbols), 1
    if model.durations:
        raise UsageError(
            "this model emits tokens and durations, which only the greedy search finds",
            expected="--beam 1, without --lm, --ilm-weight and --blank-penalty",
        )
    if ilm_weight and model.joint.combine != "add":
        raise UsageError("a joint that multiplies has no internal language model", expected="--ilm-weight 0")
    fusion: Fusion | None = None
    if lm is not None:
        ngrams = read_arpa(lm)
        fusion = (
            WordFusion(ngrams, units, lm_weight, lm, unknown=lm_unknown)
            if lm_unit == "word"
            else UnitFusion(ngrams, units, lm_weight, lm)
        )
    search = partial(
        Beam,
        width=beam,
        max_symbols=max_symbols,
        fusion=fusion,
        blank_penalty=blank_penalty,
        ilm_weight=ilm_weight,
    )
    return search, nbest


@click.command()
@click.argument("run", type=PATH)
@click.argument("corpus", type=PATH)
@click.argument("features", type=PATH)
@of_a_trained_run
@click.option("--textgrid", "folder", type=PATH, help="Also write FOLDER/ID.TextGrid for Praat.")
def align(
    run: Path, corpus: Path, features: Path, split: str | None, checkpoint: str, device: str, folder: Path | None
) -> None:
    """Write when the model hears each word of the transcripts, as CTM lines, to stdout.

    Example: stillhouse align runs/kathleen corpus.jsonl features.h5 --split test > words.ctm
    """
    from ...data.manifest import read_manifest
    from ..decode.align import align as alignments
    from ..decode.align import ctm_lines, textgrid
    from ..decode.decode import decoding_loader
    from ..decode.write import check_ids
    from ..model.build import resolve_device
    from ..run.load import load_run

    where = resolve_device(device)
    model, units, _, step = load_run(run, checkpoint)
    loader = decoding_loader(read_manifest(corpus).select(split), features, units)
    check_ids((u.id for u in loader.utterances), "ctm")
    words = 0
    for found in alignments(model.to(where), loader, device=where):
        words += len(found.words)
        for line in ctm_lines(found):
            click.echo(line)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{found.id.replace('/', '_')}.TextGrid").write_text(textgrid(found), encoding="utf-8")
    say(f"step {step}: {words} words of {len(loader.utterances)} utterances")

"""Commands on a trained run: decode, align. Run `stillhouse decode --help`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


def say(line: str) -> None:
    click.echo(line, err=True)


def of_a_trained_run(command: Callable) -> Callable:
    """The options that choose among a run's weights and a corpus's utterances."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto."),
        click.option("--checkpoint", default="best", show_default=True, help="best, last or a step."),
        click.option("--split", help="Only this split; several with commas."),
    ):
        command = option(command)
    return command


def searching(command: Callable) -> Callable:
    """How hypotheses are searched for."""
    for option in (
        click.option("--ilm-weight", type=float, default=0.0, help="Of the internal language model, taken off."),
        click.option("--blank-penalty", type=float, default=0.0, help="Taken off the blank's logit: more words."),
        click.option("--max-symbols", type=click.IntRange(min=1), default=8, show_default=True, help="Units a frame."),
        click.option("--lm-unit", type=click.Choice(["word", "unit"]), default="word", show_default=True,
                     help="What the n-grams are of: words, or the recogniser's units."),
        click.option("--lm-weight", type=float, default=0.3, show_default=True, help="Of the n-gram model."),
        click.option("--lm", type=PATH, help="An n-gram model, ARPA or ARPA.gz, for shallow fusion."),
        click.option("--nbest", type=click.IntRange(min=1), default=1, show_default=True, help="Hypotheses to write."),
        click.option("--beam", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Hypotheses to keep; 1 without --lm is greedy."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("run", type=PATH)
@click.argument("corpus", type=PATH)
@click.argument("features", type=PATH)
@of_a_trained_run
@searching
@click.option("--format", "kind", type=click.Choice(["jsonl", "trn", "ctm", "text"]), default="jsonl",
              show_default=True, help="jsonl has all; trn and ctm are NIST's; text is Kaldi's.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch. [default: all cores]")
def decode(
    run: Path,
    corpus: Path,
    features: Path,
    split: str | None,
    checkpoint: str,
    device: str,
    kind: str,
    threads: int | None,
    **how: Any,
) -> None:
    """Write a hypothesis for each utterance to stdout, as JSON lines {"id", "hyp", "ref", "score", "words"}.

    Word times are those at which the model emitted the word's units, in steps of an encoder frame (10 ms times the
    model's subsampling). --lm is added with --lm-weight to the score of each unit; --beam above 1 makes it worth it.

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --split test > hyp.jsonl

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --beam 8 --lm words.arpa.gz --format ctm
    """
    import time

    import torch

    from ..data.manifest import read_manifest
    from .building import load_run, resolve_device
    from .decode import decoding_loader, transcribe
    from .outputs import as_lines, check_ids

    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    model, units, _, step = load_run(run, checkpoint)
    model = model.to(where)
    search, nbest = _search(units, kind=kind, **how)
    loader = decoding_loader(read_manifest(corpus).select(split), features, units, untranscribed=True)
    check_ids((u.id for u in loader.utterances), kind)
    began = time.perf_counter()
    for found in transcribe(model, loader, device=where, search=search, nbest=nbest):
        for line in as_lines(found, kind, nbest):
            click.echo(line)
    seconds, audio = time.perf_counter() - began, loader.frames.sum() / 100
    say(f"step {step}: {len(loader.utterances)} utterances, {speed(audio, seconds)}")


def speed(audio_s: float, wall_s: float) -> str:
    return (
        f"{audio_s:.0f} s of audio in {wall_s:.1f} s: {audio_s / max(wall_s, 1e-9):.1f} x real time "
        f"(real-time factor {wall_s / max(audio_s, 1e-9):.4f})"
    )


def _search(
    units: Any,
    *,
    kind: str,
    beam: int,
    nbest: int,
    lm: Path | None,
    lm_weight: float,
    lm_unit: str,
    max_symbols: int,
    blank_penalty: float,
    ilm_weight: float,
) -> tuple[Callable, int]:
    """What makes a search of a batch; how many hypotheses of it are told."""
    from ..data.errors import UsageError
    from .arpa import read_arpa
    from .beam import Beam
    from .decode import Greedy
    from .fusion import UnitFusion, WordFusion

    if nbest > beam:
        raise UsageError(f"--nbest {nbest} of a beam of {beam}", expected=f"--beam {nbest} or more")
    if nbest > 1 and kind != "jsonl":
        raise UsageError(f"--nbest {nbest} with --format {kind}", expected="--format jsonl, which holds several")
    if beam == 1 and lm is None and not ilm_weight and not blank_penalty:
        return partial(Greedy, max_symbols=max_symbols), 1
    fusion = None
    if lm is not None:
        fusion = (WordFusion if lm_unit == "word" else UnitFusion)(read_arpa(lm), units, lm_weight, lm)
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
    from ..data.manifest import read_manifest
    from .align import align as alignments
    from .align import ctm_lines, textgrid
    from .building import load_run, resolve_device
    from .decode import decoding_loader
    from .outputs import check_ids

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

"""Commands: demo, train, decode, align, study. Run `stillhouse train --help`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click


def say(line: str) -> None:
    click.echo(line, err=True)


def on_a_trained_run(command: Callable) -> Callable:
    """RUN CORPUS FEATURES and the options that choose among them."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto."),
        click.option("--checkpoint", default="best", show_default=True, help="best, last or a step."),
        click.option("--split", help="Only this split; several with commas."),
        click.argument("features", type=click.Path(path_type=Path)),
        click.argument("corpus", type=click.Path(path_type=Path)),
        click.argument("run", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="A.B=VALUE", help="Change one setting; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/NAME-OF-CONFIG]")
def train(config: Path, changes: tuple[str, ...], out: Path | None) -> None:
    """Train a transducer as CONFIG (TOML) says; goes on where a killed run stopped.

    Example: stillhouse train recipes/kathleen.toml --set optim.steps=4000 --out runs/kathleen
    """
    from .config import load_config
    from .trainer import Trainer

    settings = load_config(config, changes)
    folder = out or Path("runs") / config.stem
    Trainer(settings, folder, say).run()
    click.echo(folder)


@click.command()
@on_a_trained_run
def decode(run: Path, corpus: Path, features: Path, split: str | None, checkpoint: str, device: str) -> None:
    """Write a hypothesis for each utterance, JSON lines {"id", "hyp", "ref"}, to stdout.

    Example: stillhouse decode runs/kathleen corpus.jsonl features.h5 --split test > hyp.jsonl
    """
    import time

    from ..data.manifest import read_manifest
    from .building import load_run, resolve_device
    from .decode import decoding_loader, transcribe

    where = resolve_device(device)
    model, units, _, step = load_run(run, checkpoint)
    loader = decoding_loader(read_manifest(corpus).select(split), features, units, untranscribed=True)
    began = time.perf_counter()
    for found in transcribe(model.to(where), loader, device=where):
        click.echo(json.dumps({"id": found.id, "hyp": found.hyp, "ref": found.ref}, ensure_ascii=False))
    seconds, audio = time.perf_counter() - began, loader.frames.sum() / 100
    say(
        f"step {step}: {len(loader.utterances)} utterances, {audio:.0f} s of audio in {seconds:.1f} s "
        f"(real-time factor {seconds / max(audio, 1e-9):.4f})"
    )


@click.command()
@on_a_trained_run
@click.option("--textgrid", "folder", type=click.Path(path_type=Path), help="Also write FOLDER/ID.TextGrid for Praat.")
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

    where = resolve_device(device)
    model, units, _, step = load_run(run, checkpoint)
    loader = decoding_loader(read_manifest(corpus).select(split), features, units)
    words = 0
    for found in alignments(model.to(where), loader, device=where):
        words += len(found.words)
        for line in ctm_lines(found):
            click.echo(line)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{found.id.replace('/', '_')}.TextGrid").write_text(textgrid(found), encoding="utf-8")
    say(f"step {step}: {words} words of {len(loader.utterances)} utterances")


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the runs. [default: runs/NAME-OF-STUDY]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--only", help="Only these arms; several with commas.")
@click.option("--seeds", help="Only these seeds; several with commas.")
@click.option("--table", "table_only", is_flag=True, help="Run nothing: the table of what is done.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON instead of Markdown.")
def study(
    study: Path,
    out: Path | None,
    jobs: int,
    only: str | None,
    seeds: str | None,
    table_only: bool,
    as_json: bool,
) -> None:
    """Train every arm of STUDY (TOML) with every seed and compare their error rates; stopped, it goes on.

    Each run is an ordinary run folder, OUT/ARM/seed-N. The table goes to stdout, and with plots to OUT/study.html.

    Example: stillhouse study recipes/study-demo.toml --jobs 2
    """
    from dataclasses import asdict

    from .study import chosen, load_study
    from .study_report import limit, markdown, write_reports
    from .study_runs import StudyError, run_study
    from .study_table import curves, limits, tabulate

    whole = load_study(study, out or Path("runs") / study.stem)
    runs = chosen(whole, only, seeds)
    failures = (
        [] if table_only else run_study(whole, runs, jobs=jobs, say=say, limits=lambda: map(limit, limits(whole)))
    )
    table = tabulate(whole)
    write_reports(table, whole.out, curves(whole))
    click.echo(json.dumps(asdict(table), ensure_ascii=False) if as_json else markdown(table), nl=as_json)
    say(f"report: {whole.out / 'study.html'}")
    if failures:
        raise StudyError(
            f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}",
            where=whole.out,
            remedy="the same command again goes on with them",
        )


@click.command()
@click.option("--quick", is_flag=True, help="Under 3 minutes: hears and trains less, and judges no error rate.")
@click.option("--study", is_flag=True, help="Train nothing: corpus and stores for recipes/study-demo.toml.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to work in. [default: demo-out, or demo-out-quick, or study-demo]",
)
@click.option(
    "--voices",
    type=click.Choice(["espeak", "hibari"]),
    default="espeak",
    show_default=True,
    envvar="DEMO_VOICE",
    help="Whose speech; also by the environment variable DEMO_VOICE.",
)
def demo(quick: bool, study: bool, out: Path | None, voices: str) -> None:
    """From short stories in synthetic voices to a trained recogniser and a report, command by command.

    Stopped, the same command goes on. It fails unless the recogniser works: word error rates of at most 30 % on known
    sentences in voices that it never heard, and of at most 60 % on sentences that it never saw.

    Example: stillhouse demo --quick
    """
    from .demo import DemoError, prepare_study, run_demo

    if study:
        prepare_study(out or Path("study-demo"), voices, say)
        return
    result = run_demo(out or Path("demo-out-quick" if quick else "demo-out"), quick, voices, say)
    click.echo()
    click.echo(result.table())
    click.echo(f"\nreport: {result.page}\n")
    say(result.librispeech)
    if result.failures:
        raise DemoError("the demo's recogniser does not work: " + "; ".join(result.failures), where=result.page)
